"""The document's model, and its snippets run as written."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import get_lora_parameters


def run(snippet: str, **names: Any) -> dict[str, Any]:
    """Execute a snippet; what it can see is `names` and the imports that the document takes for granted."""
    namespace = {"torch": torch, "nn": nn, "F": F, **names}
    exec(snippet.replace("nexus.models.compression.peft", "lightning_lora"), namespace)
    return namespace


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()


def teach(model: nn.Module) -> nn.Module:
    """Adapters that do something, as after training."""
    with torch.no_grad():
        for parameter in get_lora_parameters(model):
            parameter.normal_(std=0.1)
    return model
