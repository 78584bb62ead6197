"""``task_type`` and ``base_model_name_or_path`` in our folders: PEFT takes the class for the task, and finds the base by itself."""

import json

import pytest
import torch
import transformers as T
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, save_adapter
from tests.sweep.check import outputs

from .models import DEPRECATED_BY_PEFT, VOCAB, randomise

pytestmark = pytest.mark.filterwarnings(DEPRECATED_BY_PEFT)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
LLAMA = T.LlamaConfig(vocab_size=VOCAB, pad_token_id=0, num_labels=3, **SIZES)
BERT = T.BertConfig(vocab_size=VOCAB, **SIZES)
DISTIL = T.DistilBertConfig(vocab_size=VOCAB, dim=32, n_layers=1, n_heads=4, hidden_dim=48)
WHISPER = T.WhisperConfig(
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 32),
    **{"vocab_size": VOCAB, "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
)

# class, config, targets, PEFT's task type with the heads trained in full, and with nothing trained in full
CASES = [
    (T.LlamaForCausalLM, LLAMA, ["q_proj"], "CAUSAL_LM", "CAUSAL_LM"),
    (T.GPT2LMHeadModel, T.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4), ["c_attn"], "CAUSAL_LM", "CAUSAL_LM"),
    (T.T5ForConditionalGeneration, T.T5Config(**T5), ["q"], "SEQ_2_SEQ_LM", "SEQ_2_SEQ_LM"),
    (T.LlamaForSequenceClassification, LLAMA, ["q_proj"], "SEQ_CLS", None),
    (T.LlamaForTokenClassification, LLAMA, ["q_proj"], "TOKEN_CLS", None),
    (T.BertForQuestionAnswering, BERT, ["query"], "QUESTION_ANS", None),
    (T.DistilBertForSequenceClassification, DISTIL, ["q_lin"], "SEQ_CLS", None),
    (T.T5ForSequenceClassification, T.T5Config(**T5), ["q"], None, None),  # its head has another name than PEFT's class wants
    (T.BertForMaskedLM, BERT, ["query"], None, None),
    (T.LlamaModel, LLAMA, ["q_proj"], None, None),
    (T.WhisperForConditionalGeneration, WHISPER, ["q_proj"], None, None),
]


@pytest.mark.parametrize("saved", ["auto", []], ids=["heads", "alone"])
@pytest.mark.parametrize(("cls", "config", "targets", "with_heads", "alone"), CASES, ids=[cls.__name__ for cls, *_ in CASES])
def test_the_task_type_is_one_that_peft_can_load(cls, config, targets, with_heads, alone, saved, tmp_path):
    model = cls(config)
    expected = apply_lora(cls(config), LoRAConfig(rank=4, target_modules=targets, modules_to_save=saved))
    expected.load_state_dict(model.state_dict(), strict=False)
    randomise(expected)
    save_adapter(expected, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["task_type"] == (with_heads if saved == "auto" else alone)
    assert fields["base_model_name_or_path"] is None
    read = PeftModel.from_pretrained(model, tmp_path)  # a key that it misses is a warning, an error here
    trained = {name: p for name, p in expected.named_parameters() if p.requires_grad}
    merged = dict(read.merge_and_unload().named_parameters())
    assert all(torch.equal(merged[name], parameter) for name, parameter in trained.items() if "lora_" not in name)


AUTO = [(T.LlamaForCausalLM, AutoPeftModelForCausalLM), (T.LlamaForSequenceClassification, AutoPeftModelForSequenceClassification)]


@pytest.mark.parametrize(("cls", "auto"), AUTO, ids=["causal", "classification"])
def test_peft_finds_the_base_by_itself(cls, auto, tmp_path):
    cls(LLAMA).save_pretrained(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base").eval()
    apply_lora(model, LoRAConfig(rank=4, target_modules=["q_proj"]))
    randomise(model)
    save_adapter(model, tmp_path / "adapter")
    inputs = {"input_ids": torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))}
    read = (
        auto.from_pretrained(tmp_path / "adapter", num_labels=3)
        if cls is not T.LlamaForCausalLM
        else auto.from_pretrained(tmp_path / "adapter")
    )
    torch.testing.assert_close(outputs(read.eval(), inputs), outputs(model, inputs), rtol=0, atol=1e-6)


def test_a_model_that_is_not_of_transformers_has_neither(tmp_path):
    class NetForCausalLM(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(4, 4)

    save_adapter(apply_lora(NetForCausalLM(), LoRAConfig(rank=2, target_modules=["q_proj"])), tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["task_type"] is None and fields["base_model_name_or_path"] is None
