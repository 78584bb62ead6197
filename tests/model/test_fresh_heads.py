"""What is fresh is what no checkpoint contained: a checkpoint of one class, loaded into another."""

import copy

import peft
import pytest
import torch
import transformers as T
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, find_targets, load_adapter, save_adapter, unload_lora
from lightning_lora.model.heads import fresh_heads
from tests.conftest import snapshot
from tests.model.test_heads import AUDIO, IMAGE, TEXT
from tests.parity.models import DEPRECATED_BY_PEFT

T.logging.set_verbosity_error()
TOWERS = {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 8}
BLIP = {"text_config": {**TEXT, "encoder_hidden_size": 16}, "vision_config": IMAGE, "projection_dim": 8, "image_text_hidden_size": 8}
TAPAS = {**TEXT, "type_vocab_sizes": [3, 4, 4, 2, 4, 4, 4], "max_position_embeddings": 32, "num_aggregation_labels": 3}
TAPAS_HEADS = ["output_weights", "column_output_weights", "output_bias", "column_output_bias", "aggregation_classifier"]
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "num_labels": 1}


class OwnHead(T.BertPreTrainedModel):
    """As users write them: a backbone, a layer and a bare parameter."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = T.BertModel(config, add_pooling_layer=False)
        self.out = nn.Linear(16, 3)
        self.temperature = nn.Parameter(torch.ones(()))
        self.post_init()


# The class of the checkpoint, the class it is loaded into, the configuration, what is fresh.
LOADED = {
    "bare parameters": (T.TapasModel, T.TapasForQuestionAnswering, T.TapasConfig(**TAPAS), TAPAS_HEADS),
    "bare parameter and modules": (
        T.Wav2Vec2Model,
        T.Wav2Vec2ForSequenceClassification,
        T.Wav2Vec2Config(**AUDIO, use_weighted_layer_sum=True, classifier_proj_size=8),
        ["layer_weights", "projector", "classifier"],
    ),
    "a parameter inside the backbone": (
        T.DeiTModel,
        T.DeiTForMaskedImageModeling,
        T.DeiTConfig(**IMAGE, encoder_stride=8),
        ["deit.embeddings.mask_token", "decoder"],
    ),
    "a bias beside a tied weight": (
        T.DistilBertModel,
        T.DistilBertForMaskedLM,
        T.DistilBertConfig(vocab_size=32, dim=16, hidden_dim=16, n_layers=1, n_heads=2),
        ["vocab_transform", "vocab_layer_norm", "vocab_projector.bias"],
    ),
    "language model head": (T.LlamaModel, T.LlamaForCausalLM, T.LlamaConfig(**TEXT), ["lm_head"]),
    "tied language model head": (T.LlamaModel, T.LlamaForCausalLM, T.LlamaConfig(**TEXT, tie_word_embeddings=True), []),
    "two heads": (T.GPT2LMHeadModel, T.GPT2DoubleHeadsModel, T.GPT2Config(**GPT2), ["multiple_choice_head"]),
    "a class of the user's": (T.BertForMaskedLM, OwnHead, T.BertConfig(**TEXT), ["temperature", "out"]),
    "more than half is fresh": (T.BlipModel, T.BlipForQuestionAnswering, T.BlipConfig(**BLIP), ["text_encoder", "text_decoder"]),
    "visual question answering": (T.BlipForQuestionAnswering, T.BlipForQuestionAnswering, T.BlipConfig(**BLIP), []),
    "zero-shot detection": (
        T.OwlViTModel,
        T.OwlViTForObjectDetection,
        T.OwlViTConfig(**TOWERS),
        ["class_head", "box_head", "layer_norm"],
    ),
    "a stem of its own": (
        T.HGNetV2Backbone,
        T.HGNetV2ForImageClassification,
        T.HGNetV2Config(
            stem_channels=[3, 4, 4],
            stage_in_channels=[4, 4, 4, 4],
            stage_mid_channels=[4, 4, 4, 4],
            stage_out_channels=[4, 4, 4, 4],
            stage_num_blocks=[1, 1, 1, 1],
            stage_numb_of_layers=[1, 1, 1, 1],
            hidden_sizes=[4, 4, 4, 4],
            depths=[1, 1, 1, 1],
        ),
        ["fc"],
    ),
}


@pytest.mark.parametrize("name", LOADED)
def test_what_another_class_did_not_save(tmp_path, name):
    saved, cls, config, heads = LOADED[name]
    saved(config).save_pretrained(tmp_path)
    model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    found = fresh_heads(model)
    assert found == heads
    named = [name for name in info["missing_keys"] if any(name == head or name.startswith(head + ".") for head in found)]
    tied = {other for first, other in model.all_tied_weights_keys.items()} | set(model.all_tied_weights_keys)
    assert info["missing_keys"] - set(named) <= tied, "what transformers says at load"


ZERO_SHOT = {
    "clip": (T.CLIPModel, T.CLIPConfig(**TOWERS)),
    "siglip": (T.SiglipModel, T.SiglipConfig(text_config=TEXT, vision_config=IMAGE)),
    "siglip2": (T.Siglip2Model, T.Siglip2Config(text_config=TEXT, vision_config={**TEXT, "num_patches": 4, "patch_size": 8})),
    "blip": (T.BlipModel, T.BlipConfig(**BLIP)),
    "chinese clip": (T.ChineseCLIPModel, T.ChineseCLIPConfig(**TOWERS)),
    "clipseg": (T.CLIPSegModel, T.CLIPSegConfig(**TOWERS)),
    "metaclip": (T.MetaClip2Model, T.MetaClip2Config(**TOWERS)),
    "altclip": (T.AltCLIPModel, T.AltCLIPConfig(text_config={**TEXT, "project_dim": 16}, vision_config=IMAGE, projection_dim=8)),
    "shieldgemma": (
        T.ShieldGemma2ForImageClassification,
        T.ShieldGemma2Config(
            text_config={**TEXT, "head_dim": 8, "num_key_value_heads": 1}, vision_config=IMAGE, mm_tokens_per_image=4, image_token_index=30
        ),
    ),
}


@pytest.mark.parametrize("name", ZERO_SHOT)
def test_zero_shot_classes_have_no_fresh_head(tmp_path, name):
    """All that they compute with is in the pretraining checkpoint."""
    cls, config = ZERO_SHOT[name]
    model = cls(config)
    assert fresh_heads(model) == []
    model.save_pretrained(tmp_path)
    assert fresh_heads(cls.from_pretrained(tmp_path)) == []


def test_parts_that_were_loaded_one_by_one(tmp_path):
    T.BertForMaskedLM(T.BertConfig(**TEXT)).save_pretrained(tmp_path / "text")
    T.ViTModel(T.ViTConfig(**IMAGE)).save_pretrained(tmp_path / "image")
    model = T.EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path / "text", tmp_path / "text")
    assert fresh_heads(model) == ["encoder.pooler", "decoder.bert.encoder.layer.0.crossattention"]
    model = T.VisionTextDualEncoderModel.from_vision_text_pretrained(str(tmp_path / "image"), str(tmp_path / "text"))
    assert fresh_heads(model) == ["logit_scale", "text_model.pooler", "visual_projection", "text_projection"]


def test_a_target_inside_of_what_is_fresh_is_adapted_and_the_rest_trained(tmp_path):
    T.BertForMaskedLM(T.BertConfig(**TEXT)).save_pretrained(tmp_path)
    model = T.EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path, tmp_path)
    report = find_targets(model, LoRAConfig(rank=2, target_modules=["query", "value"]))
    inside = "decoder.bert.encoder.layer.0.crossattention"
    assert report.saved == ("encoder.pooler", f"{inside}.self.key", f"{inside}.output")
    assert {f"{inside}.self.query", f"{inside}.self.value"} <= {target.fqn for target in report.targets}


@pytest.fixture
def tapas(tmp_path):
    T.TapasModel(T.TapasConfig(**TAPAS)).save_pretrained(tmp_path / "base")

    def make():
        torch.manual_seed(3)
        return T.TapasForQuestionAnswering.from_pretrained(tmp_path / "base", num_aggregation_labels=3).eval()

    return make


def outputs(model):
    found = model(input_ids=torch.arange(6).view(2, 3), token_type_ids=torch.zeros(2, 3, 7, dtype=torch.long))
    return torch.cat([found.logits, found.logits_aggregation], dim=1)


@pytest.mark.filterwarnings(DEPRECATED_BY_PEFT)
def test_bare_parameters_train_and_are_saved_and_loaded(tapas, tmp_path):
    config = LoRAConfig(rank=2, target_modules=["query"])
    model = apply_lora(tapas(), config)
    trained = {name.removesuffix(".weight").removesuffix(".bias") for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        *TAPAS_HEADS,
        "tapas.encoder.layer.0.attention.self.query.lora_A",
        "tapas.encoder.layer.0.attention.self.query.lora_B",
    }
    outputs(model).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in (model.output_weights, model.aggregation_classifier.weight))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    save_adapter(model, tmp_path / "adapter")
    for loaded in (load_adapter(tapas(), tmp_path / "adapter"), load_adapter(apply_lora(tapas(), config), tmp_path / "adapter")):
        assert find_targets(loaded, config).saved == tuple(TAPAS_HEADS)
        assert torch.equal(outputs(loaded), outputs(model))
    assert torch.allclose(outputs(peft.PeftModel.from_pretrained(tapas(), str(tmp_path / "adapter")).eval()), outputs(model), atol=1e-6)
    assert not torch.allclose(outputs(tapas()), outputs(model), atol=0.1)


def test_unloading_forgets_bare_parameters(tapas):
    model = tapas()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.partition(".")[0] in TAPAS_HEADS)
    before = snapshot(model)
    assert snapshot(unload_lora(apply_lora(model, LoRAConfig(rank=2, target_modules=["query"])))) == before


@pytest.mark.filterwarnings(DEPRECATED_BY_PEFT)
def test_a_folder_that_peft_wrote_fits_an_adapted_model_whatever_the_order_of_its_heads(tmp_path):
    def make():
        torch.manual_seed(3)
        return T.Wav2Vec2ForSequenceClassification(T.Wav2Vec2Config(**AUDIO, classifier_proj_size=8)).eval()

    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier", "projector"]))
    theirs.save_pretrained(str(tmp_path))
    mine = apply_lora(make(), LoRAConfig(rank=2, alpha=8, target_modules=["q_proj"]))
    assert find_targets(mine, LoRAConfig(rank=2, alpha=8, target_modules=["q_proj"])).saved == ("projector", "classifier")
    x = torch.randn(1, 40)
    assert torch.allclose(load_adapter(mine, tmp_path)(x).logits, theirs.eval()(x).logits, atol=1e-6)


def test_a_classifier_inside_of_a_task_model_is_not_its_head(tmp_path):
    class OwnForGeneration(T.BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.labels = T.BertForSequenceClassification(config)
            self.out = nn.Linear(16, 3)
            self.post_init()

    OwnForGeneration(T.BertConfig(**TEXT)).save_pretrained(tmp_path)
    assert fresh_heads(OwnForGeneration.from_pretrained(tmp_path)) == []


def test_parameters_are_named_like_modules():
    def make():
        return nn.ModuleDict({"a": OwnHead(T.BertConfig(**TEXT)), "b": OwnHead(T.BertConfig(**TEXT))})

    def saved(*names):
        return find_targets(make(), LoRAConfig(rank=2, target_modules=["query"], modules_to_save=names)).saved

    assert saved("temperature") == ("a.temperature", "b.temperature")
    assert saved("b.temperature", "out") == ("b.temperature", "a.out", "b.out")
    assert saved("out.bias") == ("a.out.bias", "b.out.bias")
    assert saved(r".*\.out") == ("a.out", "b.out"), "a regex that matches modules is not tried on parameters"
    with pytest.raises(ValueError, match="modules_to_save: 'temparature' matches no module"):
        saved("temparature")
    config = LoRAConfig(rank=2, target_modules=["query"], modules_to_save=["a.temperature"], bias="lora_only")
    model = apply_lora(make(), config)
    assert [name for name, p in model.named_parameters() if p.requires_grad and "query" not in name] == ["a.temperature"]
    assert apply_lora(model, config) is model and find_targets(model, config).saved == ("a.temperature",)


def made_anew(model):
    """As converters of layers do it: the same weights in new parameters."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, copy.deepcopy(child))
    return model


def without_its_blocks(model):
    model.model.layers = copy.deepcopy(model.model.layers)
    return model


@pytest.mark.parametrize("change", [made_anew, without_its_blocks, copy.deepcopy])
def test_parameters_that_were_made_anew_do_not_count_as_fresh(tmp_path, change):
    T.LlamaForCausalLM(T.LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    assert fresh_heads(change(T.LlamaForCausalLM.from_pretrained(tmp_path))) == []
