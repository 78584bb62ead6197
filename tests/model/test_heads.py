"""Which modules are trained in full unasked: what a checkpoint did not contain, or else the heads of task models."""

import copy

import pytest
import torch
import transformers as T
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, find_targets, load_adapter, save_adapter, unload_lora
from lightning_lora.model.heads import fresh_heads
from tests.conftest import snapshot

T.logging.set_verbosity_error()
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 32}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8}
AUDIO = {
    **SIZES,
    "conv_dim": (8,),
    "conv_kernel": (3,),
    "conv_stride": (2,),
    "num_feat_extract_layers": 1,
    "tdnn_dim": (8,),
    "tdnn_kernel": (3,),
    "tdnn_dilation": (1,),
    "num_conv_pos_embedding_groups": 2,
}
T5 = {"vocab_size": 32, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
}
SEGFORMER = {"hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 1, 1, 1], "depths": [1, 1, 1, 1], "decoder_hidden_size": 8}

# A task model that was made from its configuration alone: class, configuration, heads.
UNLOADED = {
    "bert": (T.BertForSequenceClassification, T.BertConfig(**TEXT), ["classifier"]),
    "bert tokens": (T.BertForTokenClassification, T.BertConfig(**TEXT), ["classifier"]),
    "bert qa": (T.BertForQuestionAnswering, T.BertConfig(**TEXT), ["qa_outputs"]),
    "bert language model": (T.BertForMaskedLM, T.BertConfig(**TEXT), []),
    "llama": (T.LlamaForCausalLM, T.LlamaConfig(**TEXT), []),
    "llama labels": (T.LlamaForSequenceClassification, T.LlamaConfig(**TEXT), ["score"]),
    "vit": (T.ViTForImageClassification, T.ViTConfig(**IMAGE), ["classifier"]),
    "clip": (T.CLIPForImageClassification, T.CLIPConfig(vision_config=IMAGE, text_config=TEXT), ["classifier"]),
    "siglip": (T.SiglipForImageClassification, T.SiglipConfig(vision_config=IMAGE, text_config=TEXT), ["classifier"]),
    "whisper": (T.WhisperForAudioClassification, T.WhisperConfig(**WHISPER), ["projector", "classifier"]),
    "t5 qa": (T.T5ForQuestionAnswering, T.T5Config(**T5), ["qa_outputs"]),
    "t5 tokens": (T.T5ForTokenClassification, T.T5Config(**T5), ["classifier"]),
    "wav2vec2 ctc": (T.Wav2Vec2ForCTC, T.Wav2Vec2Config(**AUDIO), ["lm_head"]),
    "wav2vec2 speakers": (
        T.Wav2Vec2ForXVector,
        T.Wav2Vec2Config(**AUDIO),
        ["projector", "tdnn", "feature_extractor", "classifier", "objective"],
    ),
    "segformer": (T.SegformerForSemanticSegmentation, T.SegformerConfig(**SEGFORMER), ["decode_head"]),
    "yolos": (
        T.YolosForObjectDetection,
        T.YolosConfig(**{**IMAGE, "image_size": [16, 16]}, num_detection_tokens=4),
        ["class_labels_classifier", "bbox_predictor"],
    ),
    "clipseg": (  # its decoder is a Hugging Face model too
        T.CLIPSegForImageSegmentation,
        T.CLIPSegConfig(
            text_config=TEXT, vision_config=IMAGE, projection_dim=8, extract_layers=[0], reduce_dim=8, decoder_num_attention_heads=2
        ),
        ["decoder"],
    ),
    "tapas": (
        T.TapasForQuestionAnswering,
        T.TapasConfig(**TEXT, type_vocab_sizes=[3, 4, 4, 2, 4, 4, 4], num_aggregation_labels=0),
        ["output_weights", "column_output_weights", "output_bias", "column_output_bias"],
    ),
    "hgnet": (T.HGNetV2ForImageClassification, T.HGNetV2Config(), ["fc"]),  # its stem is beside the encoder
}


@pytest.mark.parametrize("name", UNLOADED)
def test_the_heads_of_models_that_were_not_loaded(name):
    cls, config, heads = UNLOADED[name]
    with torch.device("meta"):
        model = cls(config)
    assert fresh_heads(model) == heads
    assert fresh_heads(nn.ModuleDict({"net": model})) == [f"net.{head}" for head in heads]


@pytest.mark.parametrize(
    ("checkpoint", "cls", "heads"),
    [
        (T.BertModel, T.BertForSequenceClassification, ["classifier"]),
        (T.BertForMaskedLM, T.BertForSequenceClassification, ["bert.pooler", "classifier"]),
        (T.BertForMaskedLM, T.BertForMaskedLM, []),
        (T.BertModel, T.BertForMaskedLM, ["cls.predictions.bias", "cls.predictions.transform"]),  # the decoder is tied to the embedding
        (T.BertForSequenceClassification, T.BertForSequenceClassification, ["classifier"]),  # as PEFT does
        (T.BertForMaskedLM, T.BertModel, []),  # its pooler may not even be used
    ],
)
def test_what_a_checkpoint_did_not_have(tmp_path, checkpoint, cls, heads):
    checkpoint(T.BertConfig(**TEXT)).save_pretrained(tmp_path)
    model = cls.from_pretrained(tmp_path)
    found = fresh_heads(model)
    assert found == heads, found
    assert fresh_heads(nn.ModuleDict({"net": model})) == [f"net.{head}" for head in heads]


def test_a_head_that_was_loaded_and_one_of_another_size(tmp_path):
    T.Wav2Vec2ForCTC(T.Wav2Vec2Config(**AUDIO)).save_pretrained(tmp_path)
    assert fresh_heads(T.Wav2Vec2ForCTC.from_pretrained(tmp_path)) == []
    assert fresh_heads(T.Wav2Vec2ForCTC.from_pretrained(tmp_path, vocab_size=11, ignore_mismatched_sizes=True)) == ["lm_head"]


def masked_lm_with_labels(tmp_path):
    if not (tmp_path / "base").exists():
        T.BertForMaskedLM(T.BertConfig(**TEXT)).save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    return T.BertForSequenceClassification.from_pretrained(tmp_path / "base")


def test_they_are_trained_saved_and_loaded(tmp_path):
    config = LoRAConfig(rank=2, target_modules=["query"])
    model = apply_lora(masked_lm_with_labels(tmp_path), config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert {name.rpartition(".")[0] for name in trained} == {"bert.pooler.dense", "classifier"}
    copied = copy.deepcopy(model)  # the copies of parameters do not know what was loaded
    for parameter in copied.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    save_adapter(copied, tmp_path / "adapter")
    loaded = load_adapter(masked_lm_with_labels(tmp_path), tmp_path / "adapter")
    ids = torch.arange(6).view(2, 3)
    assert torch.equal(loaded.eval()(ids).logits, copied.eval()(ids).logits)
    assert not torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_one_that_is_named_as_a_target_is_adapted(tmp_path):
    model = masked_lm_with_labels(tmp_path)
    report = find_targets(model, LoRAConfig(rank=2, target_modules=["dense"]))
    assert report.saved == ("classifier",)
    assert "bert.pooler.dense" in {target.fqn for target in report.targets}


def test_unloading_forgets_them(tmp_path):
    model = masked_lm_with_labels(tmp_path).requires_grad_(False)
    model.classifier.requires_grad_(True)
    model.bert.pooler.requires_grad_(True)
    before = snapshot(model)
    unload_lora(apply_lora(model, LoRAConfig(rank=2, target_modules=["query"])))
    assert snapshot(model) == before
