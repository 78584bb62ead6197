"""Take the padding out of a batch before the model computes it: its rows are laid end to end in one row, and do not see one another.

That is TRL's ``padding_free``. The data module's batch stays as it is, for callbacks and metrics; the task computes the tokens that the
attention mask names. A model that keeps the rows apart gives the same logits at these tokens, at the cost of these tokens alone.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_lora.strategies.lightning_private import compiles_steps
from lightning_lora.utils.torch_private import compiled_call

ROWS = "rows"  # the key in a batch of what `end_to_end` returns
WORTH = 0.05  # share of padding below which nothing was gained (benchmarks/README.md, "Packed rows")


def end_to_end(attention_mask: Tensor, least: float = 0.0) -> dict[str, Any] | None:
    """Return where the tokens of a padded batch stand, and where its rows begin when they are laid end to end.

    Args:
        attention_mask: (B, T), on the CPU: to read it on a GPU would wait for all work before it.
        least: Smallest share of padding for which it is done.

    Returns:
        ``index`` (N,): the N tokens' places in the flattened batch; and under transformers' names ``position_ids`` (1, N),
        ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (B + 1,), ``max_length_q`` and ``max_length_k``. None for less padding.
    """
    rows, length = attention_mask.shape
    index = attention_mask.flatten().nonzero()[:, 0]
    padding = 1 - len(index) / (rows * length)
    if padding <= 0 or padding < least:
        return None
    lengths = attention_mask.sum(dim=1)
    bounds = bounds_of(lengths)
    starts = bounds[:-1].repeat_interleave(lengths)
    places = (torch.arange(len(index)) - starts)[None]
    return {
        "index": index,
        "position_ids": places,
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds),
        **dict.fromkeys(("max_length_q", "max_length_k"), int(lengths.max())),
    }


def bounds_of(lengths: Tensor) -> Tensor:
    """Return where rows of these lengths (B,) begin and end in one row: (B + 1,), int32."""
    bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
    bounds[1:] = lengths.cumsum(0)
    return bounds


def is_compiled(task: LightningModule) -> bool:
    """Return True if a part of a task is compiled: it would be compiled anew for every number of tokens."""
    return compiles_steps(task) or any(compiled_call(module) is not None for module in task.modules())
