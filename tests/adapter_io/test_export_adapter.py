"""An exported adapter means the same to each server as the model it came from, or is refused by name."""

import json
import re
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_lora import LoRAConfig, apply_lora, export_adapter, load_adapter, save_adapter
from lightning_lora.adapter_io.export_targets import TARGETS
from lightning_lora.adapter_io.files import AdapterFolder
from lightning_lora.adapter_io.one_rank import layers_of, one_rank
from lightning_lora.layers import lora_layers
from tests.adapter_io.servers import READERS, largest_difference
from tests.parity.models import DEPRECATED_BY_PEFT, base, logits, randomise

pytestmark = pytest.mark.filterwarnings(DEPRECATED_BY_PEFT, "ignore:Setting `save_embedding_layers`")
QV = ["q_proj", "v_proj"]
CONFIGS = {
    "plain": {"target_modules": QV, "rank": 8},
    "rslora": {"target_modules": QV, "scaling": "rslora", "rank": 16, "alpha": 16},
    "all-linear": {"target_modules": "all-linear", "rank": 3, "alpha": 5},
    "patterns": {"target_modules": [*QV, "down_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 12}, "alpha_pattern": {"v_proj": 3}},
    "embedding": {"target_modules": [*QV, "embed_tokens"], "scaling": "rslora"},
    "some-layers": {"target_modules": QV, "layers": [1]},
    "half": {"target_modules": ["v_proj", "q_proj", "gate_proj"], "rank": 2},
    "pissa": {"target_modules": QV, "init": "pissa", "rank": 4},
    "lora-fa": {"target_modules": QV, "variant": "lora_fa", "alpha": 7},
}


def adapted(config, name="llama"):
    model = apply_lora(base(name), LoRAConfig(**config))
    randomise(model)
    return model


def updates(model):
    """Layer → its update in float64, as it would be merged."""
    return {name: layer.merge_delta().detach().double() for name, layer in lora_layers(model)}


@pytest.mark.parametrize("target", ["vllm", "sglang", "llama.cpp"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_server_computes_the_same(config, target, tmp_path):
    model = adapted(CONFIGS[config])
    folder = export_adapter(model, tmp_path / "out", target=target, base="owner/name")
    theirs = READERS[target](folder)
    theirs = {name: update.T if name.endswith("embed_tokens") else update for name, update in theirs.items()}
    assert largest_difference(updates(model), theirs) < 1e-6


@pytest.mark.parametrize("target", ["peft", "vllm", "sglang", "llama.cpp"])
def test_peft_and_load_adapter_read_every_export(target, tmp_path):
    config = {**CONFIGS["patterns"], "scaling": "rslora", "target_modules": [*QV, "down_proj", "embed_tokens"]}
    model = adapted(config)
    wanted, folder = logits(model, "llama"), export_adapter(model, tmp_path / "out", target=target, base="owner/name")
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(base("llama"), folder).eval(), "llama"), wanted)
    torch.testing.assert_close(logits(load_adapter(base("llama"), folder).eval(), "llama"), wanted)


def test_the_reference_tells_a_plain_copy_from_an_export(tmp_path):
    """Without the export two of the servers would compute another model from this adapter, and the third would stop."""
    model = adapted({**CONFIGS["patterns"], "scaling": "rslora"})
    folder = save_adapter(model, tmp_path / "plain")
    assert largest_difference(updates(model), READERS["llama.cpp"](folder)) > 0.01
    for stops in ("vllm", "sglang"):
        with pytest.raises(AssertionError):
            READERS[stops](folder)


@pytest.mark.filterwarnings("ignore:rank=.* is above min")
@pytest.mark.parametrize(("rank", "padded"), [(1, 8), (8, 8), (9, 16), (257, 320)])
def test_vllm_gets_a_rank_that_it_can_be_started_with(rank, padded, tmp_path):
    folder = export_adapter(adapted({"target_modules": QV, "rank": rank}), tmp_path / "out", target="vllm", base="b")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == padded
    assert f"--max-lora-rank {padded} " in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="rank 513 is above the largest that vllm serves, 512"):
        export_adapter(adapted({"target_modules": QV, "rank": 513}), tmp_path / "large", target="vllm", base="b")


def test_numbers_stay_where_a_server_needs_no_change(tmp_path):
    model = adapted({"target_modules": QV, "rank": 8, "alpha": 16})
    for target in ("peft", "vllm", "llama.cpp"):
        folder = export_adapter(model, tmp_path / target, target=target, base="b")
        saved = load_file(save_adapter(model, tmp_path / "plain", overwrite=True) / "adapter_model.safetensors")
        there = load_file(folder / "adapter_model.safetensors")
        assert saved.keys() == there.keys() and all(torch.equal(saved[name], there[name]) for name in saved)
        assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 16


REFUSED = {
    "dora": ("llama", {"target_modules": QV, "variant": "dora"}, "DoRA's magnitude"),
    "vera": ("llama", {"target_modules": ["q_proj"], "variant": "vera"}, "VeRA's vectors"),
    "saved": ("llama", {"target_modules": QV, "modules_to_save": ["model.norm"]}, r"norm.weight' has a tensor trained in full"),
    "bias": ("llama-bias", {"target_modules": QV, "bias": "lora_only"}, r"bias' has a tensor trained in full"),
    "head": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}, "classifier.*trained in full"),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"]}, r"stored as \(in, out\)"),
    "positions": ("gpt2", {"target_modules": ["wpe"]}, "on an embedding that is not the token embedding"),
}


