"""Quantized bases and files: whose base an adapter is, exports, models that transformers loaded quantized."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    export_merged,
    get_lora_parameters,
    load_adapter,
    merge_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.adapter_io.fingerprint import base_identity
from lightning_lora.quantization.formats import format_of
from tests import tiny_lm
from tests.conftest import adapted, fill
from tests.model.quantizing import CONFIG, both_ways, each_format
from tests.quantized import packed_stack, plain_stack


@each_format
def test_a_quantized_copy_is_the_same_base(how: str, tmp_path: Any) -> None:
    """An adapter trained on it loads on the model it was packed from, and the other way round, merged or not."""
    model = adapted(packed_stack(how), **CONFIG)
    same = base_identity(plain_stack())
    assert base_identity(model) == same
    for quantized in ("dequantize", "requantize"):
        assert base_identity(merge_lora(model, quantized=quantized)) == same
        unmerge_lora(model)
    plain = load_adapter(plain_stack(), save_adapter(model, tmp_path / "packed"))
    assert torch.equal(plain.up.lora_B, model.up.lora_B)
    again = load_adapter(packed_stack(how), save_adapter(plain, tmp_path / "plain"))
    assert torch.equal(again.up.lora_B, model.up.lora_B)
    other = plain_stack()
    with torch.no_grad():
        other.up.weight.mul_(1.5)
    with pytest.raises(ValueError, match="was trained on another base"):
        load_adapter(other, tmp_path / "packed")


@each_format
def test_a_base_that_came_quantized_is_known_by_what_is_not_packed(how: str, tmp_path: Any) -> None:
    model = adapted(packed_stack(how), **CONFIG)
    for layer in (model.up, model.down):  # as a library's own loader leaves it
        del layer._unpacked_digest
    assert base_identity(model) == base_identity(copy.deepcopy(model))
    folder = save_adapter(model, tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"came quantized, so only what is not packed .* could be compared; that is the same"):
        load_adapter(plain_stack(), folder)
    other = plain_stack()
    with torch.no_grad():
        other.norm.weight.add_(1)
    with pytest.raises(ValueError, match="was trained on another base"):
        load_adapter(other, folder)


@each_format
@both_ways
def test_export_is_unpacked(how: str, quantized: Any, tmp_path: Any) -> None:
    """In 16 or 32 bit, merged; from a merged model what that merge made of it."""
    from safetensors.torch import load_file

    model = adapted(packed_stack(how), **CONFIG)
    exact = model.up.base_weight() + model.up.lora_delta()
    tensors = load_file(export_merged(model, tmp_path / "unmerged") / "model.safetensors")
    assert tensors.keys() == plain_stack().state_dict().keys()
    assert torch.allclose(tensors["up.weight"], exact, atol=1e-6)
    merge_lora(model, quantized=quantized)
    tensors = load_file(export_merged(model, tmp_path / "merged") / "model.safetensors")
    assert torch.equal(tensors["up.weight"], model.up.base_weight())


@pytest.mark.filterwarnings("ignore:.*come quantized.*", "ignore:Casting fp32 inputs")
@pytest.mark.parametrize("how", ["4bit", "8bit", "torchao"])
def test_a_model_that_transformers_loaded_quantized(how: str, tmp_path: Any) -> None:
    """Adapters go on it as it is; what is not packed tells which base it is; the export is a plain model."""
    import transformers
    from torchao.quantization import Int8WeightOnlyConfig

    folder = tiny_lm.save(tmp_path / "model")
    configs = {
        "4bit": lambda: transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "8bit": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
        "torchao": lambda: transformers.TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False)),
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=configs[how](), device_map="cpu")
    fill(apply_lora(model, LoRAConfig(rank=2, target_modules="all-linear"))).train()
    assert len([name for name, module in model.named_modules() if format_of(module) is not None]) == 2 * 7
    ids = torch.tensor([[2, 5, 9, 3]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in get_lora_parameters(model))
    with pytest.warns(UserWarning, match="came quantized"):
        load_adapter(tiny_lm.llama(), save_adapter(model, tmp_path / "adapter"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(export_merged(model, tmp_path / "export"))
    model.eval()
    with torch.no_grad():
        mine, theirs = model(input_ids=ids).logits.float(), plain(input_ids=ids).logits.float()
    assert (mine - theirs).norm() < 0.05 * theirs.norm()  # LLM.int8() packs its input too in evaluation, which is most of this
    assert (
        not hasattr(plain.config, "quantization_config") and hasattr(model.config, "quantization_config") and model.hf_quantizer is not None
    )
    files = {"config.json", "generation_config.json", "merge_certificate.json", "model.safetensors"}
    assert {file.name for file in (tmp_path / "export").iterdir()} == files
    merge_lora(model, quantized="dequantize")  # of every layer: nothing is left that is packed
    with torch.no_grad():
        merged = model(input_ids=ids).logits.float()
    plain = transformers.AutoModelForCausalLM.from_pretrained(export_merged(model, tmp_path / "merged"))
    assert torch.equal(plain(input_ids=ids).logits.float(), merged)


@pytest.mark.filterwarnings("ignore:.*come quantized.*", "ignore:Casting fp32 inputs", "ignore:MatMul8bitLt")
@pytest.mark.parametrize("how", ["4bit", "8bit"])
def test_export_of_a_model_whose_files_were_quantized(how: str, tmp_path: Any) -> None:
    import transformers

    packed = transformers.BitsAndBytesConfig(**{f"load_in_{how}": True})
    transformers.AutoModelForCausalLM.from_pretrained(
        tiny_lm.save(tmp_path / "plain"), quantization_config=packed, device_map="cpu"
    ).save_pretrained(tmp_path / "packed")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map="cpu")
    fill(apply_lora(model, LoRAConfig(rank=2, target_modules=["q_proj", "down_proj"]))).eval()
    ids = torch.tensor([[2, 5, 9, 3]])
    plain = transformers.AutoModelForCausalLM.from_pretrained(export_merged(model, tmp_path / "export"))
    with torch.no_grad():
        mine, theirs = model(input_ids=ids).logits.float(), plain(input_ids=ids).logits.float()
    assert (mine - theirs).norm() < 0.06 * theirs.norm()  # as above
