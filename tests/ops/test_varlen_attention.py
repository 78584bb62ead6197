"""Attention over packed rows: every way equals each document by itself, in its values and in its gradients."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightning_lora.ops import varlen_attention as ops
from lightning_lora.ops.varlen_attention import masked_attention, packed_mask, varlen_attention

LENGTHS = [5, 1, 4, 2, 8]  # two rows of ten
BOUNDS = torch.tensor([0, 5, 6, 10, 12, 20, 20, 20], dtype=torch.int32)


def operands(dtype: torch.dtype = torch.float64, groups: int = 2, size: int = 8, value_size: int = 8) -> list[Tensor]:
    """Query, key and value of two rows of ten tokens, laid out in memory as transformers' are."""
    shapes = ((4, size), (4 // groups, size), (4 // groups, value_size))
    made = [torch.randn(2, 10, *shape, dtype=dtype) for shape in shapes]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in made]


def by_hand(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    """The definition, one token at a time."""
    rows, heads, length, _ = query.shape
    out = query.new_zeros(rows, heads, length, value.shape[-1])
    for begin, end in pairwise(BOUNDS.tolist()):
        for place in range(begin, end):
            row, at = divmod(place, length)
            seen = slice(max(begin, place - window + 1) - row * length, at + 1)
            for head in range(heads):
                group = head // (heads // key.shape[1])
                weights = (key[row, group, seen] @ query[row, head, at] * scale).softmax(0)
                out[row, head, at] = weights @ value[row, group, seen]
    return out


WAYS: dict[str, Callable[..., Tensor]] = {
    "documents": lambda q, k, v, scale, window: varlen_attention(q, k, v, BOUNDS, 8, scale=scale, window=window),
    "mask": lambda q, k, v, scale, window: masked_attention(q, k, v, packed_mask(BOUNDS, 2, 10, window), scale),
    "compiled": lambda q, k, v, scale, window: torch.compile(varlen_attention, backend="aot_eager", fullgraph=True)(
        q, k, v, BOUNDS, 8, scale=scale, window=window
    ),
}


CASES = [(1, 8, None), (2, 8, None), (4, 4, None), (2, 8, 3), (1, 8, 1)]


@pytest.mark.parametrize(
    ("way", "groups", "value_size", "window"),
    [(way, *case) for way in ("documents", "mask") for case in CASES] + [("compiled", *CASES[3])],
)
def test_every_way_equals_the_definition(way: str, groups: int, value_size: int, window: int | None) -> None:
    inputs = operands(groups=groups, value_size=value_size)
    expected = by_hand(*inputs, scale=0.3, window=window or 99)
    found = WAYS[way](*inputs, 0.3, window)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad((found * weight).sum(), inputs), torch.autograd.grad((expected * weight).sum(), inputs))


def test_the_scale_is_that_of_the_heads_by_default() -> None:
    inputs = operands()
    torch.testing.assert_close(varlen_attention(*inputs, BOUNDS, 8), by_hand(*inputs, scale=8**-0.5, window=99))


def test_autocast_computes_in_its_dtype() -> None:
    query, key, value = operands(torch.float32)
    expected = varlen_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), BOUNDS, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = varlen_attention(query, key.bfloat16(), value, BOUNDS, 8)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_dropout_drops_within_documents() -> None:
    """Each output is a sum over the tokens seen so far: with values of one, more or fewer than one is left."""
    query, key, value = operands()
    found = varlen_attention(query, key, torch.ones_like(value), BOUNDS, 8, dropout=0.5)
    assert not torch.allclose(found, torch.ones_like(found)) and set(found[0, :, 5].unique().tolist()) <= {0.0, 2.0}


def test_the_kernel_gets_flat_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's kernel is called with, and that its result is put back: here the kernel is the definition."""
    calls = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, also: Tensor, longest: int, too: int, **options: object) -> Tensor:
        calls.append((q.shape, k.shape, bounds is also, longest, too, options["scale"], options["window_size"]))
        return WAYS["mask"](*(x.unflatten(0, (2, 10)).transpose(1, 2) for x in (q, k, v)), 0.3, 3).transpose(1, 2).flatten(0, 1)

    monkeypatch.setattr(ops, "varlen_attn", kernel)
    monkeypatch.setattr(ops, "_takes_flash", lambda *args: True)
    inputs = operands()
    torch.testing.assert_close(varlen_attention(*inputs, BOUNDS, 8, scale=0.3, window=3), by_hand(*inputs, scale=0.3, window=3))
    assert calls == [((20, 4, 8), (20, 2, 8), True, 8, 8, 0.3, (2, 0))]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gpu_kernel_equals_the_definition(window: int | None, compiled: bool) -> None:
    lengths = [300, 1, 211, 512, 700, 324]
    bounds = torch.tensor([0, *lengths, 0, 0], device="cuda").cumsum(0).to(torch.int32)
    made = [torch.randn(2, 1024, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2)]
    inputs = [tensor.transpose(1, 2).requires_grad_() for tensor in made]
    function = torch.compile(varlen_attention, fullgraph=True) if compiled else varlen_attention
    found = function(*inputs, bounds, 700, window=window)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = masked_attention(*wide, packed_mask(bounds, 2, 1024, window))
    weight = torch.randn_like(found)
    ours = [found, *torch.autograd.grad((found * weight).sum(), inputs)]
    theirs = [expected, *torch.autograd.grad((expected * weight.double()).sum(), wide)]
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine.double() - reference).norm() < 8e-3 * reference.norm()