@pytest.mark.parametrize("target", ["vllm", "sglang", "llama.cpp"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_a_server_cannot_compute_is_refused(case, target, tmp_path):
    name, config, words = REFUSED[case]
    model = adapted(config, name)
    with pytest.raises(ValueError, match=rf"{words}.* which {re.escape(target)} does not load; merge it"):
        export_adapter(model, tmp_path / "out", target=target, base="b")
    assert not (tmp_path / "out").exists()
    export_adapter(model, tmp_path / "peft", base="b")  # which takes it


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_proj"], "has an adapter on q_proj and none on k_proj"),
        (["k_proj", "v_proj"], "none on q_proj"),
        (["up_proj"], "none on gate_proj"),
    ],
)
def test_sglang_needs_whole_stacks(targets, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        export_adapter(adapted({"target_modules": targets}), tmp_path / "out", target="sglang", base="b")


def test_sglang_leaves_latent_attention_alone(tmp_path):
    """DeepSeek's q_proj is computed by itself there."""
    names = {"q_proj": "q_proj", "kv_b_proj": "v_proj"}
    tensors = load_file(save_adapter(adapted({"target_modules": QV}), tmp_path / "saved") / "adapter_model.safetensors")
    renamed = {name.replace(old, new): tensor for name, tensor in tensors.items() for new, old in names.items() if old in name}
    layers, _ = layers_of(renamed, {"r": 8, "lora_alpha": 16}, "here")
    found = one_rank(AdapterFolder(renamed, {"target_modules": [*names]}, None, None), layers, TARGETS["sglang"], None)
    assert found.tensors.keys() == renamed.keys()


def test_sglang_reads_numbered_layers_only(tmp_path):
    with pytest.raises(ValueError, match=r"sglang does not look at 'transformer.h.0.mlp.c_fc'|stored as"):
        export_adapter(adapted({"target_modules": ["c_fc"]}, "gpt2"), tmp_path / "out", target="sglang", base="b")


def test_pefts_own_folders_export_too(tmp_path):
    theirs = peft.get_peft_model(
        base("llama"), peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=".*(q|v)_proj", alpha_pattern={"q_proj": 2})
    )
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    for target, reader in READERS.items():
        folder = export_adapter(tmp_path / "theirs", tmp_path / target, target=target, base="b")
        mine = load_adapter(base("llama"), tmp_path / "theirs")
        assert largest_difference(updates(mine), reader(folder)) < 1e-6
        torch.testing.assert_close(logits(load_adapter(base("llama"), folder), "llama"), logits(mine, "llama"))


def test_auto_classes_find_the_base(tmp_path):
    base("llama").save_pretrained(tmp_path / "base")
    model = adapted({"target_modules": QV})
    folder = export_adapter(save_adapter(model, tmp_path / "saved"), tmp_path / "out", base=str(tmp_path / "base"))
    found = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(found.eval(), "llama"), logits(model, "llama"))
    by_transformers = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(by_transformers.eval(), "llama"), logits(model, "llama"))
    # llama.cpp's converter reads the base's config by the same field
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert AutoConfig.from_pretrained(named).architectures == ["LlamaForCausalLM"]


def test_a_base_that_is_not_named_is_told(tmp_path):
    model = adapted({"target_modules": QV})
    with pytest.warns(UserWarning, match="does not name its base"):
        folder = export_adapter(model, tmp_path / "out", target="vllm")
    assert "not known" in (folder / "README.md").read_text()


