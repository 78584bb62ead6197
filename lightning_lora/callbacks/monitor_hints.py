"""Seven common mistakes with LoRA, and what a run says about each: rank, freezing, scaling, merging, targets, processes, overfitting.

The limits are rules of thumb: a hint says where to look, not that something is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from lightning_lora.callbacks.monitor_history import History
from lightning_lora.utils.messages import counted

LARGE, SMALL = 0.5, 1e-3  # ‖ΔW‖/‖W‖ at the end that is unusual
GROWING = 1.8  # times as large at the end as halfway: growth in proportion to the steps is 2
FEW = 0.1  # share of the layers from which a finding is told
OVERFIT = 1.02  # validation loss at the end beside its minimum
# Root mean square of the rounding error beside the entry, for entries spread evenly over a binade: spacing / √12.
ROUNDING = {torch.bfloat16: 0.72 * 2**-7 / math.sqrt(12), torch.float16: 0.72 * 2**-10 / math.sqrt(12)}


@dataclass(frozen=True)
class LayerRow:
    """One layer at the end of a run.

    Attributes:
        name: as in the history.
        rank, scaling: of the adapter.
        dtype: of the frozen weight; None if it is quantized.
        weight_norm: ‖W‖; NaN if it was not measured.
        update_norm: ‖ΔW‖.
        ratio: ‖ΔW‖/‖W‖.
        stable_rank, effective_rank: of ΔW.
        spectrum: singular values of ΔW, descending.
        suggested: rank; None if the layer takes no other, or did not train.
        moved: names of the adapter's parameters that changed since training began.
        rank_before: rank before ranks were applied in the run; None if the layer's rank did not change.
    """

    name: str
    rank: int
    scaling: float
    dtype: torch.dtype | None
    weight_norm: float
    update_norm: float
    ratio: float
    stable_rank: float
    effective_rank: float
    spectrum: tuple[float, ...]
    suggested: int | None
    moved: tuple[str, ...]
    rank_before: int | None = None


@dataclass(frozen=True)
class Findings:
    """What a run showed.

    Attributes:
        rows: the layers.
        history: all measurements.
        changed_base: names of frozen parameters that changed.
        others: names of parameters that train and belong to no adapter.
        unmeasured: names of adapted layers without factors, which are not measured.
        patterns: ``rank_pattern`` and ``alpha_pattern`` of the suggested ranks.
        strategy: name of the strategy's class.
        processes: number of processes.
        steps: optimizer steps.
        applied_at: step after which ranks were applied; None if they were not.
    """

    rows: Sequence[LayerRow]
    history: History
    changed_base: Sequence[str]
    others: Sequence[str]
    unmeasured: Sequence[str]
    patterns: Mapping[str, Mapping[str, float]]
    strategy: str
    processes: int
    steps: int
    applied_at: int | None = None


@dataclass(frozen=True)
class Hint:
    """What was seen of one mistake.

    Attributes:
        title: the mistake.
        look: True if the run shows it.
        text: what was seen, and what to do.
    """

    title: str
    look: bool
    text: str


def hints(found: Findings) -> list[Hint]:
    """Return one hint for each of the seven."""
    return [check(found) for check in CHECKS]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _rank(found: Findings) -> Hint:
    full = [row.name for row in found.rows if row.suggested is not None and row.suggested > row.rank]
    spare = [row.name for row in found.rows if row.suggested is not None and row.suggested < row.rank]
    text = f"{len(full)} of {len(found.rows)} layers use all of their rank ({_some(full) or 'none'}), {len(spare)} could do with less."
    if full:
        text += " If the validation loss is not good enough, raise the rank there (rank_pattern below)."
    return Hint("Rank too low", len(full) > FEW * len(found.rows), text)


def _freezing(found: Findings) -> Hint:
    if found.changed_base:
        text = f"{len(found.changed_base)} frozen parameters changed: {_some(found.changed_base)}. Something writes to them."
        return Hint("Base not frozen", True, text)
    text = "No bit of a frozen parameter changed."
    if found.others:
        text += f" {counted(len(found.others), 'parameter', 'train')} beside the adapters: {_some(found.others)}. Right for a new head;"
        text += " wrong for the base."
    return Hint("Base not frozen", False, text)


def _scaling(found: Findings) -> Hint:
    title, ratios = "Scaling or learning rate", found.history.of("update_ratio")
    known = [row.ratio for row in found.rows if not math.isnan(row.ratio)]
    if any(not math.isfinite(value) for row in found.rows for value in row.spectrum):
        return Hint(title, True, "An update is NaN or infinite: lower the learning rate, clip gradients, look at the data.")
    if not known:
        return Hint(title, False, "‖W‖ could not be read, so there is no ratio to judge by.")
    typical, scaling = median(known), median(row.scaling for row in found.rows)
    text = f"‖ΔW‖/‖W‖ is {typical:.2g} in the middle layer, the scaling {scaling:.3g}."
    if typical > LARGE:
        return Hint(title, True, text + " That is large: lower the learning rate or alpha, unless the task is far from the base's data.")
    halfway = [i for i, step in enumerate(found.history.steps) if 0 < step <= found.steps / 2]
    grown = typical / max(float(ratios[halfway[-1]].nanmedian()), 1e-30) if halfway else 0.0
    late = found.history.steps[halfway[-1]] >= found.steps / 4 if halfway else False
    if typical < SMALL:
        return Hint(title, True, text + " That is small: raise the learning rate (LoRA wants about ten times full fine-tuning's) or alpha.")
    if late and grown > GROWING:
        text += f" It grew {grown:.1f} times in the last half and has not levelled off: train longer, or raise the learning rate."
        return Hint(title, True, text)
    if scaling < 0.25 and median(row.rank for row in found.rows) >= 32:
        text += " At this rank alpha/r makes updates small: set alpha with the rank, or scaling='rslora'."
        return Hint(title, True, text)
    return Hint(title, False, text)


def _merging(found: Findings) -> Hint:
    title = "Merging"
    lost = {
        row.name: min(1.0, ROUNDING[row.dtype] / row.ratio)
        for row in found.rows
        if row.dtype is not None and row.dtype in ROUNDING and not math.isnan(row.ratio) and row.ratio > 0
    }
    worst = max(lost, key=lambda name: lost[name], default=None)
    if worst is None and any(row.dtype is None for row in found.rows):
        text = "The base is quantized, and merging into it is a choice: merge_quantized='dequantize' is exact to rounding,"
        return Hint(title, False, text + " 'requantize' rounds the update to the format's grid.")
    if worst is None:
        return Hint(title, False, "The weights are wide enough to take the update without loss. Merge before you deploy: it is faster.")
    text = (
        f"Merged into 16 bits, rounding loses about {lost[worst]:.0%} of {worst}'s update, {median(lost.values()):.0%} in the middle layer"
    )
    if lost[worst] > 0.1:
        return Hint(title, True, text + ". merge_report(model) has the exact share; serve it unmerged, or merge in float32.")
    return Hint(title, False, text + ". Merge before you deploy: it is faster.")


def _targets(found: Findings) -> Hint:
    title = "Targets that do not train"
    still = [row.name for row in found.rows if not row.moved] if found.steps else []
    zero = [row.name for row in found.rows if row.moved and not any(row.spectrum)] if found.steps else []
    if still or zero:
        text = f"{len(still)} of {len(found.rows)} layers did not change at all ({_some(still) or 'none'})"
        text += (
            f", {len(zero)} still add nothing ({_some(zero) or 'none'}): no gradient reaches them. Check target_modules and the optimizer."
        )
        return Hint(title, True, text)
    return Hint(title, False, f"All {len(found.rows)} layers changed." if found.steps else "No step was taken.")


def _processes(found: Findings) -> Hint:
    where = f"{found.processes} process{'es' if found.processes > 1 else ''} under {found.strategy}"
    unread = [row.name for row in found.rows if math.isnan(row.weight_norm)]
    text = f"{where}: every layer could be read in full."
    if unread:
        layers = f"{counted(len(unread), 'layer')} is of a sharded quantized weight"
        text = f"{where}: ‖W‖ of {layers} and was not read ({_some(unread)}). Updates were."
    return Hint("Model parallelism", False, text)


def _overfitting(found: Findings) -> Hint:
    title = "Overfitting"
    names = sorted({name for _, values in found.history.losses for name in values})
    for name in (name for name in names if name.startswith("val")):
        curve = [(step, values[name]) for step, values in found.history.losses if name in values]
        if len(curve) < 2:
            continue
        (best_step, best), (last_step, last) = min(curve, key=lambda point: point[1]), curve[-1]
        if last - best > (OVERFIT - 1) * abs(best):
            text = f"{name} was lowest at step {best_step} ({best:.4g}) and is {last:.4g} at step {last_step}: take that checkpoint, stop"
            return Hint(title, True, text + " earlier, or use dropout, weight decay or a lower rank.")
        return Hint(title, False, f"{name} is at or near its lowest: {last:.4g} at step {last_step}.")
    return Hint(title, False, "Not to be seen here: no loss with a name that begins with 'val' was logged in two validations.")


CHECKS: tuple[Callable[[Findings], Hint], ...] = (_rank, _freezing, _scaling, _merging, _targets, _processes, _overfitting)
