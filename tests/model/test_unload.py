"""Unloading: back to the base to the bit, dropped or merged as asked."""

import pytest
import torch

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, merge_lora, unload_lora
from tests.conftest import ALL, TinyModel, adapted, base_bits, snapshot


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_unload(make, ids, merged, tied):
    model, base = adapted(make(TinyModel, tied=tied), **ALL).eval(), make(TinyModel, tied=tied).eval()
    unmerged = model(ids)
    if merged:
        merge_lora(model, untie=tied)
    if merged:
        with pytest.raises(ValueError, match=r"say what to do with the update: unload_lora\(model, merged='keep'\).*merged='drop'"):
            unload_lora(model)
    assert unload_lora(model, merged="keep" if merged else None) is model
    assert {name: type(m) for name, m in model.named_modules()} == {name: type(m) for name, m in base.named_modules()}
    assert {name: sorted(m.__dict__) for name, m in model.named_modules()} == {name: sorted(m.__dict__) for name, m in base.named_modules()}
    assert list(model.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(model(ids), unmerged if merged else base(ids))
    assert (base_bits(model) == base_bits(base)) is not merged
    assert not any(p.requires_grad for p in model.parameters())
    unload_lora(model)
    apply_lora(model, config=LoRAConfig(**ALL))
    assert len(get_lora_parameters(model)) == 14


@pytest.mark.parametrize("merged", [False, True])
def test_unload_drops_or_keeps_as_it_is_told(make, merged):
    model, base = adapted(make(TinyModel), **ALL), make(TinyModel)
    if merged:
        merge_lora(model)
    else:
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"'embed' and 6 more are not merged.*call merge_lora\(model\) first"):
            unload_lora(model, merged="keep")
        with pytest.raises(ValueError, match="merged='both': choose 'keep' or 'drop'"):
            unload_lora(model, merged="both")
        assert snapshot(model) == before
    unload_lora(model, merged="drop")
    assert base_bits(model) == base_bits(base)
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]


def test_a_base_that_cannot_come_back_stays_merged(make):
    model = merge_lora(adapted(make(TinyModel), **ALL), reversible=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot be unmerged: no undo record was kept"):
        unload_lora(model, merged="drop")
    assert snapshot(model) == before


def test_unload_keeps_a_trained_head_trained(make):
    model = apply_lora(make(TinyModel), config=LoRAConfig(modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not unload_lora(model).lm_head.weight.count_nonzero()
