"""Slices of fused projections in PEFT's files: plain LoRA on the whole projection there, with equal logits, and slices here."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    combine_adapters,
    compress_adapter,
    extract_adapter,
    load_adapter,
    load_adapters,
    lora_layers,
    merge_lora,
    save_adapter,
)
from tests.conftest import fill
from tests.layers.fused import IDS, MODELS, build

from .models import DEPRECATED_BY_PEFT, close, randomise, theirs

pytestmark = pytest.mark.filterwarnings(DEPRECATED_BY_PEFT)
CONFIGS = {
    "plain": LoRAConfig(rank=2, alpha=3, target_modules=["q_proj", "v_proj"]),
    "rslora": LoRAConfig(rank=2, alpha=3, target_modules=["q_proj", "v_proj"], scaling="rslora", rank_pattern={r".*\.1\..*q_proj": 3}),
    "dora": LoRAConfig(rank=2, alpha=3, target_modules=["k_proj"], variant="dora"),
}


def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("name", MODELS)
def test_peft_reads_ours_and_we_read_it_back(name, tmp_path):
    plain, config = build(name), CONFIGS["plain"]
    ours = fill(apply_lora(copy.deepcopy(plain), config))
    expected = logits(ours)
    assert (expected - logits(plain)).abs().max() > 1e-2
    save_adapter(ours, tmp_path / "ours")
    other = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").double().eval()
    close(logits(other), expected, 1e-6)
    again = load_adapter(copy.deepcopy(plain), tmp_path / "ours")
    close(logits(again), expected, 1e-6)
    assert all(layer.spec.slices.names == ("q_proj", "v_proj") for _, layer in lora_layers(again))
    apply_lora(again, config)  # the same adapter: changes nothing
    other.save_pretrained(tmp_path / "theirs")
    whole = load_adapter(copy.deepcopy(plain), tmp_path / "theirs")
    close(logits(whole), expected, 1e-6)
    assert all(layer.spec.slices is None and layer.rank == 4 for _, layer in lora_layers(whole))
    close(logits(merge_lora(ours)), expected, 1e-6)


@pytest.mark.parametrize("how", ["rslora", "dora"])
def test_other_scalings_and_variants(how, tmp_path):
    plain, config = build("gpt-neox"), CONFIGS[how]
    if how == "rslora":
        with pytest.raises(ValueError, match=r"q_proj, .*v_proj are slices of .* and share one rank and alpha; the patterns give \[3, 2\]"):
            apply_lora(copy.deepcopy(plain), config)
        config = LoRAConfig(**{**config.to_dict(), "rank_pattern": {r".*\.1\..*(q|v)_proj": 3}})
    ours = fill(apply_lora(copy.deepcopy(plain), config))
    save_adapter(ours, tmp_path)
    other = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).double().eval()
    close(logits(other), logits(ours), 1e-5)
    close(logits(load_adapter(copy.deepcopy(plain), tmp_path)), logits(ours), 1e-6)


def test_a_folder_of_peft_means_what_peft_adapts(tmp_path):
    """PEFT knows no slices: there q_proj matches nothing on Phi-3, and o_proj alone is adapted."""
    plain = build("phi3")
    other = theirs(copy.deepcopy(plain), target_modules=["q_proj", "v_proj", "o_proj"], r=2).eval()
    randomise(other)
    other.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(plain), tmp_path)
    close(logits(ours), logits(other), 1e-6)
    assert {name.rpartition(".")[2] for name, _ in lora_layers(ours)} == {"o_proj"}


def test_tensors_that_are_no_slices_are_refused(tmp_path):
    ours = fill(apply_lora(build("phi3"), CONFIGS["plain"]))
    save_adapter(ours, tmp_path)
    file, fields = tmp_path / "adapter_model.safetensors", json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["target_modules"] == [f"model.layers.{i}.self_attn.qkv_proj" for i in range(2)]
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = torch.randn_like(tensors[name])
    from safetensors import safe_open

    with safe_open(file, "pt") as reader:
        meta = reader.metadata()
    save_file(tensors, file, meta)
    with pytest.raises(ValueError, match=r"lora_B: it has values outside the rows of q_proj, v_proj"):
        load_adapter(build("phi3"), tmp_path)


def two_folders(tmp_path):
    plain, folders = build("phi3"), []
    for seed in (1, 2):
        model = fill(apply_lora(copy.deepcopy(plain), CONFIGS["plain"]), seed)
        folders.append(save_adapter(model, tmp_path / str(seed)))
    return plain, folders


def test_named_adapters_of_slices(tmp_path):
    plain, folders = two_folders(tmp_path)
    expected = [logits(load_adapter(copy.deepcopy(plain), folder)) for folder in folders]
    adapters = load_adapters(model := copy.deepcopy(plain), {str(i): folder for i, folder in enumerate(folders)})
    for i, wanted in enumerate(expected):
        adapters.use(str(i))
        close(logits(model), wanted, 1e-6)


def test_combined_and_compressed_folders_are_on_whole_layers(tmp_path):
    plain, folders = two_folders(tmp_path)
    expected = plain.state_dict()["model.layers.0.self_attn.qkv_proj.weight"].clone()
    for folder in folders:
        layer = load_adapter(copy.deepcopy(plain), folder).model.layers[0].self_attn.qkv_proj
        expected += layer.lora_delta().detach()
    combine_adapters(dict.fromkeys(folders, 1.0), tmp_path / "sum", method="cat")
    for folder in (tmp_path / "sum", compress_adapter(tmp_path / "sum", tmp_path / "svd", rank=8)):
        made = load_adapter(copy.deepcopy(plain), folder).model.layers[0].self_attn.qkv_proj
        assert made.spec.slices is None
        close(made.weight + made.lora_delta(), expected, 1e-5)


def test_a_difference_is_not_extracted_as_slices():
    with pytest.raises(ValueError, match=r"q_proj, .*v_proj: a difference is extracted from a layer's whole weight; name the fused layer"):
        extract_adapter(build("phi3"), build("phi3"), CONFIGS["plain"])
