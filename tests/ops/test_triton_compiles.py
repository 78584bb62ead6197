"""Every kernel compiles for an H100 (sm_90), the gated ones for sm_86 too, on a machine that has none: Triton carries the assembler."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CODE = """
import inspect, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lightning_lora.ops import triton_float8 as float8, triton_gated_mlp as gated, triton_low_rank as low_rank, triton_weight_norm as norms
from lightning_lora.ops import triton_copies as copies, triton_gated_plans as plans, triton_grouped as grouped, triton_nf4 as nf4

FLOATS = {"td", "dt", "sums", "out_scale", "gg", "gu", "sums_gg", "sums_gu"}
HALVES = {"x", "a", "y", "t", "b", "g", "u", "h", "dropped", "bg", "bu", "ad", "dh", "dg", "du", "dtd", "w", "z", "dy", "dz", "bias"}
FLOAT8 = {  # kernels in which a name is of another type
    "_quantize": {**dict.fromkeys(("factor_a", "factor_b", "factor_c", "scales"), "*fp32"), "codes": "*fp8e4nv", "c": "*bf16"},
    "_add": {"offsets": "*i32"},
    "_transpose": {"w": "*u8", "out": "*u8"},
    "_copies": {name: "*fp32" for name in "abcdef"} | {f"to_{name}": "*bf16" for name in "abcdef"},
    "_dequantize": {"codes": "*u8", "absmax": "*u8", **dict.fromkeys(("values", "offset", "outer", "outer_values"), "*fp32")},
}

def compile(kernel, tiles, capability=90, **constants):
    options = tiles.options
    constants |= {name: options.pop(name) for name in ("BT", "BC")}
    names = list(inspect.signature(kernel.fn).parameters)
    kinds = {"seed": "*i64", "scale": "fp32", "out": "*fp32" if kernel in (low_rank._reduce, norms._squares) else "*bf16"}
    constants = {name: value for name, value in constants.items() if name in names}
    kinds |= dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(HALVES, "*bf16") | FLOAT8.get(kernel.fn.__name__, {})
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in names}
    loose = {"threshold", "scale", *constants}
    aligned = {(k,): [["tt.divisibility", 16]] for k, name in enumerate(names) if name not in loose}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return len(built.asm["cubin"]), built.metadata.shared

found = {}
for name, kernel in (("project", low_rank._project), ("add_", low_rank._add), ("reduce", low_rank._reduce)):
    found[name] = compile(kernel, low_rank.TILES[name], BR=16, DROP=True)
found["project, rank 64, sm_86"] = compile(low_rank._project, low_rank.TILES["project"], 86, BR=64, DROP=True)
for name, kernel in (("scaled_sum", low_rank._scaled_sum), ("scaled_sum_backward", low_rank._scaled_sum_backward)):
    found[name] = compile(kernel, low_rank.TILES[name], BR=16, BIAS=True)
found["squares, rank 64, sm_86"] = compile(norms._squares, norms.TILES["squares"], 86, BR=64)
ways = ((90, 16, False, False), (86, 32, False, True), (86, 64, True, False), (86, 64, False, False), (90, 256, True, True))
for capability, rank, drop, out_scale in ways:
    for name, kernel, extra in (("forward", gated._forward, {"LOOP": gated.LOOP}), ("backward", gated._backward, {})):
        plan = plans.plan_of(rank)
        tiles = plans.tiles_of(name, plan, drop, out_scale)
        more = dict(DROP=drop, OUT_SCALE=out_scale, EVEN=True, FAST=True, STAGES=tiles.num_stages, **plan.options, **extra)
        found[f"{name}, rank {rank}, drop {drop}, sm_{capability}"] = compile(kernel, tiles, capability, **more)
found["grouped, rank 16"] = compile(grouped._add, grouped.TILES["add_"], BR=16, BG=128)
found["grouped, rank 64, sm_86"] = compile(grouped._add, grouped.TILES["add_"], 86, BR=64, BG=8)
found["dropped"] = compile(low_rank._dropped, low_rank.TILES["dropped"])
found["copies"] = compile(copies._copies, low_rank.Tiles(0, 0, copies.WARPS), BLOCK=copies.BLOCK)
for name, (chunk, warps) in float8.CHUNKS.items():
    found[f"quantize, {name}"] = compile(float8._quantize, low_rank.Tiles(0, 0, warps), CHUNK=chunk, PARTS=3, SCALED=True)
found["nf4"] = compile(nf4._dequantize, low_rank.Tiles(0, 0, nf4.WARPS), BLOCKS=nf4.ENTRIES // 64, BYTES=32, NESTED=True)
found["transpose"] = compile(float8._transpose, low_rank.Tiles(0, 0, float8.TILE_WARPS), TILE=float8.TILE)
print(json.dumps(found))
"""


def test_for_an_h100_and_for_smaller_gpus():
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)  # this has to be known before the kernels are imported, hence the process
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 25
    for name, (size, shared) in found.items():
        assert size > 0 and shared <= (99 if "sm_86" in name else 227) * 1024, name  # what a program may have
