"""Each layout against what the model does: without v's rows attention gives nothing, without q's it does not see k."""

import copy

import pytest
import torch
from torch import nn

from lightning_lora.utils.fused_layouts import FusedLayout, fused_layouts
from tests.layers.fused import GATED, IDS, MODELS, Attention, build


def projections(model):
    """Every fused projection with its parent and layout."""
    return [(parent, parent.get_submodule(name), layout) for parent in model.modules() for name, layout in fused_layouts(parent).items()]


def rows(layout, part):
    numbers = torch.arange(layout.rows).unflatten(0, (layout.groups, -1)).split([size for _, size in layout.parts], 1)
    return dict(zip(layout.names, numbers, strict=True))[part].flatten()


def set_rows(projection, layout, part, fill):
    index, transposed = rows(layout, part), not isinstance(projection, nn.Linear)
    weight = projection.weight.data.t() if transposed else projection.weight.data
    weight[index] = fill(weight[index])
    if projection.bias is not None:
        projection.bias.data[index] = fill(projection.bias.data[index])


def outputs(model):
    """What every module around a fused projection of attention returns."""
    seen = []
    hooks = [
        parent.register_forward_hook(lambda module, args, y: seen.append(y[0] if isinstance(y, tuple) else y))
        for parent, _, layout in projections(model)
        if "v_proj" in layout.names
    ]
    model(IDS)
    for hook in hooks:
        hook.remove()
    return seen


def changed(model, fills):
    """The first attention's output with some parts of its projection filled anew."""
    model = copy.deepcopy(model)
    _, projection, layout = next(each for each in projections(model) if "v_proj" in each[2].names)
    for part, fill in fills.items():
        set_rows(projection, layout, part, fill)
    return outputs(model)[0]


def noise(tensor):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel()), dtype=tensor.dtype)


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_q_k_and_v(name):
    model = build(name)
    found = projections(model)
    assert len([1 for _, _, layout in found if layout.names == ("q_proj", "k_proj", "v_proj")]) == 2
    zero = torch.zeros_like
    for module in model.modules():  # a norm of q or k, or an output bias, would hide what is tried
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    nothing = changed(model, {"v_proj": zero})  # some add their residual
    assert torch.allclose(changed(model, {"v_proj": zero, "q_proj": noise, "k_proj": noise}), nothing, atol=1e-12)
    assert not torch.allclose(changed(model, {}), nothing, atol=1e-3)
    alone = changed(model, {"q_proj": zero})
    assert torch.allclose(changed(model, {"q_proj": zero, "k_proj": noise}), alone, atol=1e-12)
    assert not torch.allclose(changed(model, {"k_proj": noise}), changed(model, {}), atol=1e-3)
    assert not torch.allclose(changed(model, {"q_proj": noise}), changed(model, {}), atol=1e-3)


@pytest.mark.parametrize("name", ["phi3", "falcon", "falcon-one-kv"])
def test_q_has_more_heads_than_k(name):
    layout = next(layout for _, _, layout in projections(build(name)) if "v_proj" in layout.names)
    sizes = dict(layout.parts)
    assert sizes["q_proj"] > sizes["k_proj"] == sizes["v_proj"]


@pytest.mark.parametrize("name", GATED)
def test_rows_of_gate_and_up(name):
    """Without up's rows nothing comes out; without gate's neither, since silu(0) is 0; with up doubled the output doubles."""
    model, x = build(name), torch.randn(2, 3, 32, dtype=torch.float64)
    parent, projection, layout = next(each for each in projections(model) if each[2].names == ("gate_proj", "up_proj"))
    before = parent(x)
    set_rows(projection, layout, "up_proj", lambda rows: rows * 2)
    torch.testing.assert_close(parent(x), 2 * before)
    set_rows(projection, layout, "gate_proj", torch.zeros_like)
    assert parent(x).abs().max() == 0


def test_timms_attention():
    attention = Attention().double()
    assert fused_layouts(attention) == {"qkv": FusedLayout(1, (("q_proj", 8), ("k_proj", 8), ("v_proj", 8)))}
    set_rows(attention.qkv, fused_layouts(attention)["qkv"], "v_proj", torch.zeros_like)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(attention(x), attention.proj.bias.expand(2, 3, 8))


def test_gpt2s_cross_attention_has_its_q_elsewhere():
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, add_cross_attention=True))
    assert fused_layouts(model.h[0].crossattention)["c_attn"] == FusedLayout(1, (("k_proj", 8), ("v_proj", 8)))


def test_a_class_of_the_same_name_elsewhere_has_no_layout():
    class Phi3MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Linear(4, 8)

    assert fused_layouts(Phi3MLP()) == {}
