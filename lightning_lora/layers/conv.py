"""Convolutions. A convolves into r channels with the base's kernel, stride, padding and groups; B mixes the channels with a 1×1 kernel.

``scaling · B∗(A∗x)`` is again a convolution with the base's geometry. Its kernel is ``B·A`` per group, so it can be merged.
PEFT's A ignores the groups: its shape is (r, in, *kernel). So PEFT's update is not a grouped convolution and cannot be merged.
A is exported to that shape exactly, with zeros between the groups. Only tensors with zeros there are imported.
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

    sizes = ("in_channels", "out_channels", "kernel_size", "groups")
    groups: int
    kernel_size: tuple[int, ...]

    @classmethod
    def weight_shape(cls, module: Any) -> tuple[int, ...]:
        """Return (out, in/groups, *kernel)."""
        return module.out_channels, module.in_channels // module.groups, *module.kernel_size

    @classmethod
    def adapter_shapes(cls, module: Any, spec: LayerSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A, (r, in/groups, *kernel), and of B, (out, r/groups, 1, …)."""
        ones = (1,) * len(module.kernel_size)
        return (spec.rank, module.in_channels // module.groups, *module.kernel_size), (
            module.out_channels,
            spec.rank // module.groups,
            *ones,
        )

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        """Raise ValueError also if the rank is not a multiple of the groups: the r channels are split evenly among them."""
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
        """Return ``y + scaling · B∗(A∗dropout(x))``; x (N, in, *spatial), y (N, out, *spatial)."""
        x = F.dropout(x.to(y.dtype), self.dropout_now())
        A, B = self.update_factors()
        t = self._conv_forward(x, A.to(y.dtype), None)  # type: ignore[operator]  # (N, r, *spatial), padding modes too
        convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[len(self.kernel_size) - 1]
        return y + convolve(t * self.scaling, B.to(y.dtype), groups=self.groups)

    def to_matrix(self, tensor: Tensor) -> Tensor:
        """Reshape kernels (out, in/groups, *kernel) to (groups, out/groups, in/groups·kernel)."""
        return tensor.flatten(1).unflatten(0, (self.groups, -1))

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Invert :meth:`to_matrix`."""
        return matrix.flatten(0, 1).unflatten(1, (-1, *self.kernel_size))

    def factor_matrices(self) -> tuple[Tensor, Tensor]:
        """Return A (groups, r/groups, in/groups·kernel) and B (groups, out/groups, r/groups)."""
        A, B = self.update_factors()
        return self.to_matrix(A), self.to_matrix(B)

    def per_output(self, vector: Tensor) -> Tensor:
        """Reshape (out,) to (out, 1, …)."""
        return vector.view(-1, *(1,) * len(self.kernel_size))

    def to_peft(self) -> dict[str, Tensor]:
        """Return the tensors in PEFT's shapes: A as an ungrouped kernel, (r, in, *kernel)."""
        tensors = super().to_peft()
        if self.groups > 1:
            blocks = self.update_factors()[0].detach().unflatten(0, (self.groups, -1))  # (groups, r/groups, in/groups, *kernel)
            full = blocks.new_zeros(self.groups, blocks.shape[1], self.groups, *blocks.shape[2:])
            for group, block in enumerate(blocks):
                full[group, :, group] = block
            tensors["lora_A.weight"] = full.flatten(2, 3).flatten(0, 1)
        return tensors

    @classmethod
    def from_peft(cls, module: Any, part: str, tensor: Tensor, spec: LayerSpec) -> Tensor:
        """Return the diagonal blocks of an ungrouped A.

        Raises:
            ValueError: A has nonzero entries outside these blocks.
        """
        groups = module.groups
        if part != "lora_A" or groups == 1 or tensor.shape[1] != module.in_channels or tensor.shape[0] % groups:
            return tensor
        full = tensor.unflatten(1, (groups, -1)).unflatten(0, (groups, -1))  # (groups, r/groups, groups, in/groups, *kernel)
        blocks = torch.stack([full[group, :, group] for group in range(groups)]).flatten(0, 1)
        if blocks.count_nonzero() != tensor.count_nonzero():
            raise ValueError(
                f"the adapter of a {type(module).__name__} with groups={groups} mixes the groups, as PEFT's do:"
                " it is not a grouped convolution, so it is not supported"
            )
        return blocks
