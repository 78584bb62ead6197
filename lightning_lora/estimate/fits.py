"""What fits into a memory: the largest batch or length as set, and which knobs make the setting itself fit, the cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from lightning_lora.config import LoRAConfig
from lightning_lora.estimate.memory import Estimate, estimate_memory
from lightning_lora.estimate.setting import Setting

# In order of cost, by judgement: the first two take no time, then more is computed again, then another base, then copies each step.
_KNOBS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("chunked loss", {"chunked_loss": True}),
    ('compile="layer"', {"compiled": True}),
    ('checkpointing="selective"', {"checkpointing": "selective"}),
    ("gradient checkpointing", {"checkpointing": "full"}),
    ('offload="activations"', {"offload": ("activations",)}),
    ("quantize=fp8", {"quantize": "fp8"}),
    ("quantize=nf4", {"quantize": "nf4"}),
    ('offload="frozen"', {"offload": ("activations", "frozen")}),
)


@dataclass(frozen=True)
class Fit:
    """What fits.

    Attributes:
        batch: the most rows of the setting's length; 0: not one.
        length: the longest rows of the setting's batch; 0: not one token.
        knobs: what to turn so that the setting itself fits, in order of cost; empty if it fits as it is, None if nothing makes it fit.
        estimate: with these knobs; without them if ``knobs`` is None.

    Examples:
        >>> with torch.device("meta"):
        ...     empty = type(model)(model.config)
        >>> setting = Setting(batch=2, length=16)
        >>> peak = estimate_memory(empty, LoRAConfig(rank=4), setting).peak
        >>> found: Fit = largest_fit(empty, LoRAConfig(rank=4), setting, memory=2 * peak)
        >>> found.knobs, found.batch >= 2
        ((), True)
    """

    batch: int
    length: int
    knobs: tuple[str, ...] | None
    estimate: Estimate


def largest_fit(model: Any, config: LoRAConfig | None, setting: Setting, memory: float) -> Fit:
    """Find what fits.

    Args:
        model: as for :func:`~lightning_lora.estimate.estimate_memory`.
        config: likewise.
        setting: of the run.
        memory: bytes of a device.

    Raises:
        ValueError: the memory is not positive, or as for ``estimate_memory``.

    Examples:
        >>> with torch.device("meta"):
        ...     empty = type(model)(model.config)
        >>> setting = Setting(batch=2, length=16)
        >>> largest_fit(empty, LoRAConfig(rank=4), setting, memory=1).knobs is None  # one byte is too little for all knobs
        True
    """
    if not memory > 0:
        raise ValueError(f"memory={memory!r} must be a positive number of bytes")

    @cache  # some settings are tried for more than one of the answers
    def estimated(tried: Setting) -> Estimate:
        return estimate_memory(model, config, tried)

    def peak(tried: Setting) -> int:
        return estimated(tried).peak

    batch = _largest(lambda count: peak(replace(setting, batch=count)), memory, setting.batch)
    length = _largest(lambda count: peak(replace(setting, length=count)), memory, setting.length)
    first: Estimate | None = None
    for knobs, tried in _tried(setting):
        estimate = estimated(tried)
        first = first or estimate
        if estimate.peak <= memory:
            return Fit(batch, length, knobs, estimate)
    assert first is not None
    return Fit(batch, length, None, first)


def _tried(setting: Setting) -> Iterator[tuple[tuple[str, ...], Setting]]:
    """Yield the setting, then one knob after the other turned as well, with the names of those turned."""
    knobs: dict[str, str] = {}
    yield (), setting
    for name, change in _KNOBS:
        ((field, value),) = change.items()
        now = getattr(setting, field)
        redundant = (
            now == value
            or (field == "quantize" and now is not None and not knobs.get(field))
            or (field == "checkpointing" and now == "full")
        )
        if redundant or (value == ("activations", "frozen") and setting.strategy == "lora_fsdp2"):
            continue
        setting = replace(setting, **change)
        knobs[field if value != ("activations", "frozen") else name] = name
        yield tuple(knobs.values()), setting


def _largest(peak: Callable[[int], int], memory: float, start: int) -> int:
    """Return about the largest count whose peak is within the memory, 0 if none is. Activations grow in proportion to the count, so two
    peaks give it; where the loss has less than a chunk they grow faster, so the count is lowered until it fits."""
    first, second = peak(start), peak(2 * start)
    count = int(start + (memory - first) * start / (second - first))
    while count > 0 and peak(count) > memory:
        count -= max(1, count // 32)
    return max(count, 0)
