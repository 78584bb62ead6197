export PYTHONPATH=. PYTHONUNBUFFERED=1
(timeout 120 python -m pytest -q tests/kernels -p no:cacheprovider -W ignore 2>&1 | tail -4; timeout 100 python .dev/check.py 2>&1 | tail -8) > $OUT/check.txt 2>&1 &
pids=$!
for i in $(seq 0 11); do timeout 100 python benchmarks/kernel_tiles.py --kernels forward,backward --compile $i/12 > $OUT/c$i.log 2>&1 & pids="$pids $!"; done
wait $pids
cat $OUT/check.txt; rm -f $OUT/c*.log
timeout 80 python benchmarks/kernel_tiles.py --kernels forward,backward --search 2>&1 | tee $OUT/s1.txt
timeout 40 python benchmarks/kernel_tiles.py --kernels backward --search --programs 1584 2>&1 | tee $OUT/s2.txt
timeout 150 python benchmarks/floor.py --shape 1b --modes floor,frozen,frozen-layer,ours,ours-layer-chunk 2>&1 | tee $OUT/f1.txt
