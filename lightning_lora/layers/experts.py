"""Experts of a mixture, stored as one tensor per projection: ``W_e + scaling · B_e·A_e`` for each expert e.

transformers 5 stores ``gate_up_proj`` (experts, 2·width, hidden) and ``down_proj`` (experts, hidden, width), some models each expert's
matrix transposed. Their classes differ in activation, biases and norms, and each runs in one of several implementations. So none of their
code is repeated here. The base's own forward runs on a stand-in of the module whose weights are
:class:`~lightning_lora.ops.low_rank_sum.LowRankSum`: every product with an expert's weight adds that expert's two small products. Dense
updates are built by a merge only, and dropout acts on the input of each expert's A.

PEFT (``target_parameters``) adds the dense updates of all experts in every forward pass, and has no dropout there.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.several_weights import SeveralWeights
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.ops.low_rank_sum import LowRankSum
from lightning_lora.registry import register_kind
from lightning_lora.utils.transformers_conventions import experts_implementation, stored_experts

_KNOWN = ("eager", "batched_mm", "grouped_mm")  # implementations that use the weights in products alone


class ExpertStack(LoRALayer):
    """The weights of all experts for one projection.

    Shape:
        ``weight`` (E, out, in), or (E, in, out) if :attr:`transposed`. Expert after expert, as a grouped convolution has its groups:
        ``lora_A`` (E·r, in), ``lora_B`` (E·out, r).
    """

    lora_base = nn.Module

    @classmethod
    def adapter_shapes(cls, module: Any, spec: LayerSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A, (E·r, in), and of B, (E·out, r)."""
        experts, outputs, inputs = module.to_matrix(module.weight).shape
        return (experts * spec.rank, inputs), (experts * outputs, spec.rank)

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        """Raise ValueError also for a weight that is no stack of matrices, and for a variant that scales outputs."""
        if module.weight.ndim != 3:
            raise ValueError(f"its shape {tuple(module.weight.shape)} is not one matrix per expert; exclude it")
        if cls.output_scale is not LoRALayer.output_scale:
            raise ValueError(f"variant={spec.config.variant!r} scales a layer's outputs, which experts in one tensor have no place for")
        super().check(module, spec)

    def to_matrix(self, tensor: Tensor) -> Tensor:
        """Return the tensor as (E, out, in)."""
        return tensor.mT if self.transposed else tensor

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Invert :meth:`to_matrix`."""
        return matrix.mT if self.transposed else matrix

    def factor_matrices(self) -> tuple[Tensor, Tensor]:
        """Return A (E, r, in) and B (E, out, r)."""
        A, B = self.update_factors()
        experts = self.weight.shape[0]
        return A.unflatten(0, (experts, -1)), B.unflatten(0, (experts, -1))

    def adapted_weight(self) -> LowRankSum:
        """Return the weight with its update, in the weight's own layout."""
        A, B = self.factor_matrices()
        left, right = (A.mT, B.mT) if self.transposed else (B, A)
        return LowRankSum(self.weight, left, right, self.scaling, self.dropout_now())


@register_kind(name="experts", match=lambda cls: stored_experts(cls) is not None)
class LoRAExperts(SeveralWeights):
    """A module of experts, such as ``Qwen3MoeExperts`` or ``GptOssExperts``: one :class:`ExpertStack` per projection."""

    weight_kind = ExpertStack
    is_linear = True
    #: True if each expert's matrix is stored as (in, out).
    stored_transposed: ClassVar[bool]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stored = stored_experts(cls.lora_base)
        if stored is not None:
            cls.adapted, cls.stored_transposed = stored

    @classmethod
    def _alone(cls, module: Any, name: str) -> Any:
        layer = super()._alone(module, name)
        layer.__dict__["transposed"] = cls.stored_transposed
        return layer

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        """Raise ValueError also for an implementation that does more with the weights than multiply by them."""
        chosen = experts_implementation(module)
        if chosen not in (None, *_KNOWN):
            raise ValueError(f"LoRA does not see the products of experts_implementation={chosen!r}; choose one of {', '.join(_KNOWN)}")
        super().check(module, spec)

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base's output, with every expert's weight adapted unless the layer is merged or disabled."""
        # A stand-in also where nothing is added: experts have attributes such as GPT-OSS's alpha, and an adapted layer has its own.
        base: Any = type(self).lora_base
        stand_in = object.__new__(base)
        stand_in.__dict__.update(self.__dict__)
        if not self.disabled and not self.merged:  # the weights here are found before the parameters of the same names
            stand_in.__dict__.update({name: layer.adapted_weight() for name, layer in self.by_weight().items()})  # type: ignore[attr-defined]
        return base.forward(stand_in, *args, **kwargs)
