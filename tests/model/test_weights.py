"""Models on the meta device: memory, the values of a new model, and weights one by one (several processes: tests/distributed)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, load_base, lora_layers, merge_lora, quantize_base
from lightning_lora.adapter_io.fingerprint import base_identity
from lightning_lora.model.weight_folder import WeightFolder
from lightning_lora.model.weights import materialize, on_meta
from tests.conftest import same_bits
from tests.layers.experts import tiny_qwen3_moe
from tests.quantized import Stack, inputs, plain_stack

CONFIG = LoRAConfig(rank=4, alpha=8, target_modules=["up", "down"])
LLAMA = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
    tie_word_embeddings=True,
)  # fmt: skip


def meta_stack() -> Stack:
    with torch.device("meta"):
        return Stack()


def adapted(model: nn.Module, how: str | None) -> nn.Module:
    if how is not None:
        quantize_base(model, how, targets=["up", "down"])
    return apply_lora(model, CONFIG)


@pytest.mark.parametrize("how", [None, "fp8", "nf4"])
def test_a_model_that_came_late_is_the_model(how: str | None) -> None:
    """The same outputs and gradients as of one that had its weights when it was quantized and adapted; the same base."""
    plain = plain_stack()
    there, late = adapted(plain_stack(), how), adapted(meta_stack(), how)
    load_base(late, plain.state_dict().__getitem__)
    assert not on_meta(late)
    for (_, mine), (_, theirs) in zip(lora_layers(late), lora_layers(there), strict=True):
        assert mine.lora_A.std() > 0 and not mine.lora_B.any()
        for name, parameter in mine.lora_parameters().items():
            parameter.data.copy_(theirs.lora_parameters()[name])
    outputs = [model.train()(inputs()) for model in (late, there)]
    assert same_bits(*outputs)
    for output in outputs:
        output.square().mean().backward()
    for mine, theirs in zip(get_lora_parameters(late), get_lora_parameters(there), strict=True):
        assert same_bits(mine.grad, theirs.grad)
    assert base_identity(late) == base_identity(there) == base_identity(plain)


def test_weights_are_asked_for_one_by_one() -> None:
    """Each once, and none is kept beside what the layer stores."""
    plain, asked = plain_stack().state_dict(), []

    def read(name: str) -> Tensor:
        asked.append(name)
        return plain[name].clone()

    late = load_base(adapted(meta_stack(), "fp8"), read)
    assert sorted(asked) == sorted(plain)
    assert late.up.weight.dtype == torch.uint8 and late.up.weight_scale.device.type == "cpu"


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_of_safetensors(sharded: bool, tmp_path: Path) -> None:
    plain = plain_stack().state_dict()
    if sharded:
        files = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(plain)}
        for file in set(files.values()):
            save_file({name: plain[name] for name in plain if files[name] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        save_file(plain, tmp_path / "model.safetensors")
    late = load_base(meta_stack(), tmp_path)
    assert all(same_bits(tensor, plain[name]) for name, tensor in late.state_dict().items())
    with pytest.raises(ValueError, match=r"weights='\S+none' has neither model.safetensors.index.json nor model.safetensors"):
        WeightFolder(tmp_path / "none")


def test_a_transformers_model(tmp_path: Path) -> None:
    """Norms and rotary frequencies of a new model; tied weights stay tied and are read once."""
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LLAMA).eval()
    with torch.device("meta"):
        late = LlamaForCausalLM(LLAMA).eval()
    assert materialize(late, torch.device("cpu")) == []
    assert (late.model.norm.weight == 1).all() and same_bits(late.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert late.lm_head.weight is late.model.embed_tokens.weight
    plain.save_pretrained(tmp_path)
    load_base(late, tmp_path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert same_bits(late(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_what_has_values_keeps_them() -> None:
    model = meta_stack()
    model.head = nn.Linear(128, 128)
    model.register_parameter("own", nn.Parameter(torch.empty(3, device="meta")))
    before = model.head.weight.detach().clone()
    assert materialize(model, torch.device("cpu")) == [""]  # `own` of the root: nothing says what it begins as
    assert same_bits(model.head.weight, before)


def test_what_computes_from_the_weight_follows_it() -> None:
    """DoRA's magnitudes are the norms of the weights that came."""
    config = LoRAConfig(rank=4, alpha=8, target_modules=["up"], variant="dora")
    there, late = apply_lora(plain_stack(), config), apply_lora(meta_stack(), config)
    load_base(late, plain_stack().state_dict().__getitem__)
    torch.testing.assert_close(late.up.lora_magnitude_vector, there.up.lora_magnitude_vector)


