"""A merge of a tied weight breaks that tie alone, in the model, in its files and in the model that is loaded from them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

from lightning_lora import LoRAConfig, apply_lora, export_merged, merge_lora, unload_lora, unmerge_lora
from lightning_lora.utils.transformers_conventions import without_ties
from tests.adapter_io.folders import differences
from tests.conftest import fill

SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
HALVES = {
    f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
}
T5: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
IDS = torch.arange(3, 9)[None]
HYBRID: dict[str, Any] = {
    **SIZES, "num_hidden_layers": 3, "layers_block_type": ["hybrid"] * 3, "num_mem_blocks": 1, "n_mamba_heads": 2, "mamba_headdim": 16,
    "mamba_d_state": 4, "mamba_ngroups": 1, "chunk_size": 4, "kv_channels": 8, "attention_head_dim": 16, "adapter_rank": 2,
}  # fmt: skip


def detr(cls: type = T.DeformableDetrForObjectDetection) -> nn.Module:
    backbone = T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage1", "stage2"], layer_type="basic")
    small = {"d_model": 32, "num_queries": 4, "num_feature_levels": 2, "encoder_n_points": 1, "decoder_n_points": 1}
    config = T.DeformableDetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, **small, **{**HALVES, "decoder_layers": 3}
    )
    return cls(config)


class OneHead(T.DeformableDetrForObjectDetection):
    """Its heads have two names each, as in earlier versions: of them a file has one."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.decoder.class_embed, self.model.decoder.bbox_embed = self.class_embed, self.bbox_embed
        self._tied_weights_keys = {
            **type(self)._tied_weights_keys,
            "model.decoder.class_embed": "class_embed",
            "model.decoder.bbox_embed": "bbox_embed",
        }
        self.post_init()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16)),
    "bert": lambda: T.BertForMaskedLM(T.BertConfig(**SIZES)),
    "bart": lambda: T.BartForConditionalGeneration(T.BartConfig(vocab_size=40, d_model=16, max_position_embeddings=16, **HALVES)),
    "t5": lambda: T.T5ForConditionalGeneration(T.T5Config(**T5)),
    "umt5": lambda: T.UMT5ForConditionalGeneration(T.UMT5Config(**T5)),
    "zamba2": lambda: T.Zamba2ForCausalLM(T.Zamba2Config(**HYBRID)),
    "detr": detr,
    "one head": lambda: detr(OneHead),
}
# The adapted modules, and how many parameters the model has more when each tied one among them is on its own.
CASES: list[tuple[str, list[str], int]] = [
    ("llama", ["embed_tokens"], 1),
    ("llama", ["lm_head", "q_proj"], 1),
    ("llama", ["embed_tokens", "lm_head"], 1),
    ("gpt2", ["wte", "lm_head"], 1),
    ("bert", ["decoder"], 1),
    ("bert", ["word_embeddings"], 1),
    ("bart", ["lm_head"], 1),
    ("bart", ["encoder.embed_tokens"], 1),
    ("bart", ["shared"], 3),
    ("bart", ["lm_head", "encoder.embed_tokens", "decoder.embed_tokens"], 3),
    ("t5", ["lm_head"], 1),
    ("t5", ["lm_head", "encoder.embed_tokens", "decoder.embed_tokens"], 3),
    ("umt5", ["lm_head", "encoder.embed_tokens", "decoder.embed_tokens"], 3),
    ("zamba2", ["lm_head"], 1),
    ("zamba2", ["0.shared_transformer.self_attn.q_proj"], 2),  # which the two other blocks were tied to
    ("zamba2", ["1.shared_transformer.self_attn.q_proj"], 1),
    ("detr", ["class_embed.0"], 2),
    ("detr", ["bbox_embed.1.layers.0"], 1),
]


def adapted(name: str, targets: list[str]) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.5)
    return fill(apply_lora(model, LoRAConfig(rank=2, target_modules=targets, modules_to_save=[])))


def parameters(model: nn.Module) -> int:
    return len({id(p) for name, p in model.named_parameters(remove_duplicate=False) if "lora_" not in name})


def logits(model: nn.Module) -> Tensor:
    inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder and model.main_input_name == "input_ids" else {}
    with torch.no_grad():
        if model.main_input_name == "pixel_values":
            return model(pixel_values=torch.ones(1, 3, 32, 32)).logits
        return model(input_ids=IDS, **inputs).logits


