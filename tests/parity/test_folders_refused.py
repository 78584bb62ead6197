"""Of PEFT's adapter folders: refused by field or tensor is what we do not do, accepted what has no effect."""

import json

import pytest
from safetensors.torch import load_file, save_file

from lightning_lora import load_adapter
from tests.parity.snapshots import same_snapshot, snapshot

from .models import DEPRECATED_BY_PEFT, base, close, logits, randomise, theirs

pytestmark = pytest.mark.filterwarnings(DEPRECATED_BY_PEFT)


def test_the_pickle_format_is_refused(tmp_path):
    theirs(base("llama"), target_modules=["q_proj"]).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match=r"adapter_model\.bin"):
        load_adapter(base("llama"), tmp_path)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "another rank"])
def test_tensors_that_are_not_the_configs_are_refused(change, tmp_path):
    """The matching rules are PEFT's, but what counts is that the tensors and the config agree to the last one."""
    theirs(base("llama"), target_modules=["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors[name.replace("q_proj", "k_proj")] = tensors[name].clone()
    elif change == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    else:
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    model = base("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.[qk]_proj"):
        load_adapter(model, tmp_path)
    same_snapshot(before, snapshot(model))


REFUSED = [
    *(("init_lora_weights", init) for init in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga")),
    ("loftq_config", {"loftq_bits": 4, "loftq_iter": 1}),
    ("target_parameters", ["mlp.experts.gate_up_proj"]),
    ("trainable_token_indices", [1, 2]),
    ("trainable_token_indices", {"embed_tokens": [1]}),
    ("layer_replication", [[0, 1], [0, 2]]),
    ("alora_invocation_tokens", [5, 6]),
    ("megatron_config", {"num_layers": 2}),
    ("use_qalora", True),
    ("velora_config", {"num_groups": 2}),
    ("monteclora_config", {"num_samples": 2}),
    ("use_bdlora", {"nblocks": 2}),
    ("arrow_config", {"top_k": 1}),
    ("kasa_config", {"beta": 1e-4}),
    ("peft_type", "LOHA"),
    ("peft_type", "ADALORA"),
]


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=[f"{field}={json.dumps(value)[:20]}" for field, value in REFUSED])
def test_what_we_do_not_do_is_refused_by_field(field, value, tmp_path):
    theirs(base("llama"), target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    model = base("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=field):
        load_adapter(model, tmp_path)
    same_snapshot(before, snapshot(model))


INERT = {
    "inference_mode": False,
    "revision": "main",
    "base_model_name_or_path": "x/y",
    "peft_version": "0.17.0",
    "task_type": "CAUSAL_LM",
    "qalora_group_size": 8,
    "fan_in_fan_out": True,  # a layer knows how it stores its weight
    "eva_config": {"rho": 2.0},  # these three act only under their own init
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"direction": "ArB2r"},
}


@pytest.mark.parametrize("field", INERT)
def test_inert_fields_are_accepted(field, tmp_path):
    other = theirs(base("llama"), target_modules=["q_proj"])
    randomise(other)
    other.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: INERT[field]}))
    close(logits(load_adapter(base("llama"), tmp_path), "llama"), logits(other, "llama"))


def test_absent_fields_mean_pefts_defaults(tmp_path):
    """Folders of older versions lack most fields; PEFT's alpha is 8, not our 16."""
    other = theirs(base("llama"), target_modules=["q_proj"])
    randomise(other)
    other.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    close(logits(load_adapter(base("llama"), tmp_path), "llama"), logits(other, "llama"))


def test_an_unknown_field_is_not_passed_over_in_silence(tmp_path):
    theirs(base("llama"), target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"a_field_of_tomorrow": 3}))
    with pytest.warns(UserWarning, match="a_field_of_tomorrow"):
        load_adapter(base("llama"), tmp_path)
