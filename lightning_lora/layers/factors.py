"""What A and B of an adapted layer are: their shapes, the matrices that they stand for, their place on a mesh, their form in files.

A kind says shapes and matrices. A variant may put something between A and B (:meth:`Factors.update_factors`); what reads the factors
through that method (the update, merging, files) then follows by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.mergeable import Mergeable
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.registry import has_start
from lightning_lora.utils.sharding import full_tensor


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
        lora_A0, lora_B0: A and B at the start, frozen; there for inits with B·A ≠ 0.
    """

    #: Names of A and B in PEFT's adapter files.
    peft_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    #: What PEFT's ``adapter_config.json`` says of this variant, beside what it says of plain LoRA.
    peft_fields: ClassVar[dict[str, Any]] = {}
    #: Names in PEFT's files of what belongs to no single layer.
    peft_shared: ClassVar[tuple[str, ...]] = ()
    #: Whether the weight is stored (in, out).
    transposed: ClassVar[bool] = False

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_A0: nn.Parameter
    lora_B0: nn.Parameter

    @property
    def scaling(self) -> float:
        """The factor in front of ``B·A``."""
        return self.lora_state.spec.scaling

    # Shapes and matrices.

    @classmethod
    def adapter_shapes(cls, module: Any, spec: LayerSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of ``lora_A`` and ``lora_B`` for a module of this kind."""
        raise NotImplementedError(f"{cls.__name__} has to say its adapter's shapes")

    @classmethod
    def parameter_shapes(cls, module: Any, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Name → shape of every adapter parameter: A and B, and what a variant has beside them."""
        A, B = cls.adapter_shapes(module, spec)
        start = {"lora_A0": A, "lora_B0": B} if has_start(spec.config.init) else {}
        return {"lora_A": A, "lora_B": B, **start}

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """A and B as the update multiplies them; a variant may put something between them.

        With a start that is kept they have twice the rank: ``B·A − B₀·A₀ = [B − B₀ | B₀]·[A ; A − A₀]``. Taken so, the update is exactly
        zero at the start, and a small change is not rounded away beside a large start.
        """
        A0 = self._parameters.get("lora_A0")
        if A0 is None:
            return self.lora_A, self.lora_B
        A, B, B0 = self.lora_A, self.lora_B, self.lora_B0
        return torch.cat((A, A - A0)), torch.cat((B - B0, B0), 1)

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

    @torch.no_grad()
    def adds_nothing(self) -> bool:
        """Whether the update is zero, up to the rounding of A and B."""
        A, B = (full_tensor(factor.detach()).double() for factor in self.factor_matrices())
        square = ((B.mT @ B) * (A @ A.mT)).sum()  # ‖B·A‖², without the dense product
        return bool(square <= 1e-12 * A.square().sum() * B.square().sum())

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
        config, rank = self.lora_config, self.rank
        if "lora_A0" not in self._parameters:
            return Exported(self.to_peft(), rank, self.alpha, config, self.spec.kind)
        alpha = self.alpha * config.scaling_of(rank, 1) / config.scaling_of(2 * rank, 1)  # the same scaling
        return Exported(self.to_peft(), 2 * rank, alpha, replace(config, init=LoRAConfig().init), self.spec.kind)

    @classmethod
    def take_shared(cls, layers: Sequence[tuple[Any, LayerSpec]], tensors: dict[str, Tensor]) -> None:
        """Take what belongs to no single layer (:attr:`peft_shared`) out of a file's tensors.

        Args:
            layers: modules, adapted or not, and their specs; all that the file is for.
            tensors: of the file; changed.

        Raises:
            ValueError: it does not fit these layers.
        """

    @classmethod
    def to_peft_fields(cls, fields: dict[str, Any], config: LoRAConfig) -> dict[str, Any]:
        """PEFT's ``adapter_config.json`` for this variant, given plain LoRA's."""
        return fields | cls.peft_fields

    @classmethod
    def from_peft_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The inverse: this variant's fields in the words of PEFT's ``LoraConfig``, with ``variant_options``."""
        return fields

    @classmethod
    def from_peft(cls, module: Any, part: str, tensor: Tensor) -> Tensor:
        """PEFT's tensor for an adapter parameter in the shape that this kind has, where the two differ; else unchanged.

        Raises:
            ValueError: it cannot be brought into that shape.
        """
        return tensor
