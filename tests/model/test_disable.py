"""The base alone while ``disabled_lora`` is on: bit for bit, in every kind, variant and composition, and the adapters right after it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    compile_layers,
    disabled_lora,
    get_lora_parameters,
    merge_lora,
    quantize_base,
    unfuse,
    unload_lora,
    unmerge_lora,
)
from lightning_lora.layers.base import lora_layers
from lightning_lora.model.fuse import GatedMLP, Sharing
from lightning_lora.ops import backends
from lightning_lora.registry import VARIANTS
from tests import tiny_lm
from tests.conftest import fill
from tests.family import CASES, packed

IDS = torch.arange(12).view(2, 6)
ALL_CASES = {**CASES, "linear, int8": packed("int8")}


def llama(quantize: str | None = None) -> Any:
    model = tiny_lm.llama()
    return model if quantize is None else quantize_base(model, quantize)


def adapted(model: Any, **fields: Any) -> Any:
    return fill(apply_lora(model, config=LoRAConfig(rank=3, **{"target_modules": "all-linear", "dropout": 0.3, **fields})))


def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore:rank=4 of '0' is above")
@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("kind", ALL_CASES)
def test_every_kind_and_variant_is_its_base(kind: str, variant: str) -> None:
    case = ALL_CASES[kind]
    model, x = nn.Sequential(case.base()), case.x()
    base = model(x)
    dropout = 0.0 if "embedding" in kind else 0.3
    config = LoRAConfig(rank=case.rank, target_modules=["0"], variant=variant, dropout=dropout, **case.fields)
    try:
        fill(apply_lora(model, config=config)).train()
    except ValueError as error:  # refused for some kinds; tests/test_family.py has which
        assert variant in ("adalora", "lora_bias", "lora_xs", "vera") or kind.startswith("experts"), error
        return
    with disabled_lora(model):
        assert torch.equal(model(x), base)
    assert not torch.equal(model(x), base)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "alone"])
@pytest.mark.parametrize("variant", ["plain", "dora"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_model_whose_layers_share_work_is_its_base(quantize: str | None, variant: str, shared: bool) -> None:
    model = llama(quantize)
    base = logits(model)
    adapted(model, variant=variant)
    assert any(isinstance(module, Sharing) for module in model.modules())
    if not shared:
        unfuse(model)
    with disabled_lora(model):
        assert torch.equal(logits(model), base)
    assert not torch.equal(logits(model), base)


def test_a_gated_mlp_is_not_one_operation_then(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    base = logits(model)
    adapted(model)
    assert any(isinstance(module, GatedMLP) for module in model.modules())
    monkeypatch.setattr(backends, "worth_kernels", lambda x: True)  # as on a GPU, where its kernels would be called
    with disabled_lora(model):
        assert torch.equal(logits(model), base)


def test_compiled_blocks_are_compiled_once_more_and_no_more_than_that() -> None:
    model, counter = llama(), CompileCounterWithBackend("aot_eager")
    base = copy.deepcopy(model).eval()
    compile_layers(base, backend="aot_eager")
    adapted(model, dropout=0.0).eval()
    compile_layers(model, backend=counter)
    with torch.no_grad():
        expected, first = logits(base), logits(model)
        counts = [counter.frame_count]
        for _ in range(3):
            with disabled_lora(model):
                assert torch.equal(logits(model), expected)
            assert torch.equal(logits(model), first)
            counts.append(counter.frame_count)
    assert not torch.equal(first, expected)
    assert counts[1:] == [2 * counts[0]] * 3


def test_no_gradient_reaches_the_adapters_and_the_inputs_is_the_bases() -> None:
    model = llama()
    inputs = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (expected,) = torch.autograd.grad(model(inputs_embeds=inputs).logits.sum(), inputs)
    adapted(model)
    with disabled_lora(model):
        model(inputs_embeds=inputs).logits.sum().backward()
    assert inputs.grad is not None and torch.equal(inputs.grad, expected)
    assert all(p.grad is None for p in get_lora_parameters(model))
    model(inputs_embeds=inputs).logits.sum().backward()
    assert all(p.grad is not None for p in get_lora_parameters(model))


def test_it_nests_and_ends_with_an_exception() -> None:
    model = llama()
    base = logits(model)
    adapted(model, dropout=0.0)
    on = logits(model)
    with pytest.raises(RuntimeError, match="stop"), disabled_lora(model):
        with disabled_lora(model.model.layers[0]):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base), "the outer one goes on"
        with pytest.raises(KeyError), disabled_lora(model):
            raise KeyError
        assert torch.equal(logits(model), base)
        raise RuntimeError("stop")
    assert torch.equal(logits(model), on)


def test_other_models_and_other_parts_stay_as_they_are() -> None:
    model, other = adapted(llama(), dropout=0.0), adapted(llama(), dropout=0.0)
    on = logits(model)
    with disabled_lora(model):
        assert torch.equal(logits(other), on)
        copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), on), "nobody would switch a copy on again"
    with disabled_lora(model.model.layers[0]):
        mixed = logits(model)
    unload_lora(other.model.layers[0])
    assert torch.equal(mixed, logits(other))


def test_unloaded_within_it_is_a_plain_model() -> None:
    model = adapted(llama())
    with disabled_lora(model):
        unload_lora(model)
    plain = llama()
    assert [set(vars(ours)) for ours in model.modules()] == [set(vars(theirs)) for theirs in plain.modules()]


def state(model: nn.Module) -> list[tuple[bool, bool]]:
    return [(layer.merged, layer.disabled) for _, layer in lora_layers(model)]


def test_a_merged_model_is_refused_and_a_disabled_one_is_not_merged() -> None:
    model = adapted(llama())
    with disabled_lora(model), pytest.raises(ValueError, match=r"q_proj' cannot be merged: .*outside of disabled_lora"):
        merge_lora(model)
    merge_lora(model.model.layers[1])
    before = state(model)
    with (
        pytest.raises(ValueError, match=r"'model\.layers\.1\.self_attn\.q_proj' is merged.*call unmerge_lora\(model\)"),
        disabled_lora(model),
    ):
        pass
    assert state(model) == before and (True, False) in before and (False, False) in before
    with disabled_lora(unmerge_lora(model)):
        assert set(state(model)) == {(False, True)}


def test_a_model_without_lora_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no LoRA layers to disable; call apply_lora"), disabled_lora(llama()):
        pass


FULL = {
    "lm_head.weight": {"modules_to_save": ["lm_head"]},
    "model.layers.0.self_attn.o_proj.bias": {"target_modules": ["q_proj"], "bias": "all"},
}


@pytest.mark.parametrize("name", FULL)
def test_what_trains_in_full_is_refused_as_its_start_is_gone(name: str) -> None:
    model = tiny_lm.llama()
    model.model.layers[0].self_attn.o_proj = nn.Linear(32, 32)
    adapted(model, **FULL[name])
    refusal = f"'{name}' trains beside the adapters, .*Give the part of the model without it"
    with pytest.raises(ValueError, match=refusal), disabled_lora(model):
        pass
    if name.startswith("lm_head"):
        with disabled_lora(model.model):
            assert {off for _, off in state(model)} == {True}
    assert {off for _, off in state(model)} == {False}
