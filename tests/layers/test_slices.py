"""Adapters on slices of a fused projection, against each slice's own product in float64."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig
from lightning_lora.layers.adapting import adapt, refusal
from lightning_lora.layers.spec import LayerSpec, Slices
from lightning_lora.quantization.formats import format_of
from lightning_lora.utils.fused_layouts import FusedLayout
from tests.conftest import fill, same_bits
from tests.quantized import packed_linear

LAYOUTS = {
    "one after the other": FusedLayout(1, (("q", 4), ("k", 2), ("v", 2))),
    "interleaved": FusedLayout(2, (("q", 2), ("k", 1), ("v", 1))),
}
BASES = {"linear": lambda: nn.Linear(6, 8), "no bias": lambda: nn.Linear(6, 8, bias=False), "conv1d": lambda: Conv1D(8, 6)}


def spec(layout, names=("q", "v"), rank=3, **fields):
    config = LoRAConfig(rank=rank, alpha=5, target_modules=["x"], **fields)
    return LayerSpec(config, rank, 5.0, "attn.qkv", None, Slices(LAYOUTS[layout], names))


def made(layout="interleaved", base="linear", dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    plain = BASES[base]().to(dtype)
    return plain, fill(adapt(copy.deepcopy(plain), spec(layout, **kwargs)))


def by_slice(layer, y, x):
    """y[slice] += scaling · B_k·A_k·x, slice by slice."""
    slices, y = layer.spec.slices, y.clone()
    As = dict(zip(slices.names, layer.lora_A.split(layer.rank), strict=True))
    Bs, start = {}, 0
    for name, size in slices.layout.parts:
        if name in slices.names:
            Bs[name] = layer.lora_B[start : start + slices.layout.groups * size]
            start += len(Bs[name])
    grouped, first = y.unflatten(-1, (slices.layout.groups, -1)), 0
    for name, size in slices.layout.parts:
        if name in As:
            grouped[..., first : first + size] += (layer.scaling * x @ As[name].t() @ Bs[name].t()).unflatten(
                -1, (slices.layout.groups, size)
            )
        first += size
    return y


def example(dtype=torch.float64):
    return torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(4)).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("names", [("q", "v"), ("k",), ("q", "k", "v")], ids=str)
def test_output_and_gradients(layout, base, names):
    plain, layer = made(layout, base, names=names)
    assert layer.lora_A.shape == (3 * len(names), 6) and layer.lora_B.shape[1] == 3
    x = example()
    mine, expected = layer(x), by_slice(layer, plain(x).detach(), x)
    torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), [layer.lora_A, layer.lora_B]) for y in (mine, expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_merges_and_comes_back_bit_for_bit(dtype, base):
    plain, layer = made(base=base, dtype=dtype)
    x = example(dtype)
    before = layer(x)
    layer.merge_weights()
    torch.testing.assert_close(layer(x), before, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-2)
    layer.unmerge_weights()
    assert same_bits(layer.weight, plain.weight) and same_bits(layer(x), before)


def test_all_slices_see_one_dropout_mask():
    plain, layer = made(names=("q", "v"), dropout=0.5)
    x = torch.ones(40, 6, dtype=torch.float64)
    torch.manual_seed(1)
    update = (layer.train()(x) - plain(x)).detach()
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 2.0], dtype=torch.float64)] * 6)
    possible = by_slice(layer, torch.zeros(64, 8, dtype=torch.float64), masks).detach()
    assert torch.cdist(update, possible).amin(1).max() < 1e-6


@pytest.mark.parametrize("variant", ["dora", "lora_fa"])
def test_variants(variant):
    plain, layer = made(variant=variant)
    x = example()
    weight = layer.weight + layer.merge_delta()
    if variant == "dora":
        weight = weight * (layer.lora_magnitude_vector / weight.norm(dim=1)).unsqueeze(1)
    torch.testing.assert_close(layer(x), F.linear(x, weight, plain.bias))
    assert layer.lora_A.requires_grad == (variant == "dora")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        *(({"variant": name}, f"variant={name!r} computes with one A and B") for name in ("adalora", "vera", "lora_xs")),
        *(({"init": name}, f"init={name!r} computes A and B of a whole layer") for name in ("pissa", "mica", "orthogonal")),
    ],
)
@pytest.mark.parametrize("names", [("q",), ("q", "v")])
def test_refused_by_name(fields, reason, names):
    said = refusal(nn.Linear(6, 8), spec("interleaved", names, rank=2, **fields))
    assert said.startswith(f"'attn.qkv' (torch.nn.modules.linear.Linear): {reason}") and "name the fused layer itself" in said


def test_a_layout_that_does_not_fit_is_refused():
    assert "it has 9 rows, its class's layout" in refusal(nn.Linear(6, 9), spec("interleaved"))


def test_a_quantized_base():
    base = packed_linear("nf4")
    layout = FusedLayout(1, (("q", base.out_features // 2), ("v", base.out_features // 2)))
    slices = Slices(layout, ("v",))
    layer = fill(adapt(copy.deepcopy(base), LayerSpec(LoRAConfig(rank=2), 2, 16.0, slices=slices)))
    assert format_of(layer) is not None
    x = torch.randn(3, base.in_features)
    update = layer(x) - base(x)
    assert not update[:, : layout.rows // 2].any()
    torch.testing.assert_close(update[:, layout.rows // 2 :], 8 * x @ layer.lora_A.t() @ layer.lora_B.t(), atol=1e-4, rtol=1e-4)


def test_block_form_and_back():
    slices = Slices(LAYOUTS["interleaved"], ("q", "v"))
    B = torch.randn(slices.rows, 3)
    blocks = slices.placed(B)
    assert blocks.shape == (8, 6) and same_bits(slices.taken(blocks), B)
    blocks[2, 0] = 1  # a row of k
    with pytest.raises(ValueError, match="it has values outside the rows of q, v"):
        slices.taken(blocks)
    with pytest.raises(ValueError, match=r"\(8, 5\) is not B of q, v on 8 rows"):
        slices.taken(torch.zeros(8, 5))


def test_copies_pickles_and_compilers():
    _, layer = made()
    x = example()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.compile(layer, backend="eager", fullgraph=True)):
        torch.testing.assert_close(other(x), layer(x))
