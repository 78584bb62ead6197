"""What A and B of an adapted layer are: their shapes, the matrices that they stand for, their place on a mesh, their form in files.

A kind says shapes and matrices. A variant may put something between A and B (:meth:`Factors.update_factors`); what reads the factors
through that method (the update, merging, files) then follows by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.mergeable import Mergeable
from lightning_lora.layers.spec import LayerSpec


@dataclass(frozen=True)
class Exported:
    """One layer as adapter files have it.

    Attributes:
        tensors: by PEFT's names, relative to the layer.
        rank: r of these tensors, which need not be the layer's.
        alpha: that gives these tensors the layer's update.
        config: what the layer has when the file is read back.
        kind: name of the kind that it has then; None: its module's type tells.
    """

    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    config: LoRAConfig
    kind: str | None = None


class Factors(Mergeable):
    """A low-rank pair beside a weight.

    Attributes:
        lora_A: down-projection, (r, in) for a linear.
        lora_B: up-projection, (out, r) for a linear.
    """

    #: Names of A and B in PEFT's adapter files.
    peft_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    #: What PEFT's ``adapter_config.json`` says of this variant, beside what it says of plain LoRA.
    peft_fields: ClassVar[dict[str, Any]] = {}
    #: Whether the weight is stored (in, out).
    transposed: ClassVar[bool] = False

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_config: LoRAConfig
    rank: int
    alpha: float
    lora_kind: str | None

    @property
    def scaling(self) -> float:
        """The factor in front of ``B·A``."""
        return self.lora_config.scaling_of(self.rank, self.alpha)

    # Shapes and matrices.

    @classmethod
    def adapter_shapes(cls, module: Any, spec: LayerSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of ``lora_A`` and ``lora_B`` for a module of this kind."""
        raise NotImplementedError(f"{cls.__name__} has to say its adapter's shapes")

    @classmethod
    def parameter_shapes(cls, module: Any, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Name → shape of every adapter parameter: A and B, and what a variant has beside them."""
        return dict(zip(("lora_A", "lora_B"), cls.adapter_shapes(module, spec), strict=True))

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """A and B as the update multiplies them; a variant may put something between them."""
        return self.lora_A, self.lora_B

    def lora_factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The factor that starts random and the one that starts at zero."""
        return self.lora_A, self.lora_B

    def to_matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as an (out, in) matrix, or as one per group: (groups, out/groups, in/groups)."""
        return tensor.t() if self.transposed else tensor

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`to_matrix`."""
        return matrix.t() if self.transposed else matrix

    def factor_matrices(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), or one each per group; ``scaling · B @ A`` is the update of :meth:`to_matrix` of the weight."""
        return self.update_factors()

    def lora_delta(self) -> Tensor:
        """``scaling · B·A`` in the weight's shape."""
        A, B = self.factor_matrices()
        return self.from_matrix(B @ A) * self.scaling

    # Tensor parallelism.

    @classmethod
    def adapter_placements(cls, placement: Any) -> dict[str, Any]:
        """Name → placement of every adapter parameter on a tensor-parallel mesh dimension, given the weight's there.

        Raises:
            ValueError: this kind cannot be adapted on such a base.
        """
        raise ValueError(f"{cls.__name__} on a tensor-parallel base ({placement}) is not supported; apply LoRA before parallelizing")

    # Files.

    def to_peft(self) -> dict[str, Tensor]:
        """The adapter's tensors under the names, and in the shapes, that PEFT has for them."""
        return dict(zip(self.peft_names, self.update_factors(), strict=True))

    def exported(self) -> Exported:
        """This layer as adapter files have it; a method that is a way to train and no format leaves the LoRA that it computes."""
        return Exported(self.to_peft(), self.rank, self.alpha, self.lora_config, self.lora_kind)

    @classmethod
    def from_peft(cls, module: Any, part: str, tensor: Tensor) -> Tensor:
        """PEFT's tensor for an adapter parameter in the shape that this kind has, where the two differ; else unchanged.

        Raises:
            ValueError: it cannot be brought into that shape.
        """
        return tensor
