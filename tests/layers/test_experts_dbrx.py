"""DBRX's experts, whose matrices lie one below another: each computes ``W_e + s·B_e·A_e``, and folders are read back."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig
from transformers.models.dbrx.modeling_dbrx import DbrxExpertGLU, DbrxExperts

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    disabled_lora,
    find_targets,
    load_adapter,
    merge_lora,
    save_adapter,
    unload_lora,
    unmerge_lora,
)
from lightning_lora.layers.adapting import refusal
from lightning_lora.layers.spec import LayerSpec
from tests.conftest import base_bits, fill, same_bits
from tests.sweep.archs import build
from tests.sweep.check import in_float64, outputs

E, H, W, N = 4, 12, 10, 9  # experts, hidden size, width, tokens
SHARED = {"experts": {"shared_outer": True}}
options = pytest.mark.parametrize("chosen", [{}, SHARED], ids=["each its own", "shared_outer"])


def made():
    model = nn.ModuleDict({"experts": DbrxExperts(DbrxFFNConfig(hidden_size=H, ffn_hidden_size=W, moe_num_experts=E))})
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3
    return model


def adapted(**fields):
    model = apply_lora(made(), LoRAConfig(rank=3, alpha=6, target_modules=["experts.mlp"], **fields))
    return fill(model, std=0.3), model["experts"].mlp


def arguments():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(N, H, generator=generator, dtype=torch.float64).requires_grad_()
    index = torch.stack([torch.randperm(E - 1, generator=generator)[:2] for _ in range(N)])  # the last expert gets no token
    return x, index, torch.rand(N, 2, generator=generator, dtype=torch.float64)


def dense(layer, factors):
    """Weight → (E, ffn, hidden), each matrix with its update; w2's matrices are (in, out)."""
    found = {}
    for name in layer.adapted:
        A, B = (factors[f"lora_{part}_{name}"] for part in "AB")
        A, B = A.unflatten(0, (-1, 3)), B.unflatten(0, (-1, H if name == "w2" else W))
        update = 2.0 * B @ A
        found[name] = layer._parameters[name].view(E, W, H) + (update.mT if name == "w2" else update)
    return found


def definition(layer, factors, x, index, share):
    weights = dense(layer, factors)
    gate, up, down = (weights[name] for name in ("w1", "v1", "w2"))

    def row(v, experts, shares):
        return sum(s * (F.silu(v @ gate[e].T) * (v @ up[e].T)) @ down[e] for e, s in zip(experts, shares, strict=True))

    return torch.stack([row(v, index[n], share[n]) for n, v in enumerate(x)])


@options
def test_outputs_and_gradients_are_those_of_the_definition(chosen):
    model, layer = adapted(kind_options=chosen)
    given = arguments()
    factors = {name: p.detach().clone().requires_grad_() for name, p in layer.lora_parameters().items()}
    found, wanted = model["experts"](*given), definition(layer, factors, *given)
    found = found.flatten(0, 1)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    mine = torch.autograd.grad((found * weights).sum(), [given[0], *layer.lora_parameters().values()])
    theirs = torch.autograd.grad((wanted * weights).sum(), [given[0], *factors.values()])
    torch.testing.assert_close(mine, theirs)
    assert all(gradient.any() for gradient in mine)


def test_shapes_are_per_expert_or_shared():
    shapes, shared = (
        {name: tuple(p.shape) for name, p in adapted(kind_options=chosen)[1].lora_parameters().items()} for chosen in ({}, SHARED)
    )
    up = {"A": (E * 3, H), "B": (E * W, 3)}
    assert shapes == {f"lora_{part}_{name}": up[part] for name in ("w1", "v1") for part in "AB"} | {
        "lora_A_w2": (E * 3, W),
        "lora_B_w2": (E * H, 3),
    }
    assert shared == shapes | {"lora_A_w1": (3, H), "lora_A_v1": (3, H), "lora_B_w2": (H, 3)}


@options
def test_start_disabling_merging_and_unloading(chosen):
    base, given = made(), arguments()
    wanted, bits = base["experts"](*given), base_bits(base)
    model = apply_lora(copy.deepcopy(base), LoRAConfig(rank=3, alpha=6, target_modules=["experts.mlp"], kind_options=chosen))
    torch.testing.assert_close(model["experts"](*given), wanted, rtol=0, atol=0)
    layer, unmerged = model["experts"].mlp, fill(model, std=0.3)["experts"](*given)
    with disabled_lora(model):
        assert same_bits(model["experts"](*given), wanted)
    exact = dense(layer, layer.lora_parameters())
    merge_lora(model)
    torch.testing.assert_close(model["experts"](*given), unmerged)
    for name, matrices in exact.items():
        torch.testing.assert_close(layer._parameters[name].view(E, W, H), matrices)
    unmerge_lora(model)
    assert base_bits(model) == bits and same_bits(model["experts"](*given), unmerged)
    unload_lora(model)
    assert type(model["experts"].mlp) is DbrxExpertGLU and base_bits(model) == bits