@pytest.mark.parametrize(("name", "targets", "more"), CASES, ids=[f"{name} {' '.join(targets)}" for name, targets, _ in CASES])
def test_that_tie_alone_breaks_and_everything_loads_as_it_was(name: str, targets: list[str], more: int, tmp_path: Path) -> None:
    model = adapted(name, targets)
    before, config, tied = logits(model), model.config.to_dict(), parameters(model)
    export_merged(model, tmp_path / "export")
    assert model.config.to_dict() == config and parameters(model) == tied
    merge_lora(model, untie=True)
    assert parameters(model) == tied + more
    merged, scale = logits(model), float(before.abs().max())
    torch.testing.assert_close(merged, before, rtol=0, atol=1e-5 * scale)
    model.tie_weights()  # as resizing does
    assert parameters(model) == tied + more and torch.equal(logits(model), merged)

    plain = unload_lora(copy.deepcopy(model), merged="keep")
    plain.save_pretrained(tmp_path / "saved")
    assert differences(tmp_path / "export", tmp_path / "saved") == []
    loaded, info = type(plain).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()) and parameters(loaded) == tied + more
    state, wanted = loaded.state_dict(), plain.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[key], tensor) for key, tensor in wanted.items())

    unmerge_lora(model)
    assert parameters(model) == tied and model.config.to_dict() == config and torch.equal(logits(model), before)
    merge_lora(model, untie=True)
    assert torch.equal(logits(model), merged)
    plain = unload_lora(model, merged="drop")
    assert parameters(plain) == tied
    plain.save_pretrained(tmp_path / "base")
    assert parameters(type(plain).from_pretrained(tmp_path / "base")) == tied


@pytest.mark.parametrize("target", ["class_embed.0", "class_embed.1"])
def test_a_weight_with_two_names_takes_all_ties_of_its_model_along(target: str, tmp_path: Path) -> None:
    """A file has one of the names, and the other would be tied again when it is loaded."""
    model = adapted("one head", [target])
    export_merged(model, tmp_path / "export")
    plain = unload_lora(merge_lora(model, untie=True), merged="keep")
    plain.save_pretrained(tmp_path / "saved")
    assert differences(tmp_path / "export", tmp_path / "saved") == [] and not plain.config.tie_word_embeddings
    loaded = OneHead.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in plain.state_dict().items())


def test_where_no_file_can_say_so_it_is_refused_before_anything_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = adapted("one head", ["class_embed.1"])
    tied = parameters(model)
    monkeypatch.setattr("lightning_lora.model.ties.without_ties", lambda config, classes: None)
    for act in (lambda: merge_lora(model, untie=True), lambda: export_merged(model, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"class_embed.1.weight is tied to class_embed.0.weight, and .* is the same weight"):
            act()
    assert parameters(model) == tied and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "can"), [("llama", True), ("gpt2", True), ("bart", True), ("t5", False), ("umt5", False)])
def test_which_configs_keep_it_that_nothing_is_tied(name: str, can: bool) -> None:
    model = MODELS[name]()
    off = without_ties(model.config, {type(module) for module in model.modules()})
    assert off == ([model.config] if can else None)


def test_servers_read_the_flag_of_the_text_model(tmp_path: Path) -> None:
    text = {**SIZES, "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "tie_word_embeddings": True}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    model = T.Qwen2VLForConditionalGeneration(T.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)).eval()
    fill(apply_lora(model, LoRAConfig(rank=2, target_modules=["lm_head"])))
    before = logits(model)
    loaded = type(model).from_pretrained(export_merged(model, tmp_path / "out"))
    torch.testing.assert_close(logits(loaded), before, rtol=0, atol=1e-5)
    assert not loaded.config.tie_word_embeddings and not loaded.config.text_config.tie_word_embeddings
    assert model.config.tie_word_embeddings and model.config.text_config.tie_word_embeddings


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep copy", "pickle"])
@pytest.mark.parametrize(("name", "target"), [("llama", "lm_head"), ("bart", "shared"), ("bert", "decoder")])
def test_a_copy_of_a_merged_model_unmerges_by_itself(how: Callable[[nn.Module], nn.Module], name: str, target: str) -> None:
    model = adapted(name, [target])
    before, tied = logits(model), parameters(model)
    merged = logits(merge_lora(model, untie=True))
    other = how(model)
    assert torch.equal(logits(unmerge_lora(other)), before) and parameters(other) == tied and other.config.tie_word_embeddings
    assert torch.equal(logits(model), merged) and parameters(model) > tied
    assert parameters(unmerge_lora(model)) == tied


def test_a_merge_that_is_not_to_be_undone_keeps_nothing_of_the_tie() -> None:
    model = merge_lora(adapted("bart", ["shared"]), untie=True, reversible=False)
    assert model.get_submodule("model.shared").lora_state.untying is None and not model.config.tie_word_embeddings


def test_a_merge_that_fails_half_way_ties_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("bart", ["shared", "fc2"])
    before, config, tied = logits(model), model.config.to_dict(), parameters(model)
    layer = model.get_submodule("model.decoder.layers.0.fc2")

    def full(**options: Any) -> None:
        assert parameters(model) == tied + 3
        raise MemoryError

    monkeypatch.setattr(layer, "merge_weights", full)
    with pytest.raises(MemoryError):
        merge_lora(model, untie=True)
    assert parameters(model) == tied and model.config.to_dict() == config and torch.equal(logits(model), before)