def test_the_card_says_what_it_is(tmp_path):
    model = adapted({"target_modules": QV, "rank": 8, "alpha": 16})
    folder = export_adapter(model, tmp_path / "out", target="vllm", base="owner/name", data="TREC", metrics={"accuracy": 0.844})
    card = (folder / "README.md").read_text()
    for part in (
        'base_model: "owner/name"',
        "pipeline_tag",
        "Trained on: TREC",
        "| accuracy | 0.844 |",
        "fingerprint `",
        '"r": 8',
        "vllm serve",
    ):
        assert part in card
    assert str(tmp_path) not in card


def test_diffusers_gets_its_file(tmp_path):
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "head": nn.Linear(4, 2)})
    model = apply_lora(model, LoRAConfig(target_modules=["conv", "head"], rank=1, rank_pattern={"head": 2}, alpha=6, scaling="rslora"))
    randomise(model)
    with pytest.raises(ValueError, match=r"component is not set, and the base's class \(ModuleDict\) does not tell it"):
        export_adapter(model, tmp_path / "out", target="diffusers", base="b")
    folder = export_adapter(model, tmp_path / "out", target="diffusers", base="b", component="unet")
    assert {file.name for file in folder.iterdir()} == {"README.md", "pytorch_lora_weights.safetensors"}
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {2}  # one rank
    for name, update in updates(model).items():  # scaling 1: no config goes along
        a, b = (tensors[f"unet.{name}.lora_{part}.weight"].double() for part in "AB")
        torch.testing.assert_close((b.flatten(1) @ a.flatten(1)).view_as(update), update, atol=1e-6, rtol=1e-6)


def test_wrong_input(tmp_path):
    model = adapted({"target_modules": QV})
    saved = save_adapter(model, tmp_path / "saved")
    file = tmp_path / "last.ckpt"
    file.write_bytes(b"")
    for arguments, words in (
        ((model, tmp_path / "o", "vlm"), r"target='vlm': choose one of peft, vllm"),
        ((file, tmp_path / "o", "peft"), r"last.ckpt' is a file; give an adapter folder, or load the checkpoint into its model"),
        ((tmp_path / "none", tmp_path / "o", "peft"), "there is no such adapter folder"),
        ((model, saved, "vllm"), "is not empty; choose another or pass overwrite=True"),
        ((base("llama"), tmp_path / "o", "vllm"), "has no LoRA layers to save"),
    ):
        with pytest.raises(ValueError, match=words):
            export_adapter(arguments[0], arguments[1], target=arguments[2], base="b")
    with pytest.raises(ValueError, match="component='unet': vllm loads no pipelines"):
        export_adapter(model, tmp_path / "o", target="vllm", base="b", component="unet")
    assert not (tmp_path / "o").exists()
    before = (saved / "adapter_model.safetensors").read_bytes()
    (saved / "adapter_model.safetensors").write_bytes(before[:-1] + b"\x01")
    with pytest.raises(ValueError, match="damaged"):
        export_adapter(saved, tmp_path / "o", target="vllm", base="b")
    shutil.rmtree(saved)


def test_every_target_says_how_it_is_loaded():
    for name, target in TARGETS.items():
        assert "{folder}" in target.load, name
        assert not target.ranks or list(target.ranks) == sorted(target.ranks)


def test_a_copy_of_the_embedding_that_peft_wrote(tmp_path):
    """Servers skip it without a word. Equal to the base's, it goes when the adapter is loaded; then the export has no use for it."""
    theirs = peft.get_peft_model(base("llama"), peft.LoraConfig(r=4, target_modules=[*QV, "embed_tokens"]))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"base_layer.weight' has a base weight beside it .*load_adapter, then export the model"):
        export_adapter(tmp_path / "theirs", tmp_path / "out", target="vllm", base="b")
    model = load_adapter(base("llama"), tmp_path / "theirs")
    found = READERS["vllm"](export_adapter(model, tmp_path / "out", target="vllm", base="b"))
    assert "model.embed_tokens" in found


def test_a_bias_of_a_factor_is_no_factor():
    tensors = {f"base_model.model.fc.lora_{name}": torch.ones(2, 2) for name in ("A.weight", "B.default.weight", "B.bias")}
    layers, others = layers_of(tensors, {}, "here")
    assert [*layers["fc"].tensors] == ["A", "B"] and others == ["base_model.model.fc.lora_B.bias"]
    with pytest.raises(ValueError, match="here: 'fc' has no lora_B; the adapter is not whole"):
        layers_of({"base_model.model.fc.lora_A.weight": torch.ones(2, 2)}, {}, "here")
