"""The models of ``multi_gpu.py``: built on the meta device, filled piece by piece, and what is done to a base before it is wrapped."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
SHAPES = {
    "tiny": (64, 128, 2, 4, 4, 256),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "70b": (8192, 28672, 80, 64, 8, 128256),
}


def empty_model(options: argparse.Namespace, layers: int | None = None) -> nn.Module:
    """A Llama on the current default device, bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(zip(SIZES, SHAPES[options.shape], strict=True))
    sizes["num_hidden_layers"] = min(layers or 10**9, sizes["num_hidden_layers"])
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False, use_cache=False)).bfloat16().train()
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@torch.no_grad()
def fill(module: nn.Module, device: torch.device) -> None:
    """Give one module's own meta tensors storage and values, the same on every rank; children are left alone."""
    module.to_empty(device=device, recurse=False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in module.named_parameters(recurse=False):
        piece = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if "Norm" in type(module).__name__:
            piece.fill_(1)
        else:
            piece.normal_(std=0.0 if name == "lora_B" else 0.02, generator=generator)
    if hasattr(module, "inv_freq"):  # buffers that a constructor computes
        for name, buffer in type(module)(module.config).named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=False)


def fill_all(model: nn.Module, device: torch.device) -> nn.Module:
    for module in model.modules():
        fill(module, device)
    return model


# Models: what is done to a base before it is wrapped.


def frozen(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model


def ours(model: nn.Module) -> nn.Module:
    from lightning_lora import LoRAConfig, apply_lora

    return apply_lora(model, config=LoRAConfig(rank=16, alpha=32, target_modules=LINEARS))


def peft(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS))


MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {"frozen": frozen, "ours": ours, "PEFT": peft}
