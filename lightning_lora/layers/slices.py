"""Adapters on slices of a fused projection, such as q and v of one linear for q, k and v.

Each slice has its own A and B: ``y[slice] += scaling · B_k·A_k·x``. They are stored one after the other: ``lora_A`` (n·r, in) and
``lora_B`` (rows of all slices, r). The update multiplies with the block form of B, (out, n·r), which has B_k at the rows of its slice. So
merging, fused operations and files need no code for slices, and x is read and dropped out once. The zeros between the blocks cost n·r
multiplications an output, little beside the base's. In PEFT's files the block form is plain LoRA of rank n·r on the whole projection.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_lora.layers.factors import Exported, Factors
from lightning_lora.layers.spec import LayerSpec, Slices
from lightning_lora.registry import data_of, frozen_factor, has_start, init_check


class Sliced(Factors):
    """Mixin before the variant of a layer whose ``spec.slices`` names some slices of its rows."""

    @classmethod
    def adapter_shapes(cls, module: Any, spec: LayerSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A, (n·r, in), and of B, (rows of the slices, r)."""
        (_, *inputs), _ = super().adapter_shapes(module, spec)
        slices = _slices(spec)
        return (len(slices.names) * spec.rank, *inputs), (slices.rows, spec.rank)

    @classmethod
    def pair_sizes(cls, module: Any, spec: LayerSpec) -> tuple[int, int, int]:
        """Return rank, inputs and outputs of the smallest slice."""
        rank, inputs, _ = super().pair_sizes(module, spec)
        slices = _slices(spec)
        return rank, inputs, slices.layout.groups * min(size for name, size in slices.layout.parts if name in slices.names)

    @classmethod
    def outputs(cls, module: Any, spec: LayerSpec) -> int:
        """Return the number of all outputs, those of other slices included."""
        return super().adapter_shapes(module, spec)[1][0]

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        """Raise ValueError also if the layout does not fit the module, or A and B have no slices with this variant or init."""
        slices, outputs = _slices(spec), cls.outputs(module, spec)
        whole = "name the fused layer itself in target_modules, instead of its slices"
        if slices.layout.rows != outputs:
            raise ValueError(f"it has {outputs} rows, its class's layout {slices.layout.parts} has {slices.layout.rows}; {whole}")
        init = spec.config.init
        if has_start(init) or frozen_factor(init) or init_check(init) or data_of(init):
            raise ValueError(f"init={init!r} computes A and B of a whole layer; {whole}")
        shapes = cls.parameter_shapes(module, spec)
        between = [name for name, shape in shapes.items() if name not in ("lora_A", "lora_B") and shape != (outputs,)]
        if between or "lora_A" not in shapes:
            raise ValueError(f"variant={spec.config.variant!r} computes with one A and B of a whole layer; {whole}")
        super().check(module, spec)  # type: ignore[misc]

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """Return A, and B in its block form (out, n·r)."""
        A, B = super().update_factors()
        return A, _slices(self.spec).placed(B)

    def exact_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return A (r, in) and B (rows of the slice, r) of each slice."""
        ((A, B),) = super().exact_pairs()
        slices = _slices(self.spec)
        return list(zip(A.chunk(len(slices.names)), slices.taken(B).split(slices.sizes), strict=True))

    def factor_rows(self) -> list[int]:
        """Return the number of rows of each slice."""
        return _slices(self.spec).sizes

    @classmethod
    def adapter_placements(cls, placement: Any) -> dict[str, Any]:
        """Raise ValueError: tensor parallelism would have to cut each slice."""
        raise ValueError(
            f"slices of a fused projection on a tensor-parallel base ({placement}) are not supported: name the fused layer itself in"
            " target_modules, or apply LoRA before parallelizing"
        )

    def exported(self) -> Exported:
        """Return plain LoRA of rank n·r on the whole projection. Our own config reads it back as slices."""
        config, rank, many = self.lora_config, self.rank, self.rank * len(_slices(self.spec).names)
        alpha = self.alpha * config.scaling_of(rank, 1) / config.scaling_of(many, 1)  # gives the same scaling
        return Exported(self.to_peft(), many, alpha, config, self.spec.kind, own=(rank, self.alpha))

    @classmethod
    def from_peft(cls, module: Any, part: str, tensor: Tensor, spec: LayerSpec) -> Tensor:
        """Return the stored form of B, given its block form.

        Raises:
            ValueError: there are other values than zeros beside the blocks.
        """
        return _slices(spec).taken(tensor) if part == "lora_B" else super().from_peft(module, part, tensor, spec)


def _slices(spec: LayerSpec) -> Slices:
    assert spec.slices is not None
    return spec.slices