def test_refusals() -> None:
    plain = plain_stack().state_dict()

    def lacking(name: str) -> Tensor:
        return {**plain, "down.weight": torch.ones(2, 2)}[name] if name != "norm.bias" else {}[name]

    with pytest.raises(ValueError, match=r"weights has no 'norm.bias', which LayerNorm needs"):
        load_base(meta_stack(), lacking)
    plain["norm.bias"] = torch.zeros(128)
    with pytest.raises(ValueError, match=r"'down.weight' has shape \(2, 2\) in weights, here \(128, 256\)"):
        load_base(quantize_base(meta_stack(), "fp8"), {**plain, "down.weight": torch.ones(2, 2)}.__getitem__)
    with pytest.raises(ValueError, match=r"'up' \(Float8Linear\) is quantized already, and takes no plain weight"):
        load_base(quantize_base(plain_stack(), "fp8"), plain.__getitem__)
    with pytest.raises(ValueError, match=r"'up' \(Linear\) is on the meta device, where only 'fp8' and 'nf4' quantize, and linears only"):
        quantize_base(meta_stack(), "int8")
    merged = merge_lora(apply_lora(plain_stack(), CONFIG))
    with pytest.raises(ValueError, match=r"'up' is merged; call unmerge_lora\(model\) first"):
        load_base(merged, plain.__getitem__)


@pytest.mark.parametrize("how", [None, "fp8"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_codes_are_no_weights(how: str | None, dtype: torch.dtype) -> None:
    """A quantized model's folder has codes of the weight's own shape, and their scales elsewhere."""
    plain = plain_stack().state_dict()
    plain["up.weight"] = plain["up.weight"].to(dtype)
    with pytest.raises(ValueError, match=r"'up.weight' is stored as torch.(float8_e4m3fn|int8), without its scales"):
        load_base(adapted(meta_stack(), how), plain.__getitem__)


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("how", [None, "folder", "nf4"])
def test_a_load_that_is_refused_changes_nothing(late: bool, how: str | None, tmp_path: Path) -> None:
    """The last weight is missing. What had values keeps them; what was on the meta device is there again, and takes weights still."""
    plain = plain_stack().state_dict()
    save_file({name: tensor for name, tensor in plain.items() if name != [*plain][-1]}, tmp_path / "model.safetensors")
    model = adapted(meta_stack() if late else Stack(), "nf4" if how == "nf4" and late else None)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"weights has no '{[*plain][-1]}'"):
        load_base(model, tmp_path if how == "folder" else WeightFolder(tmp_path).__call__)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and on_meta(model) == late
    assert late or all(same_bits(after[name], value) for name, value in before.items())
    load_base(model, plain.__getitem__)
    assert not on_meta(model) and same_bits(model.norm.bias, plain["norm.bias"])


class Masked(nn.Module):
    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(4), persistent=persistent)


def test_a_buffer_never_stays_without_values() -> None:
    with torch.device("meta"):
        saved, unsaved = nn.Sequential(Masked(True)), nn.Sequential(Masked(False))
    mask = torch.arange(4.0)
    with pytest.raises(ValueError, match=r"'0.mask' is no part of a state dict, and Masked has no reset_parameters\(\)"):
        load_base(unsaved, {}.__getitem__)
    with pytest.raises(ValueError, match=r"weights has no '0.mask', which Masked needs"):
        load_base(saved, {}.__getitem__)
    with pytest.raises(ValueError, match=r"'0.mask' has shape \(1,\) in weights, here \(4,\)"):
        load_base(saved, {"0.mask": torch.ones(1)}.__getitem__)
    assert same_bits(load_base(saved, {"0.mask": mask}.__getitem__)[0].mask, mask)
    assert same_bits(load_base(saved, {}.__getitem__)[0].mask, mask)  # it has values now


@pytest.mark.parametrize("how", ["fp8", "nf4"])
def test_mixtures(how: str, tmp_path: Path) -> None:
    """Linears may be quantized before the weights come, experts not; packed experts take no weights, which FP8 codes have the shape of."""
    plain = tiny_qwen3_moe()
    with torch.device("meta"):
        late = tiny_qwen3_moe()
    with pytest.raises(ValueError, match=r"experts' \(Qwen3MoeExperts\) is on the meta device, where .* linears only"):
        quantize_base(late, how)
    plain.save_pretrained(tmp_path / "its own")
    plain.save_pretrained(tmp_path / "ours", save_original_format=False)
    with pytest.raises(ValueError, match=r"experts.gate_up_proj', which .* save_pretrained\(folder, save_original_format=False\)"):
        load_base(late, tmp_path / "its own")
    load_base(late, tmp_path / "ours")
    assert base_identity(late) == base_identity(plain)
    packed = quantize_base(late, how, targets=["experts"])
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    with pytest.raises(ValueError, match=r"experts' \(PackedQwen3MoeExperts\) is quantized already, and takes no plain weight"):
        load_base(packed, tmp_path / "ours")
    assert all(same_bits(tensor, before[name]) for name, tensor in packed.state_dict().items())
