"""Check on the model itself, before it trains on packed rows, that no document sees another. Refuse the model if one does.

A list of architectures would be wrong with the next release. So two documents of random tokens are packed in both orders: each must come
out the same before and behind the other. A state that runs on into the next document (linear attention, a convolution) shows there, and
so do positions that do not restart. One of them must also come out as it does alone, unpacked: a mask with a rule of its own, such as
attention in chunks, shows there. That is three forward passes of at most one row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.cross_entropy import bypassed, unchunkable
from lightning_lora.tasks.packed_attention import NAME, packed_rows, register
from lightning_lora.utils.autocast import autocast_dtype
from lightning_lora.utils.transformers_conventions import attention_implementation

PACKED_INPUTS = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # transformers' names
# Rounding changes hidden states by less; a leak or a wrong position changes them by more. First between orders, the worst token: shapes and
# kernels are the same. Then between packed and alone, the mean over tokens: other kernels may be chosen. A random 8B model in bf16 on a GPU
# has 0 and 0.05; fp32 may be TF32.
_LIMITS, _HALF_LIMITS = (1e-3, 1e-2), (0.03, 0.25)
_TILE = 128  # kernels add in the same order if a document begins on a tile's boundary


class MixesDocuments(ValueError):
    """The model does not keep the documents of a row apart, or not at the cost of each alone.

    Attributes:
        reason: Why, with the model's name.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.reason = f"{name} does not keep packed documents apart: {reason}"
        super().__init__(f"data.packing or model.padding_free is on, but {self.reason}. Set it to false.")


def settle_attention(model: Any, length: int, longest: int, device: torch.device, *, fixed: bool, masks: bool = True) -> str:
    """Choose the attention for packed rows, and check that it keeps documents apart in this model.

    Where the model has transformers' ``sdpa`` by default, `packed_attention` is tried first. The other attentions of transformers make
    a mask from ``position_ids``, or read ``cu_seq_lens_q``.

    Args:
        model: A causal language model of transformers, on its device, wrapped or not.
        length: Tokens per packed row.
        longest: Tokens of the longest document: the model may have no further positions.
        device: Of the inputs.
        fixed: Whether the user named the attention: it stays.
        masks: Whether the attention may cost what one document of the whole row does, as one with a mask does.

    Returns:
        A line for the log.

    Raises:
        MixesDocuments: Documents are not kept apart. The message names the model, and its attention is what it was.
    """
    name, before = type(model).__name__, attention_implementation(model)
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" not in accepted:
        raise MixesDocuments(name, "its forward takes no position_ids, so positions cannot restart in every document")
    second = min(length - max(1, length // 4), longest)
    first = min(length - second, second)
    first -= first % _TILE if first > _TILE else 0
    tokens = torch.randint(model.config.get_text_config().vocab_size, (first + second,), generator=torch.Generator().manual_seed(0))
    one, other = tokens.to(device).split([first, second])
    probe, reason = _Probe(model, unchunkable(model.get_output_embeddings()) is not None), f"its attention {before!r} makes a mask"
    with _as_tested(model):
        alone = probe.states(input_ids=other[None], attention_mask=torch.ones_like(other)[None])
        limits = _limits(model, alone)
        for choice in _choices(before, device, fixed):
            if not masks and choice != NAME:
                continue
            with _attention(model, choice) as keep:
                try:
                    changes = probe.changes(one, other, alone)
                except ValueError as error:  # an attention says what it cannot do
                    reason = " ".join(str(error).split())
                    continue
                beside, apart = (f"{change:.2g}" for change in changes)
                said = f"change by {beside} of their size beside another document, and differ by {apart} from those of a document alone"
                if changes[0] <= limits[0] and changes[1] <= limits[1]:
                    keep()
                    return f"Packed rows: {name} keeps documents apart with attention {choice!r}. Their hidden states {said}."
            reason = f"with attention {choice!r} a document's hidden states {said}"
    raise MixesDocuments(name, reason)


@contextmanager
def _attention(model: Any, choice: str | None) -> Iterator[Callable[[], None]]:
    """Give the model an attention, and take it back at the end unless the yielded function was called."""
    before, kept = attention_implementation(model), []
    if choice != before:
        model.set_attn_implementation(choice)
    try:
        yield lambda: kept.append(choice)
    finally:
        if choice != before and not kept:
            model.set_attn_implementation(before)


def _limits(model: Any, states: Tensor) -> tuple[float, float]:
    """Return the limits for the narrowest dtype that the model computes in. Its states may be wider: many norms compute in fp32."""
    dtypes = {autocast_dtype(states) or states.dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    return _HALF_LIMITS if any(dtype.itemsize < 4 for dtype in dtypes) else _LIMITS


def _choices(before: str | None, device: torch.device, fixed: bool) -> list[str | None]:
    """Return the attentions to try, best first."""
    fast = device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))
    return [register(), before] if before == "sdpa" and fast and not fixed else [before]


@dataclass(frozen=True)
class _Probe:
    """Compares documents of one model.

    Attributes:
        model: The model.
        whole: Compare logits, because the output layer cannot be left out. Sharding may end with the first pass, so it is decided once.
    """

    model: Any
    whole: bool

    def changes(self, one: Tensor, other: Tensor, alone: Tensor) -> tuple[float, float]:
        """Return how much the documents' states change, relative to their size: between both orders, and to the second one alone."""
        begins, behind = self.packed(one, other), self.packed(other, one)
        cut, end = len(one), len(other)
        between = max(_relative(begins[:cut], behind[end:]).max().item(), _relative(begins[cut:], behind[:end]).max().item())
        return between, _relative(behind[:end], alone).mean().item()

    def packed(self, *documents: Tensor) -> Tensor:
        """Return the states of one packed row."""
        row = torch.cat(documents)
        lengths = [len(document) for document in documents]
        bounds = torch.tensor([0, *lengths], device=row.device).cumsum(0, dtype=torch.int32)
        places = torch.cat([torch.arange(length, device=row.device) for length in lengths])[None]
        values = (places, bounds, bounds, len(row), len(row))
        with packed_rows():
            return self.states(input_ids=row[None], **packed_inputs(self.model, dict(zip(PACKED_INPUTS, values, strict=True))))

    def states(self, **inputs: Any) -> Tensor:
        """Return what the output layer gets, or the logits: (T, d)."""
        with nullcontext() if self.whole else bypassed(self.model.get_output_embeddings(), self.model):
            states: Tensor = self.model(**inputs, use_cache=False).logits[0]
            return states


def packed_inputs(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Return what tells the model where documents begin, without what its forward does not accept."""
    accepted = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    return {name: batch[name] for name in PACKED_INPUTS if anything or name in accepted}


def _relative(a: Tensor, b: Tensor) -> Tensor:
    """Return each token's difference, relative to its size: (T,). A state that is not finite differs."""
    a, b = (x if x.dtype == torch.float64 else x.float() for x in (a, b))
    return ((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-12)).nan_to_num(torch.inf, posinf=torch.inf)


@contextmanager
def _as_tested(model: Any) -> Iterator[None]:
    """Run in evaluation mode, uncompiled and without gradients; leave every module's mode as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True
