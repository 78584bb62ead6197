"""Convolutions: A convolves with the base's kernel, stride, padding and groups into r channels, B mixes them with 1×1.

``scaling · B∗(A∗x)`` is again a convolution with the base's geometry, with the kernel ``B·A`` per group, so it merges.
PEFT's A ignores the groups, (r, in, *kernel): its update is not a grouped convolution and cannot merge. Ours goes into
that shape exactly (zeros between the groups); back only what has zeros there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.registry import register_kind


@register_kind(nn.Conv1d, nn.Conv2d, nn.Conv3d, name="conv")
class LoRAConv(LoRALayer):
    """A convolution with a low-rank update: ``lora_A`` (r, in/groups, *kernel), ``lora_B`` (out, r/groups, 1, …)."""

    groups: int
    kernel_size: tuple[int, ...]

    @classmethod
    def adapter_shapes(cls, module: Any, spec: LayerSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A (r, in/groups, *kernel), B (out, r/groups, 1, …)."""
        ones = (1,) * len(module.kernel_size)
        return (spec.rank, module.in_channels // module.groups, *module.kernel_size), (
            module.out_channels,
            spec.rank // module.groups,
            *ones,
        )

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        """The r channels are shared out evenly among the groups."""
        super().check(module, spec)
        if spec.rank % module.groups:
            raise ValueError(
                f"rank={spec.rank} is not a multiple of groups={module.groups}, so the groups cannot share it evenly; choose one that is"
            )

    @classmethod
    def example_input(cls, module: Any, generator: torch.Generator) -> Tensor:
        """(2, in, *spatial), twice as long as the kernel reaches."""
        reach = [2 * dilation * (size - 1) + 3 for size, dilation in zip(module.kernel_size, module.dilation, strict=True)]
        return torch.randn(2, module.in_channels, *reach, generator=generator, dtype=torch.float64)

    def lora_update(self, y: Tensor, x: Tensor) -> Tensor:
        """``y + scaling · B∗(A∗dropout(x))``; x (N, in, *spatial), y (N, out, *spatial)."""
        x = F.dropout(x.to(y.dtype), self.dropout_now())
        A, B = self.update_factors()
        t = self._conv_forward(x, A.to(y.dtype), None)  # type: ignore[operator]  # (N, r, *spatial), padding modes too
        convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[len(self.kernel_size) - 1]
        return y + convolve(t * self.scaling, B.to(y.dtype), groups=self.groups)

    def to_matrix(self, tensor: Tensor) -> Tensor:
        """Kernels (out, in/groups, *kernel) as (groups, out/groups, in/groups·kernel)."""
        return tensor.flatten(1).unflatten(0, (self.groups, -1))

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse."""
        return matrix.flatten(0, 1).unflatten(1, (-1, *self.kernel_size))

    def factor_matrices(self) -> tuple[Tensor, Tensor]:
        """A (groups, r/groups, in/groups·kernel), B (groups, out/groups, r/groups)."""
        A, B = self.update_factors()
        return self.to_matrix(A), self.to_matrix(B)

    def per_output(self, vector: Tensor) -> Tensor:
        """(out, 1, …)."""
        return vector.view(-1, *(1,) * len(self.kernel_size))

    def to_peft(self) -> dict[str, Tensor]:
        """A as an ungrouped kernel, (r, in, *kernel)."""
        tensors = super().to_peft()
        if self.groups > 1:
            blocks = self.update_factors()[0].detach().unflatten(0, (self.groups, -1))  # (groups, r/groups, in/groups, *kernel)
            full = blocks.new_zeros(self.groups, blocks.shape[1], self.groups, *blocks.shape[2:])
            for group, block in enumerate(blocks):
                full[group, :, group] = block
            tensors["lora_A.weight"] = full.flatten(2, 3).flatten(0, 1)
        return tensors

    @classmethod
    def from_peft(cls, module: Any, part: str, tensor: Tensor) -> Tensor:
        """The diagonal blocks of an ungrouped A; ValueError if there is anything beside them."""
        groups = module.groups
        if part != "lora_A" or groups == 1 or tensor.shape[1] != module.in_channels or tensor.shape[0] % groups:
            return tensor
        full = tensor.unflatten(1, (groups, -1)).unflatten(0, (groups, -1))  # (groups, r/groups, groups, in/groups, *kernel)
        blocks = torch.stack([full[group, :, group] for group in range(groups)]).flatten(0, 1)
        if blocks.count_nonzero() != tensor.count_nonzero():
            raise ValueError(
                f"the adapter of a {type(module).__name__} with groups={groups} mixes the groups, as PEFT's do:"
                " it is no grouped convolution and not supported"
            )
        return blocks
