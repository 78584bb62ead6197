"""One batch from the batches of several trials, for joint steps (:mod:`lightning_lora.trials`): their rows one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops.cross_entropy import IGNORE, POSITIONS, WHOLE
from lightning_lora.tasks.padding import ROWS, bounds_of
from lightning_lora.trials.layout import Layout

PAD = {"labels": IGNORE, "input_ids": 0, "attention_mask": 0, "token_type_ids": 0}  # what stands behind the end of a shorter row


def join_batches(batches: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], Layout, Tensor]:
    """Return the joint batch, where each batch is in it, and which batch each of its rows is of (rows,).

    If a batch has its rows laid end to end, all are; a batch that keeps its padding keeps it there.

    Raises:
        ValueError: a batch has something whose place in a joint batch is unknown; the reason only.
    """
    keys = batches[0].keys() - {ROWS, POSITIONS, WHOLE}
    if others := [key for batch in batches for key in (batch.keys() ^ batches[0].keys()) - {ROWS, WHOLE}]:
        raise ValueError(f"not all batches have {others[0]!r}")
    for key in keys:
        if key not in PAD and key != "pixel_values":
            raise ValueError(f"batches have {key!r}, whose place in a joint batch is unknown (packed rows?)")
    sizes = [len(batch["labels"]) for batch in batches]
    owner = torch.arange(len(batches)).repeat_interleave(torch.tensor(sizes)).to(batches[0]["labels"].device)
    if "input_ids" not in keys:
        return {key: torch.cat([batch[key] for batch in batches]) for key in keys}, Layout(sizes), owner
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    longest = max(lengths)
    joint: dict[str, Any] = {
        key: torch.cat([F.pad(batch[key], (0, longest - length), value=PAD[key]) if batch[key].ndim == 2 else batch[key]
                        for batch, length in zip(batches, lengths, strict=True)])
        for key in keys
    }  # fmt: skip
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    shapes = list(zip(starts, lengths, strict=True))
    if len(set(lengths)) == 1 and all(WHOLE in batch for batch in batches):
        joint[WHOLE] = True
    if POSITIONS in batches[0]:
        joint[POSITIONS] = torch.cat([_moved(batch[POSITIONS], *shape, longest) for batch, shape in zip(batches, shapes, strict=True)])
    if not any(ROWS in batch for batch in batches):
        return joint, Layout(sizes, lengths if min(lengths) < longest else None), owner
    rows = [batch.get(ROWS) or _whole(batch["input_ids"]) for batch in batches]
    index = torch.cat([_moved(one["index"], *shape, longest) for one, shape in zip(rows, shapes, strict=True)])
    bounds = bounds_of(torch.cat([one["cu_seq_lens_q"].diff() for one in rows]))
    joint[ROWS] = {
        "index": index,
        "position_ids": torch.cat([one["position_ids"] for one in rows], 1),
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds),
        **dict.fromkeys(("max_length_q", "max_length_k"), max(one["max_length_q"] for one in rows)),
    }
    return joint, Layout([len(one["index"]) for one in rows], end_to_end=True), owner


def owned_means(losses: Tensor, owner: Tensor, counts: Tensor, trials: int) -> Tensor:
    """Return the mean of each trial's losses (trials,).

    Args:
        losses: (N,), 0 where a position does not count.
        owner: (N,), the trial of each.
        counts: (N,), True where a position counts.
        trials: how many there are.
    """
    sums = losses.new_zeros(trials).index_add(0, owner, losses)
    return sums / losses.new_zeros(trials).index_add(0, owner, counts.to(losses.dtype))


def _moved(positions: Tensor, start: int, length: int, longest: int) -> Tensor:
    """Return flat positions in a batch as flat positions in the joint batch, where it begins at row ``start``."""
    return (positions // length + start) * longest + positions % length


def _whole(ids: Tensor) -> dict[str, Any]:
    """Return a batch's rows laid end to end with their padding, as `lightning_lora.tasks.padding.end_to_end` does without."""
    rows, length = ids.shape
    bounds = torch.arange(rows + 1, dtype=torch.int32, device=ids.device) * length
    places = torch.arange(length, device=ids.device).repeat(rows)[None]
    return {"index": torch.arange(ids.numel(), device=ids.device), "position_ids": places, "cu_seq_lens_q": bounds, "max_length_q": length}
