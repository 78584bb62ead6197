"""Files of experts with shared factors or a rank of their own: PEFT, which has neither, reads them, and we read them back as they were."""

import copy
import json

import pytest
import torch
from peft import PeftModel

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, load_adapter, save_adapter
from lightning_lora.adapter_io.metadata import understood
from lightning_lora.layers.experts import LoRAExperts
from lightning_lora.layers.spec import LayerSpec
from tests.layers.experts import tiny_qwen3_moe
from tests.layers.mixtures import FQN, experts
from tests.parity.test_experts import QUICK, base_of, fill, near, outputs, pytestmark  # noqa: F401

SHARED = {"experts": {"shared_outer": True}}
DIVIDED = {"experts": {"rank_over_active": True}}
BOTH = {"experts": {"shared_outer": True, "rank_over_active": True}}
FIELDS = {"rank": 4, "alpha": 6, "modules_to_save": []}


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("options", [SHARED, DIVIDED, BOTH], ids=["shared", "divided", "both"])
def test_peft_computes_the_same_and_we_read_it_back(name, options, tmp_path):
    base, inputs, exact, weights = base_of(name)
    ours = fill(apply_lora(copy.deepcopy(base), LoRAConfig(**FIELDS, target_modules="all-linear", kind_options=options)))
    save_adapter(ours, tmp_path)
    wanted = outputs(ours, inputs)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    near(outputs(theirs.double() if exact else theirs, inputs), wanted, outputs(base, inputs), exact)
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(outputs(loaded, inputs), wanted)
    mine, others = get_lora_parameters(ours), get_lora_parameters(loaded)
    assert len(mine) == len(others) and all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))
    layer = next(module for module in ours.modules() if isinstance(module, LoRAExperts))
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    active = 4 // layer.rank
    assert said["r"] == 4 and sorted(said["rank_pattern"].values()) == ([layer.rank] * len(weights) if active > 1 else [])
    assert layer.rank == (4 if options is SHARED else 4 // base.config.num_experts_per_tok)


def test_pefts_copy_of_a_folder_loads_with_factors_for_each_expert(tmp_path):
    base, inputs, exact, _ = base_of("qwen3_moe")
    ours = fill(apply_lora(copy.deepcopy(base), LoRAConfig(**FIELDS, target_modules=["experts"], kind_options=SHARED)))
    save_adapter(ours, tmp_path / "ours")
    PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    loaded = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    near(outputs(loaded, inputs), outputs(ours, inputs), outputs(base, inputs), exact)
    assert not loaded.get_submodule(FQN).lora_config.kind_options
    with pytest.raises(ValueError, match=r"does not fit the LoRA this model has, in 2 places .*'shared_outer': True"):
        load_adapter(ours, tmp_path / "theirs")
    load_adapter(ours, tmp_path / "ours")


def test_factors_that_differ_are_never_folded():
    module = experts(tiny_qwen3_moe())
    spec = LayerSpec(LoRAConfig(rank=2, target_modules=["experts"], kind_options=SHARED), 2, 4.0, FQN)
    kind = type(experts(apply_lora(tiny_qwen3_moe(), spec.config)))
    one = torch.randn(2, 32)
    each = one.repeat(8, 1)
    assert torch.equal(kind.from_peft(module, "lora_A_gate_up_proj", each, spec), one)
    each[5, 3] += 1e-6
    with pytest.raises(ValueError, match="with shared_outer all experts have the same factor, and in the file they differ"):
        kind.from_peft(module, "lora_A_gate_up_proj", each, spec)
    other = torch.zeros(3, 32)
    assert kind.from_peft(module, "lora_A_gate_up_proj", other, spec) is other  # another shape is refused by who asks


def test_a_file_with_an_option_that_is_not_known_here_is_refused():
    config = LoRAConfig(kind_options={"experts": {"shared_inner": True}}).to_dict()
    with pytest.raises(ValueError, match=r"f: kind_options\['experts'\]\['shared_inner'\]=True is not known to kind 'experts'"):
        understood({"format_version": 1, "config": config, "base": None}, "f")
