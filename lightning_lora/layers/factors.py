"""A and B of an adapted layer: their shapes, their matrices, their placements on a mesh, and their form in adapter files.

A kind defines shapes and matrices. A variant may insert something between A and B (:meth:`Factors.update_factors`). The update,
merging and files read the factors through that method only, so they follow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.mergeable import Mergeable
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.registry import data_of, has_start
from lightning_lora.utils.sharding import full_tensor


@dataclass(frozen=True)
class Exported:
    """One layer as adapter files store it.

    Attributes:
        tensors: by PEFT's names, relative to the layer.
        rank: r of these tensors, which may differ from the layer's.
        alpha: the alpha with which these tensors give the layer's update.
        config: the layer's config when the file is read back.
        kind: name of its kind then; None: the module's type decides.
        own: rank and alpha of the layer that reads the tensors back, where they are not those of the tensors.
        peft_parameters: names of the module's parameters that PEFT targets one by one; empty where it targets the module.
    """

    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    config: LoRAConfig
    kind: str | None = None
    own: tuple[int, float] | None = None
    peft_parameters: tuple[str, ...] = ()


class Factors(Mergeable):
    """A low-rank pair added to a weight.

    Attributes:
        lora_A: down-projection, (r, in) for a linear.
        lora_B: up-projection, (out, r) for a linear.
        lora_A0, lora_B0: A and B at the start, frozen; only for inits with B·A ≠ 0.
    """

    #: Names of A and B in PEFT's adapter files.
    peft_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    #: Name of a parameter in PEFT's files, as :mod:`lightning_lora.adapter_io.peft_names` reads it → its own name, where the two differ.
    file_names: ClassVar[dict[str, str]] = {}
    #: Fields of PEFT's ``adapter_config.json`` for this variant, in addition to those of plain LoRA.
    peft_fields: ClassVar[dict[str, Any]] = {}
    #: Names in PEFT's files of tensors that belong to no single layer.
    peft_shared: ClassVar[tuple[str, ...]] = ()
    #: Names of the module's parameters that PEFT targets one by one; empty where it targets the module.
    peft_parameters: ClassVar[tuple[str, ...]] = ()
    #: False if PEFT cannot adapt such a module.
    peft_reads: ClassVar[bool] = True
    #: True if the weight is stored as (in, out).
    transposed: ClassVar[bool] = False

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_A0: nn.Parameter
    lora_B0: nn.Parameter

    @property
    def scaling(self) -> float:
        """The factor that multiplies ``B·A``."""
        return self.lora_state.spec.scaling

    # Shapes and matrices.

    @classmethod
    def adapter_shapes(cls, module: Any, spec: LayerSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of ``lora_A`` and ``lora_B`` for a module of this kind."""
        raise NotImplementedError(f"{cls.__name__} must define adapter_shapes")

    @classmethod
    def default_rank(cls, module: Any, config: LoRAConfig, model: nn.Module) -> int:
        """Return the rank of a module that no ``rank_pattern`` matches.

        Args:
            module: of this kind.
            config: of the model.
            model: the model that has the module.

        Raises:
            ValueError: an option of the kind asks for a rank that cannot be told; the message is the reason only.
        """
        return config.rank

    @classmethod
    def pair_sizes(cls, module: Any, spec: LayerSpec) -> tuple[int, int, int]:
        """Return rank, inputs and outputs of one A and B: those of a group, if the layer has groups."""
        (rows, *inputs), (outputs, rank, *_) = cls.adapter_shapes(module, spec)
        return rank, math.prod(inputs), outputs // (rows // rank)

    @classmethod
    def outputs(cls, module: Any, spec: LayerSpec) -> int:
        """Return the number of output channels of a module of this kind."""
        return cls.adapter_shapes(module, spec)[1][0]

    @classmethod
    def parameter_shapes(cls, module: Any, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Return name → shape of every adapter parameter: A and B, and those that a variant adds."""
        A, B = cls.adapter_shapes(module, spec)
        start = {"lora_A0": A, "lora_B0": B} if has_start(spec.config.init) else {}
        return {"lora_A": A, "lora_B": B, **start}

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B as the update multiplies them. A variant may insert something between them.

        If the start is kept, they have twice the rank: ``B·A − B₀·A₀ = [B − B₀ | B₀]·[A ; A − A₀]``. In this form the update is exactly
        zero at the start. A small change is not rounded away beside a large start.
        """
        A0 = self._parameters.get("lora_A0")
        if A0 is None:
            return self.lora_A, self.lora_B
        A, B, B0 = self.lora_A, self.lora_B, self.lora_B0
        return torch.cat((A, A - A0)), torch.cat((B - B0, B0), 1)

    def lora_factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Return the factor that starts at random, then the factor that starts at zero."""
        return self.lora_A, self.lora_B

    def factor_rows(self) -> list[int]:
        """Return how many rows of B belong to each product ``B·A``, in the order of A's rows. A B that all share has one entry.

        Most layers have one product. A grouped convolution, a stack of experts and slices of a projection have several, each of
        ``lora_B.shape[1]`` rows of A.
        """
        products = self.lora_A.shape[0] // self.lora_B.shape[1]
        return [self.lora_B.shape[0] // products] * products

    def to_matrix(self, tensor: Tensor) -> Tensor:
        """Reshape a tensor of the weight's shape to an (out, in) matrix.

        A kind with groups returns one matrix per group: (groups, out/groups, in/groups).
        """
        return tensor.t() if self.transposed else tensor

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Invert :meth:`to_matrix`."""
        return matrix.t() if self.transposed else matrix

    def factor_matrices(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r), or one pair per group.

        ``scaling · B @ A`` is the update of the weight's :meth:`to_matrix`.
        """
        return self.update_factors()

    @torch.no_grad()
    def exact_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return A (..., r, in) and B (..., out, r) of each product whose sum or stack is the update; full tensors on the adapter's device.

        A collective on sharded layers.
        """
        return [self._exactly(next(iter(self.lora_parameters().values())).device, self.factor_matrices)]

    def lora_delta(self) -> Tensor:
        """Return ``scaling · B·A`` in the weight's shape."""
        A, B = self.factor_matrices()
        return self.from_matrix(B @ A) * self.scaling

    @torch.no_grad()
    def adds_nothing(self) -> bool:
        """True if the update is zero, up to the rounding of A and B."""
        A, B = (full_tensor(factor.detach()).double() for factor in self.factor_matrices())
        square = ((B.mT @ B) * (A @ A.mT)).sum()  # ‖B·A‖², without the dense product
        return bool(square <= 1e-12 * A.square().sum() * B.square().sum())

    # Tensor parallelism.

    @classmethod
    def adapter_placements(cls, placement: Any) -> dict[str, Any]:
        """Return name → placement of every adapter parameter on a tensor-parallel mesh dimension.

        Args:
            placement: the weight's placement on that dimension.

        Raises:
            ValueError: this kind cannot be adapted on such a base.
        """
        raise ValueError(f"{cls.__name__} on a tensor-parallel base ({placement}) is not supported; apply LoRA before parallelizing")

    # Files.

    def to_peft(self) -> dict[str, Tensor]:
        """Return the adapter's tensors under PEFT's names and in PEFT's shapes."""
        return dict(zip(self.peft_names, self.update_factors(), strict=True))

    def exported(self) -> Exported:
        """Return this layer as adapter files store it.

        A variant that is a training method and not a format exports the plain LoRA that it computes.
        """
        config, rank = self.lora_config, self.rank
        if has_start(config.init) or data_of(config.init) is not None:  # who reads the file needs neither the start nor the data
            config = replace(config, init=LoRAConfig().init, init_options={})
        if "lora_A0" not in self._parameters:
            return Exported(self.to_peft(), rank, self.alpha, config, self.spec.kind)
        alpha = self.alpha * config.scaling_of(rank, 1) / config.scaling_of(2 * rank, 1)  # gives the same scaling
        return Exported(self.to_peft(), 2 * rank, alpha, config, self.spec.kind)

    @classmethod
    def take_shared(cls, layers: Sequence[tuple[Any, LayerSpec]], tensors: dict[str, Tensor]) -> None:
        """Check a file's tensors that belong to no single layer (:attr:`peft_shared`), and remove them from ``tensors``.

        The layers do not read them: what they share is drawn again from a seed.

        Args:
            layers: modules, adapted or not, with their specs; all that the file is for.
            tensors: tensors of the file; modified.

        Raises:
            ValueError: the shared tensors do not fit these layers.
        """

    @classmethod
    def to_peft_fields(cls, fields: dict[str, Any], config: LoRAConfig) -> dict[str, Any]:
        """Return PEFT's ``adapter_config.json`` for this variant, given plain LoRA's."""
        return fields | cls.peft_fields

    @classmethod
    def from_peft_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Invert :meth:`to_peft_fields`: return this variant's fields under the names of PEFT's ``LoraConfig``.

        The result has ``variant_options`` too.
        """
        return fields

    @classmethod
    def from_peft(cls, module: Any, part: str, tensor: Tensor, spec: LayerSpec) -> Tensor:
        """Return PEFT's tensor for an adapter parameter in this kind's shape; unchanged where the shapes agree.

        Raises:
            ValueError: it cannot be converted to that shape.
        """
        return tensor
