"""DBRX's experts: all matrices of a projection lie one below another in a 2-D weight.

``w1`` and ``v1`` (experts·ffn, hidden) have each expert's matrix as (out, in), ``w2`` of the same shape as (in, out). The code around the
module reads these weights and calls the module once per expert, with views of that expert's matrices. Where a view lies in the weight says
which expert it is. So the module's own forward gets a :class:`~lightning_lora.ops.low_rank_sum.LowRankSum` for each view.

PEFT 0.21 adds to such weights only while the module's forward runs, and DBRX has read them before.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_lora.layers.experts import ExpertStack, LoRAExperts
from lightning_lora.ops.low_rank_sum import LowRankSum
from lightning_lora.registry import register_kind
from lightning_lora.utils.transformers_experts import DBRX_EXPERTS


class FlatExpertStack(ExpertStack):
    """The weights of all experts for one projection.

    Shape:
        ``weight`` (E·out, in), or (E·in, out) if :attr:`transposed`; A and B as :class:`ExpertStack` has them.
    """

    dimensions = 2
    moe_num_experts: int  # the module's

    def matrices(self) -> tuple[int, int, int]:
        """Return the numbers of experts, and of one expert's outputs and inputs."""
        experts, (rows, columns) = self.moe_num_experts, self.weight.shape
        return (experts, columns, rows // experts) if self.transposed else (experts, rows // experts, columns)

    def to_matrix(self, tensor: Tensor) -> Tensor:
        """Return the tensor as (E, out, in)."""
        return super().to_matrix(tensor.unflatten(0, (self.moe_num_experts, -1)))

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Invert :meth:`to_matrix`."""
        return super().from_matrix(matrix).flatten(0, 1)

    def adapted_matrix(self, matrix: Tensor) -> LowRankSum:
        """Return one expert's matrix with its update.

        Args:
            matrix: a view of the weight, in its layout.

        Raises:
            ValueError: it is no expert's part of the weight.
        """
        distance = matrix.storage_offset() - self.weight.storage_offset()
        expert, rest = divmod(distance, matrix.numel())
        apart = matrix.untyped_storage().data_ptr() != self.weight.untyped_storage().data_ptr()
        if apart or rest or matrix.numel() * self.moe_num_experts != self.weight.numel():
            raise ValueError("the experts were called with a matrix that is no view of their weight: exclude them from LoRA, or merge them")
        A, B = (factor[expert] for factor in self.factor_matrices())
        left, right = (A.mT, B.mT) if self.transposed else (B, A)
        return LowRankSum(matrix, left, right, self.scaling, self.dropout_now())


@register_kind(DBRX_EXPERTS)
class LoRAFlatExperts(LoRAExperts):
    """A ``DbrxExpertGLU``: one :class:`FlatExpertStack` per projection, with the options of :class:`LoRAExperts`."""

    lora_base = nn.Module
    weight_kind = FlatExpertStack
    adapted = ("w1", "v1", "w2")  # as the forward takes their matrices
    down = "w2"
    stored_transposed = False
    peft_reads = False

    @classmethod
    def _alone(cls, module: Any, name: str) -> Any:
        layer = super()._alone(module, name)
        layer.__dict__.update(transposed=name == cls.down)
        return layer

    def to_peft(self) -> dict[str, Tensor]:
        """Return the parameters under their own names."""
        return dict(self.lora_parameters())

    def _run_as_it_is(self, x: Tensor, *matrices: Tensor) -> Any:
        if self.merged or self.disabled:
            return self.base_forward(x, *matrices)
        layers: dict[str, Any] = self.by_weight()
        return self.base_forward(x, *(layer.adapted_matrix(each) for layer, each in zip(layers.values(), matrices, strict=True)))
