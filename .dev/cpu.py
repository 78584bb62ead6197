import cProfile
import pstats
import sys
import time

import torch

sys.path.insert(0, "benchmarks")
import floor as F


def go(mode, prof=True):
    F.reset()
    s = F.Setting(shape="1b", batch=4, seq=256)
    step = F.training_step(mode, s)
    for k in range(6):
        step(k)
    torch.cuda.synchronize()
    t = time.perf_counter()
    for k in range(10):
        step(k)
    enq = (time.perf_counter() - t) / 10
    torch.cuda.synchronize()
    print(mode, f"enqueue {enq * 1e3:.1f} ms, with sync {(time.perf_counter() - t) * 100:.1f} ms", flush=True)
    if prof:
        torch.autograd.set_multithreading_enabled(False)
        p = cProfile.Profile()
        p.enable()
        for k in range(3):
            step(k)
        p.disable()
        import io

        o = io.StringIO()
        pstats.Stats(p, stream=o).sort_stats("tottime").print_stats(28)
        print("\n".join(l[:150] for l in o.getvalue().splitlines()[4:]))
        torch.autograd.set_multithreading_enabled(True)


go("floor", False)
go("ours-layer-chunk")
go("frozen", False)
go("ours")
