"""Linear layers: ``y = W₀x + b + scaling · B(A·dropout(x))`` (LoRA, arXiv:2106.09685, equation 3).

``LoRALinear`` is the class of an adapted ``nn.Linear`` and the mixin for its subclasses, quantized ones included.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.adapting import adapt, refusal, shallow_copy, unadapt
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.linearity import why_not_linear
from lightning_lora.layers.shared_input import SharedInputGroup, compute
from lightning_lora.layers.tensor_parallel import local_forward
from lightning_lora.ops import backends, low_rank
from lightning_lora.ops.frozen_weight import FrozenWeight, WeightReader, reader_of
from lightning_lora.quantization.formats import format_of
from lightning_lora.registry import register_kind
from lightning_lora.utils.sharding import is_sharded


@register_kind(nn.Linear)
class LoRALinear(LoRALayer, nn.Linear):
    """An ``nn.Linear`` with a low-rank update; constructible, or made from a linear by :meth:`from_linear`.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        rank: r.
        alpha: scaling numerator.
        dropout: probability on the adapter's input.
        bias: whether the base has a bias.
        device: of the base and the adapter.
        dtype: of the base; the adapter is at least fp32.

    Shape:
        input (..., in), output (..., out), ``lora_A`` (r, in), ``lora_B`` (out, r).
    """

    lora_base = nn.Linear
    is_linear = True
    #: The linears that are computed together with this one; :func:`lightning_lora.model.fuse.fuse` sets it.
    shared_input: SharedInputGroup | None = None
    #: How the base stores what its forward multiplies by; None if that does more, or is not known.
    weight_reader: ClassVar[WeightReader | None] = reader_of(nn.Linear)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.weight_reader = reader_of(cls.lora_base)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.init_adapter(LoRAConfig(rank=rank, alpha=alpha, dropout=dropout), rank, float(alpha))

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> LoRALinear:
        """A LoRA layer over the same weight, frozen; ``linear`` itself is never changed, not by a merge either.

        Args:
            linear: an ``nn.Linear`` or a subclass.
            rank: r.
            alpha: scaling numerator.
            dropout: probability on the adapter's input.

        Raises:
            ValueError: this linear cannot be adapted, or a number is out of range.
        """
        if isinstance(linear, LoRALayer):
            raise ValueError(f"linear is a {type(linear).__name__} and has an adapter already; give linear.linear, its base.")
        config = LoRAConfig(rank=rank, alpha=alpha, dropout=dropout)
        name = type(linear).__name__
        reason = refusal(linear, name, rank, dropout) or why_not_linear(linear)
        if reason:
            raise ValueError(reason if name in reason else f"{name}: {reason}.")
        layer = shallow_copy(linear)
        for name, parameter in linear._parameters.items():
            if parameter is not None and not (name == "weight" and format_of(linear)):  # a packed weight is frozen and never written to
                layer._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
        adapt(layer, config, rank, float(alpha))
        layer._owns_weight = False
        assert isinstance(layer, LoRALinear)
        return layer

    @property
    def linear(self) -> nn.Linear:
        """A view of the frozen base as the class it had, over the same tensors."""
        view = unadapt(shallow_copy(self))
        assert isinstance(view, nn.Linear)
        return view

    @property
    def plain_forward(self) -> bool:
        """Whether the base's forward is ``nn.Linear``'s own, whose output is a fresh tensor that may be added to in place."""
        return type(self).lora_base.forward is nn.Linear.forward

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's forward plus the update; one operation for both, and for the scale, where nothing stands in the way."""
        if not self.merged and not args and not kwargs:
            y = None if self.shared_input is None else self.shared_input.output(self, input)
            if y is None and self.fusable(input):
                y = compute([self], input)[0]
            if y is None and is_sharded(input) and self.plain_forward and self.is_plain_sum() and not self.has_output_scale:
                y = local_forward(self, input)
            if y is not None:
                return y
        return super().forward(input, *args, **kwargs)

    def fusable(self, x: Tensor) -> bool:
        """Whether base and update can be one operation for x: the base's product is known, the update the plain one, nothing in pieces."""
        cls = type(self)
        return (
            cls.weight_reader is not None
            and self.is_plain_sum()
            and not self.merged
            and not (is_sharded(x) or is_sharded(self.lora_A))
            and x.layout is torch.strided
            and not x.is_nested
            and cls.weight_reader.can_read(self, x)
            # Where the kernels do not serve, a compiler fuses the definition itself; torch.func wants plain operations.
            and (backends.usable(x) if torch.compiler.is_compiling() else not torch._C._are_functorch_transforms_active())
        )

    def is_plain_sum(self) -> bool:
        """Not for a variant with an update or an output of its own."""
        cls = type(self)
        return super().is_plain_sum() and cls.lora_update is LoRALinear.lora_update and cls.lora_output is LoRALinear.lora_output

    def frozen_weight(self) -> FrozenWeight:
        """The base's weight as operations take it; for a layer that is :meth:`fusable`."""
        assert self.weight_reader is not None
        return self.weight_reader.read(self)

    @classmethod
    def adapter_shapes(cls, module: nn.Linear, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A (r, in), B (out, r)."""
        return (rank, module.in_features), (module.out_features, rank)

    @classmethod
    def example_input(cls, module: nn.Linear, generator: torch.Generator) -> Tensor:
        """(2, 3, in)."""
        return torch.randn(2, 3, module.in_features, generator=generator, dtype=torch.float64)

    @classmethod
    def adapter_placements(cls, placement: Any) -> tuple[Any, Any]:
        """Colwise (rows of W split): A whole, B split; rowwise (columns of W split): A split, B whole."""
        from torch.distributed.tensor import Replicate, Shard

        split = getattr(placement, "dim", None)
        return (Shard(1) if split == 1 else Replicate()), (Shard(0) if split == 0 else Replicate())

    def lora_update(self, y: Tensor, x: Tensor) -> Tensor:
        """``y + scaling · B·A·dropout(x)``."""
        return low_rank.lora_update(y, x, *self.update_factors(), self.scaling, self.dropout_now(), inplace=self.plain_forward)
