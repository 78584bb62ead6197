"""What ``multi_gpu.py`` reads off a step beside its time: the collectives, and the kernels by kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# What a kernel is, by a piece of its name; the first that fits.
KERNELS = {
    "communication": ("nccl",),
    "copied between GPUs": ("Memcpy PtoP",),  # by copy engines: no multiprocessor is taken
    "products": ("nvjet", "gemm"),
    "attention": ("flash", "fmha", "sdpa", "cudnn"),
    "gathered, copied out": ("split_with_sizes",),
    "copied in, optimizer": ("multi_tensor_apply",),
}


class Traffic(TorchDispatchMode):
    """Collectives by kind: how many, and how many bytes (the larger of what goes in and what comes out)."""

    KINDS: ClassVar = {"allgather": "all-gather", "reducescatter": "reduce-scatter", "allreduce": "all-reduce", "broadcast": "broadcast"}

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # their collectives come by once they are plain tensors
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            flat = func._schema.name.split("::")[1].replace("_", "")
            kind = next((name for part, name in self.KINDS.items() if part in flat), None)
            if kind is not None:
                count, size = self.found.get(kind, (0, 0))
                tensors = [sum(t.nbytes for t in torch.utils._pytree.tree_leaves(nest) if isinstance(t, Tensor)) for nest in (*args, out)]
                self.found[kind] = [count + 1, size + max(tensors)]
        return out


def profiled(step: Callable[[], object], steps: int = 2) -> tuple[dict[str, float], list[tuple[str, float, float]]]:
    """:func:`spent` of some steps."""
    with torch.profiler.profile() as profiler:
        for _ in range(steps):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return spent(profiler, steps)


def spent(profiler: Any, steps: int = 1) -> tuple[dict[str, float], list[tuple[str, float, float]]]:
    """Milliseconds of a step by kind of kernel, and the 40 longest kernels: name, how many a step, milliseconds a step.

    *computing* is how much of a step something else than communication was running, *busy* how much anything was, *spanned* from the
    first kernel's start to the last one's end.
    """
    found: dict[str, float] = {}
    kernels: dict[str, list[float]] = {}
    computing: list[tuple[float, float]] = []
    moving: list[tuple[float, float]] = []
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            ms = event.device_time / 1e3 / steps
            kind = next((kind for kind, names in KERNELS.items() if any(name in event.name for name in names)), "the rest")
            found[kind] = found.get(kind, 0.0) + ms
            count, total = kernels.get(event.name, (0.0, 0.0))
            kernels[event.name] = [count + 1 / steps, total + ms]
            spans = moving if kind in ("communication", "copied between GPUs") else computing
            spans.append((event.time_range.start, event.time_range.end))
    if found:
        both = computing + moving
        first, last = min(start for start, _ in both), max(end for _, end in both)
        times = {"computing": covered(computing), "busy": covered(both), "spanned": last - first}
        found |= {name: time / 1e3 / steps for name, time in times.items()}
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:40]
    return found, [(name[:120], count, total) for name, (count, total) in longest]


def gaps(profiler: Any, least: float = 0.02) -> dict[str, Any]:
    """Where a step's GPU had nothing to do: gaps of at least so many milliseconds by the kernels beside them, and the sum of shorter ones.

    *late* is how much of a pair's gaps ended within 50 µs of the launch of the kernel after them: there the GPU waited for Python.
    """
    events = list(profiler.events())
    launched = {one.id: one.time_range.end for one in events if one.name.startswith(("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset"))}
    kernels = [one for one in events if one.device_type == torch.autograd.DeviceType.CUDA and not one.is_user_annotation]
    pairs: dict[str, list[float]] = {}
    short, end, before = 0.0, None, ""
    for kernel in sorted(kernels, key=lambda one: one.time_range.start):
        start = kernel.time_range.start
        gap = 0.0 if end is None else (start - end) / 1e3
        if gap >= least:
            late = gap if start - launched.get(kernel.id, -1e18) < 50 else 0.0
            found = pairs.setdefault(f"{before[:60]} → {kernel.name[:60]}", [0, 0.0, 0.0])
            pairs[f"{before[:60]} → {kernel.name[:60]}"] = [found[0] + 1, found[1] + gap, found[2] + late]
        elif gap > 0:
            short += gap
        if end is None or kernel.time_range.end > end:
            end, before = kernel.time_range.end, kernel.name
    longest = sorted(pairs.items(), key=lambda item: -item[1][1])[:12]
    return {
        "short": short,
        "long": sum(ms for _, ms, _ in pairs.values()),
        "late": sum(ms for _, _, ms in pairs.values()),
        "pairs": longest,
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """How much of the time lies in at least one span."""
    end = total = 0.0
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
