"""DoRA: LoRA turns the weight, a vector says how long it is (arXiv:2402.09353, equation 5)::

    W' = m ∘ (W + s·B·A) / ‖W + s·B·A‖           one m and one norm an output, over all its inputs

The norm is a constant to the gradient (section 4.3), and ``m`` starts at ‖W‖, so an adapted layer starts as its base. Dropout
acts on the input of all that was adapted and never on the base's own (as in the authors' code and PEFT's):
``W·x + (g − 1)∘W·x̃ + g∘s·B·A·x̃`` with g = m/‖·‖ and x̃ the input after dropout. It costs a second product with W.

The norm needs no dense B·A: with one row of W and B at a time, ‖W + sBA‖² = ‖W‖² + 2s·(W·Aᵀ)·B + s²·(B·A·Aᵀ)·B. The first term is
frozen and kept, the second costs what r more tokens would.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.fused_ops import wants_definition
from lightning_lora.layers.base import LoRALayer
from lightning_lora.ops import transformed
from lightning_lora.registry import VARIANTS, register
from lightning_lora.sharding import is_sharded, local, piece_of, whole

MAGNITUDE = "lora_magnitude_vector"  # PEFT's name for it


@register(VARIANTS, "dora")
class DoRA(LoRALayer):
    """A magnitude vector before any kind.

    Attributes:
        lora_magnitude_vector: m, (out,), fp32 or wider as the factors.
    """

    peft_fields: ClassVar[dict[str, Any]] = {"use_dora": True}

    lora_magnitude_vector: nn.Parameter
    lora_square: tuple[tuple[Any, ...], Tensor] | None = None  # ‖W‖² and which W it is of

    @classmethod
    def parameter_shapes(cls, module: Any, rank: int) -> dict[str, tuple[int, ...]]:
        """The kind's, and m: (out,)."""
        shapes = super().parameter_shapes(module, rank)
        return shapes | {MAGNITUDE: shapes["lora_B"][:1]}

    @classmethod
    def adapter_placements(cls, placement: Any) -> tuple[Any, Any]:
        """The norms would be of pieces of rows."""
        raise ValueError(f"variant='dora' on a tensor-parallel base ({placement}) is not supported; use variant='plain'")

    def reset_lora_parameters(self) -> None:
        """A and B as the init has it, m at the norm that this gives."""
        super().reset_lora_parameters()
        self.reset_magnitude()

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Set m to ‖W + s·B·A‖: the weight as plain LoRA has it.

        Raises:
            ValueError: the weight cannot be read here.
        """
        if self.weight.ndim < 2:
            raise ValueError("variant='dora' needs the norms of the weight, which FSDP1 has flattened: apply LoRA before wrapping")
        self.lora_square = None
        norm = self._norm_of(whole(self.base_weight().detach()), *(whole(factor.detach()) for factor in self.factor_matrices()))
        local(self.lora_magnitude_vector).copy_(piece_of(norm, self.lora_magnitude_vector))

    # The formula.

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``g∘(W·x + s·B·A·x) + b``, or with dropout the three terms above."""
        dropout = super().dropout_now() if input.is_floating_point() else 0.0  # a dropped id has no meaning
        if self.merged or not dropout:
            return super().forward(input, *args, **kwargs)
        x = F.dropout(input, dropout)
        again = self.base_forward(x, *args, **kwargs)
        rest = self.base_forward(input, *args, **kwargs) - again
        return self.lora_output(self.lora_update(again, x)) + rest

    def dropout_now(self) -> float:
        """0: what the kind's update gets has been through it."""
        return 0.0

    def lora_output(self, z: Tensor) -> Tensor:
        """``g∘(z − b) + b``."""
        gain, own = self.per_output(self.lora_magnitude_vector / self.norm()), self._parameters.get("bias")
        bias = None if own is None else self.per_output(own)
        if transformed() or is_sharded(z):
            return (z * gain if bias is None else (z - bias) * gain + bias).to(z.dtype)
        with _no_autocast(z):
            return _Rescale.apply(z, gain, bias)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """‖W + s·B·A‖ of every output, (out,), in the factors' dtype."""
        return self._norm_of(self.base_weight(), *self.factor_matrices())

    def _norm_of(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        W, s = self.to_matrix(weight), self.scaling  # W (…, out, in), A (…, r, in), B (…, out, r)
        with _no_autocast(W):
            cross = (A.to(W.dtype) @ W.mT).mT.to(B.dtype) * (2 * s)  # (…, out, r); this way round is the faster one
            square = (torch.add(cross, B @ (A @ A.mT), alpha=s * s) * B).sum(-1).flatten() + self._square(W, B.dtype)
        return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()

    def _square(self, W: Tensor, dtype: torch.dtype) -> Tensor:
        """‖W‖² of every output, computed again only if the weight changed."""
        if transformed() or is_sharded(W) or self.weight.is_inference() or self.weight.is_meta:
            return _square(W, dtype)
        weight = self.weight
        key = (weight.data_ptr(), weight._version, weight.dtype, weight.device, dtype)
        if not key[0]:  # a subclass without a storage of its own: nothing tells that it changed
            return _square(W, dtype)
        if self.lora_square is None or self.lora_square[0] != key:
            self.lora_square = key, _square(W, dtype)
        return self.lora_square[1]

    # Merging: W' = g∘(W + s·B·A).

    def lora_delta(self) -> Tensor:
        """``g∘(W + s·B·A) − W``, dense.

        Raises:
            RuntimeError: the layer is merged, and W is not there to compute it from.
        """
        if self.merged:
            raise RuntimeError("the update of a merged DoRA layer depends on the base weight: unmerge first")
        delta = self.merge_delta()
        weight, gain = self._weight_for(delta), self.merge_gain(delta)
        return (weight + delta) * gain - weight

    def merge_delta(self) -> Tensor:
        """``s·B·A``."""
        return super().lora_delta()

    def merge_gain(self, delta: Tensor) -> Tensor:
        """g, from the dense sum, which is there anyway."""
        rows = self.to_matrix(self._weight_for(delta) + delta)
        norm = rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny ** 0.5)
        gain = self.lora_magnitude_vector.view(norm.shape) / norm
        return self.from_matrix(gain.expand(rows.shape))

    def _weight_for(self, delta: Tensor) -> Tensor:
        return whole(self.base_weight().detach()).to(delta)

    # Files.

    def to_peft(self) -> dict[str, Tensor]:
        """With m as PEFT has it: for convolutions (1, out, 1, …)."""
        if self.factor_matrices()[0].shape[:-2].numel() > 1:
            warnings.warn(
                f"{self} is a grouped convolution under DoRA: PEFT 0.21 takes other norms there, and would compute something else"
                " from this file.",
                stacklevel=3,
            )
        m = self.per_output(self.lora_magnitude_vector)
        return super().to_peft() | {MAGNITUDE: m if m.ndim == 1 else m.unsqueeze(0)}

    @classmethod
    def from_peft(cls, module: Any, part: str, tensor: Tensor) -> Tensor:
        """m as a vector."""
        return tensor.flatten() if part == MAGNITUDE else super().from_peft(module, part, tensor)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.lora_square = None
        # Base weights that come after the adapter (a start on the meta device, say): an adapter that is as it started starts from them.
        _, zero = self.lora_factors()
        alone = prefix + "weight" in state_dict and prefix + MAGNITUDE not in state_dict and not self.merged
        if alone and not zero.is_meta and not whole(zero.detach()).any():
            self.reset_magnitude()


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def _square(W: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(W, dim=-1, dtype=dtype).square().flatten()


class _Rescale(torch.autograd.Function):
    """``z + h∘(z − b)`` with h = g − 1 in z's dtype: rounding h costs little where rounding g would freeze small changes of m.

    h and b are one number an output and broadcast over z. The passes over z are what DoRA costs, so there is one forward and two,
    in one buffer, backward.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, gain, bias)
        h = (gain - 1).to(z.dtype)
        y = torch.addcmul(z, z, h)
        return y if bias is None else y.sub_(h * bias.to(z.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        z, gain, bias = ctx.saved_tensors
        h, dz, dgain, dbias = (gain - 1).to(z.dtype), None, None, None
        axis = z.ndim - gain.ndim
        others = [dim for dim in range(z.ndim) if dim != axis]

        wide = None if bias is None else gain.dtype  # with a bias two sums are subtracted, and half precision would show

        def summed(tensor: Tensor) -> Tensor:
            return (tensor.sum(others, dtype=wide) if others else tensor.clone()).to(gain.dtype).view(gain.shape)

        buffer = None if wants_definition(grad) else torch.empty_like(z)
        if ctx.needs_input_grad[1]:
            dgain = summed(torch.mul(grad, z, out=buffer))
        if bias is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            total = summed(grad)
            dgain = None if dgain is None else dgain - total * bias
            dbias = (total * (1 - gain)).to(bias.dtype) if ctx.needs_input_grad[2] else None
        if ctx.needs_input_grad[0]:
            dz = torch.addcmul(grad, grad, h, out=buffer)
        return dz, dgain, dbias
