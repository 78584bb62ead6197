"""Tiny models of every task as folders, and a quiet Trainer."""

from pathlib import Path

import lightning
import torch
import transformers as T

from lightning_lora import get_lora_parameters
from tests import tiny_lm

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def trainer(*callbacks, **kwargs):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, **kwargs})


def fill(model):
    """Give every factor values, so that the adapters change the model."""
    generator = torch.Generator().manual_seed(5)
    for p in get_lora_parameters(model):
        p.data = (torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3).to(p.dtype)
    return model


def save(folder: Path, kind: str) -> str:
    """A model without a head for the task, with its tokenizer or processor."""
    torch.manual_seed(0)
    KINDS[kind]().save_pretrained(folder)
    if kind in IMAGES:
        T.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    else:
        tiny_lm.tokenizer(chat=False).save_pretrained(folder)
    return str(folder)


def bert() -> T.PreTrainedModel:
    return T.BertModel(
        T.BertConfig(vocab_size=len(tiny_lm.WORDS), max_position_embeddings=64, initializer_range=0.3, **NO_DROPOUT, **SIZES)
    )


def llama() -> T.PreTrainedModel:
    return tiny_lm.llama().model


def modernbert() -> T.PreTrainedModel:
    tokens = {"vocab_size": len(tiny_lm.WORDS), "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3}
    return T.ModernBertModel(T.ModernBertConfig(max_position_embeddings=64, **tokens, **SIZES))


def t5() -> T.PreTrainedModel:
    tokens = {"decoder_start_token_id": 0, "eos_token_id": 3, "pad_token_id": 0}
    config = T.T5Config(vocab_size=len(tiny_lm.WORDS), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0, **tokens)
    return T.T5ForConditionalGeneration(config)


def vit() -> T.PreTrainedModel:
    return T.ViTModel(T.ViTConfig(image_size=32, patch_size=8, **SIZES))


def resnet() -> T.PreTrainedModel:
    return T.ResNetModel(T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))


KINDS = {"bert": bert, "modernbert": modernbert, "llama": llama, "t5": t5, "vit": vit, "resnet": resnet}
IMAGES = ("vit", "resnet")