def test_dropout_is_on_the_input_of_each_a_and_off_in_evaluation():
    _, layer = adapted(dropout=0.4)
    x, views = arguments()[0], [layer._parameters[name].view(E, W, H)[2] for name in layer.adapted]
    torch.manual_seed(1)
    found = layer.train()(x, *views)
    torch.manual_seed(1)
    (A1, B1), (A2, B2), (A3, B3) = ([factor[2] for factor in part.factor_matrices()] for part in layer.by_weight().values())
    # In the order in which the module multiplies.
    gate = x @ views[0].T + 2.0 * F.dropout(x, 0.4) @ A1.T @ B1.T
    h = F.silu(gate) * (x @ views[1].T + 2.0 * F.dropout(x, 0.4) @ A2.T @ B2.T)
    torch.testing.assert_close(found, h @ views[2] + 2.0 * F.dropout(h, 0.4) @ A3.T @ B3.T)
    quiet = layer.eval()(x, *views)
    layer.lora_dropout.p = 0.0
    assert same_bits(quiet, layer.train()(x, *views)) and not torch.allclose(quiet, found)


@pytest.mark.parametrize("bad", [lambda w: w[3:13], lambda w: w[10:20].clone(), lambda w: w[:20]], ids=["between experts", "copy", "two"])
def test_a_matrix_that_is_no_experts_part_of_the_weight_raises(bad):
    _, layer = adapted()
    with pytest.raises(ValueError, match="a matrix that is no view of their weight"):
        layer(torch.randn(2, H, dtype=torch.float64), *(bad(layer._parameters[name]) for name in layer.adapted))


def test_what_does_not_fit_is_refused_by_name():
    def message(**fields):
        return refusal(made()["experts"].mlp, LayerSpec(LoRAConfig(**fields), 2, 4.0, "experts.mlp"))

    assert message() is None and message(dropout=0.1) is None and message(variant="lora_fa") is None
    assert "w1: variant='dora' scales a layer's outputs" in message(variant="dora")
    assert "variant='vera' shares" in message(variant="vera")
    assert "w1: init='pissa' pairs" in message(init="pissa")


@pytest.mark.filterwarnings("ignore:rank=2 of")
@options
def test_a_model_saved_and_loaded_with_the_warning_that_peft_reads_no_such_folder(chosen, tmp_path):
    base, inputs, exact = in_float64(*build("dbrx"))
    assert exact
    config = LoRAConfig(rank=2, target_modules="all-linear", modules_to_save=[], kind_options=chosen)
    model = fill(apply_lora(copy.deepcopy(base), config), std=0.1)
    assert [t.fqn for t in find_targets(base, config).targets if "experts" in t.fqn] == [
        f"transformer.blocks.{i}.ffn.experts.mlp" for i in (0, 1)
    ]
    with pytest.warns(UserWarning, match=r"PEFT 0.21 cannot adapt 'transformer.blocks.0.ffn.experts.mlp' \(DbrxExpertGLU\)"):
        save_adapter(model, tmp_path)
    wanted = outputs(model, inputs)
    assert not torch.equal(wanted, outputs(base, inputs))
    assert torch.equal(outputs(load_adapter(copy.deepcopy(base), tmp_path), inputs), wanted)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_checkpointing_with_dropout_gives_the_same_gradients():
    def gradients(checkpointed):
        base, inputs = build("dbrx")
        model = fill(apply_lora(base, LoRAConfig(rank=2, dropout=0.3, target_modules=["experts.mlp"])), std=0.1).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        model(**inputs).logits.square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == 12 and all(gradient.any() for gradient in plain)
    torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("autocast", [False, True])  # over weights in bf16: over others DBRX's own code raises
def test_in_bf16_adapters_stay_in_float32(autocast):
    base, inputs = build("dbrx")
    model = fill(apply_lora(base, LoRAConfig(rank=2, target_modules=["experts.mlp"])), std=0.1)
    wanted = model(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = model.bfloat16()(**inputs).logits
    assert (found.float() - wanted).norm() < 0.02 * wanted.norm()
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_peft_has_no_way_to_adapt_them():
    base, inputs = build("dbrx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(base, LoraConfig(r=2, target_modules=[], target_parameters=["experts.mlp.w1", "experts.mlp.w2"]))
    with pytest.raises(AttributeError, match="'ParamWrapper' object has no attribute 'v1'"):
        theirs(**inputs)


def test_rank_over_active_is_that_of_the_models_config():
    base, _ = build("dbrx")
    options = {"experts": {"rank_over_active": True}}
    report = find_targets(base, LoRAConfig(rank=4, target_modules=["experts.mlp", "Wqkv"], kind_options=options))
    assert {target.fqn.rpartition(".")[2]: target.rank for target in report.targets} == {"mlp": 2, "Wqkv": 4}
