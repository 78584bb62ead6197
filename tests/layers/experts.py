"""A kind of several weights for the tests: the experts of a mixture in transformers 5, one tensor (E, out, in) per projection.

It builds the dense weights in each forward pass, as the definition has them, so it serves any of transformers' implementations and costs
their memory. It is registered by name in :func:`registered` only: the package itself has no kind for experts yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.several_weights import SeveralWeights
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.registry import KINDS

EXPERTS = ("qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts", "mixtral.modeling_mixtral.MixtralExperts")


class StackedLinear(LoRALayer):
    """Weights (E, out, in): ``lora_A`` (E·r, in), ``lora_B`` (E·out, r), expert after expert, as a grouped convolution has its groups."""

    lora_base = nn.Module

    @classmethod
    def adapter_shapes(cls, module: Any, spec: LayerSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        experts, outputs, inputs = module.weight.shape
        return (experts * spec.rank, inputs), (experts * outputs, spec.rank)

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        super().check(module, spec)
        if module.weight.ndim != 3:
            raise ValueError(f"its shape {tuple(module.weight.shape)} is not (experts, out, in)")
        if spec.dropout:
            raise ValueError(f"dropout={spec.dropout} has no input to act on where the weights are added up first; use 0")

    def to_matrix(self, tensor: Tensor) -> Tensor:
        return tensor

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix

    def factor_matrices(self) -> tuple[Tensor, Tensor]:
        A, B = self.update_factors()
        experts = self.weight.shape[0]
        return A.unflatten(0, (experts, -1)), B.unflatten(0, (experts, -1))

    def dense(self) -> Tensor:
        """The adapted weight, with a gradient to the factors."""
        weight = self.weight + self.merge_delta().to(self.weight.dtype)
        scale = self.output_scale()
        return weight if scale is None else weight * scale.view(*weight.shape[:2], 1).to(weight.dtype)


class LoRAExperts(SeveralWeights):
    adapted = ("gate_up_proj", "down_proj")
    weight_kind = StackedLinear

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            return self.base_forward(*args, **kwargs)
        dense = {name: layer.dense() for name, layer in self.by_weight().items()}  # type: ignore[attr-defined]
        self.__dict__.update(dense)  # found before the parameters of that name
        try:
            return self.base_forward(*args, **kwargs)
        finally:
            for name in dense:
                del self.__dict__[name]


@contextmanager
def registered() -> Iterator[None]:
    """Within it, LoRA has the kind."""
    names = [f"transformers.models.{name}" for name in EXPERTS]
    KINDS.update(dict.fromkeys(names, LoRAExperts))
    try:
        yield
    finally:
        for name in names:
            del KINDS[name]


def tiny_qwen3_moe(dtype: torch.dtype = torch.float32, layers: int = 2, implementation: str = "eager") -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(3)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(**sizes, **heads, decoder_sparse_step=1, mlp_only_layers=[], experts_implementation=implementation)
    return Qwen3MoeForCausalLM(config).to(dtype)


def tiny_mixtral(dtype: torch.dtype = torch.float32, implementation: str = "eager") -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(3)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, experts_implementation=implementation)
    return MixtralForCausalLM(config).to(dtype)
