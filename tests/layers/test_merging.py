"""Merging adds in fp32 and rounds once; the way back is exact or refused, and cheap."""

import contextlib

import pytest
import torch

from lightning_lora.layers import merging
from tests.conftest import DTYPES, same_bits


def weight_and_delta(dtype, size=0.1, shape=(48, 40)):
    weight = torch.randn(shape).to(dtype)
    return weight, (torch.randn(shape) * size).to(torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("size", [1e-6, 0.01, 1.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerge_is_exact_to_the_bit(dtype, size):
    weight, delta = weight_and_delta(dtype, size)
    weight.view(-1)[:4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    delta.view(-1)[:2] = 0
    before = weight.clone()
    undo, _ = merging.merge(weight, delta)
    assert not same_bits(weight, before) or size == 1e-6
    assert same_bits(merging.unmerge(weight, delta, undo), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_rounds_once(dtype):
    weight, delta = weight_and_delta(dtype)
    expected = (weight.to(delta.dtype) + delta).to(dtype)
    merging.merge(weight, delta)
    assert same_bits(weight, expected)


def test_an_update_below_the_weights_precision_still_comes_back():
    weight, delta = weight_and_delta(torch.bfloat16, 1e-6)
    before = weight.clone()
    undo, lost = merging.merge(weight, delta)
    assert lost > 0.9  # and the report says that hardly any of it arrived
    assert same_bits(merging.unmerge(weight, delta, undo), before)


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.t().contiguous().t(),
        lambda t: t.view(48, 10, 2, 2).to(memory_format=torch.channels_last),
        lambda t: torch.stack([t, t], -1)[..., 0],
    ],
    ids=["transposed", "channels_last", "strided"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_memory_layout(layout, dtype):
    weight, delta = weight_and_delta(dtype)
    weight = layout(weight)
    delta, before, strides = delta.view(weight.shape), weight.clone(), weight.stride()
    assert not weight.is_contiguous()
    undo, _ = merging.merge(weight, delta)
    assert weight.stride() == strides
    assert same_bits(merging.unmerge(weight, delta, undo), before)


def test_the_way_back_costs_little():
    weight, delta = weight_and_delta(torch.bfloat16, 0.01, (512, 512))
    undo, _ = merging.merge(weight, delta)
    assert 0 < undo.nbytes < 0.06 * weight.nbytes
    assert undo.nbytes == len(undo.index) * (4 + 2)


def test_the_loss_is_the_share_of_the_update_that_rounding_took():
    weight, delta = weight_and_delta(torch.bfloat16)
    wide = weight.double()
    _, lost = merging.merge(weight, delta)
    expected = ((weight.double() - wide) - delta.double()).norm() / delta.double().norm()
    assert lost == pytest.approx(expected.item(), rel=1e-3)
    assert 0.001 < lost < 0.2
    assert merging.merge(torch.randn(3, 3).double(), torch.randn(3, 3).double())[1] < 1e-15
    assert merging.merge(torch.randn(3, 3), torch.zeros(3, 3))[1] == 0


def test_merging_for_good_keeps_nothing():
    weight, delta = weight_and_delta(torch.bfloat16)
    undo, lost = merging.merge(weight, delta, reversible=False)
    assert undo is None
    assert lost > 0


@pytest.mark.parametrize("what", ["delta", "weight", "index"])
def test_another_adapter_or_weight_is_refused(what):
    weight, delta = weight_and_delta(torch.bfloat16)
    undo, _ = merging.merge(weight, delta)
    after = weight.clone()
    if what == "delta":
        delta = delta * 1.5
    elif what == "weight":
        weight[3, 3] += 1
        after = weight.clone()
    else:
        undo = merging.SparseUndo(undo.index[1:], undo.value[1:], undo.checksum)
    with pytest.raises(ValueError, match="would not come back bit for bit"):
        merging.unmerge(weight, delta, undo)
    assert same_bits(weight, after)


def test_nan_in_the_base_weight_comes_back_too():
    weight, delta = weight_and_delta(torch.float32)
    weight[0, 0], weight[1, 1] = torch.nan, torch.inf
    before = weight.clone()
    undo, _ = merging.merge(weight, delta)
    assert same_bits(merging.unmerge(weight, delta, undo), before)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_exact_matmul_ignores_and_restores_what_the_user_set(precision):
    torch.set_float32_matmul_precision(precision)
    a, b = torch.randn(64, 256), torch.randn(256, 64)
    exact = (a.double() @ b.double()).float()
    with torch.autocast("cpu", torch.bfloat16), merging.exact_matmul():
        product = a @ b
        assert not torch.is_grad_enabled()
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    torch.testing.assert_close(product, exact, rtol=1e-5, atol=1e-4)
    assert product.dtype == torch.float32
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("backend", [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul], ids=["cuda", "mkldnn"])
def test_exact_matmul_goes_with_torchs_new_precision_setting(backend, fail):
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        with contextlib.suppress(KeyError), merging.exact_matmul():
            assert backend.fp32_precision == "ieee"
            if fail:
                raise KeyError
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before
