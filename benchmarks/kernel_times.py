"""The kernels of a training step by the time they take, of several steps side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

CUDA = torch.cuda.is_available()
Kernels = dict[str, tuple[float, float]]  # name → milliseconds and calls a step


def kernels(step: Callable[[int], Any], steps: int) -> Kernels:
    """Kernel (on a CPU: operator) → device milliseconds and calls a step, by torch.profiler."""
    with torch.profiler.profile() as profiler:
        for k in range(steps):
            step(k)
        if CUDA:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if CUDA else torch.autograd.DeviceType.CPU
    found: Kernels = {}
    for event in profiler.events():
        if event.device_type == kind and not event.is_user_annotation:  # a span around kernels would count them twice
            spent, calls = found.get(event.name, (0.0, 0.0))
            spent += (event.device_time if CUDA else event.self_cpu_time_total) / 1e3 / steps
            found[event.name] = spent, calls + 1 / steps
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def compared(kernels: dict[str, Kernels], most: int = 40) -> str:
    """A table of kernels: milliseconds and calls a step in each mode."""
    found = dict.fromkeys(name for one in kernels.values() for name in one)
    longest = sorted(found, key=lambda name: -max(one.get(name, (0.0, 0.0))[0] for one in kernels.values()))
    lines = ["", f"| kernel | {' | '.join(f'{mode}, ms | calls' for mode in kernels)} |", f"|---|{'---|---|' * len(kernels)}"]
    for name in longest[:most]:
        cells = [f"{spent:.3f} | {calls:.0f}" for spent, calls in (one.get(name, (0.0, 0.0)) for one in kernels.values())]
        lines.append(f"| {name[:110].replace('|', '/')} | {' | '.join(cells)} |")
    return "\n".join(lines)
