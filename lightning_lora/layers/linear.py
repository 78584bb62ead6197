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
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.layers.tensor_parallel import local_forward
from lightning_lora.ops import backends, low_rank
from lightning_lora.ops.frozen_weight import FrozenWeight, WeightReader, reader_of
from lightning_lora.ops.fused_linear import serves
from lightning_lora.quantization.formats import format_of
from lightning_lora.registry import register_kind
from lightning_lora.utils.sharding import is_sharded


@register_kind(nn.Linear, name="linear")
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

    # What the class decides for all its layers, so that no call asks for it.

    #: Reads what the base's forward multiplies by; None if that does more, or is not known.
    weight_reader: ClassVar[WeightReader | None] = reader_of(nn.Linear)
    #: Whether the base's forward is ``nn.Linear``'s own, whose output is a fresh tensor that may be added to in place.
    plain_forward: ClassVar[bool] = True
    #: Whether update and output are those of this class; a variant may have its own.
    plain_update: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.weight_reader = reader_of(cls.lora_base)
        cls.plain_forward = cls.lora_base.forward is nn.Linear.forward
        cls.plain_update = cls.lora_update is LoRALinear.lora_update and cls.lora_output is LoRALinear.lora_output

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.init_adapter(LayerSpec(LoRAConfig(rank=rank, alpha=alpha, dropout=dropout), rank, float(alpha)))

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
        name = type(linear).__name__
        spec = LayerSpec(LoRAConfig(rank=rank, alpha=alpha, dropout=dropout), rank, float(alpha), name)
        reason = refusal(linear, spec) or why_not_linear(linear)
        if reason:
            raise ValueError(reason if name in reason else f"{name}: {reason}.")
        layer = shallow_copy(linear)
        for name, parameter in linear._parameters.items():
            if parameter is not None and not (name == "weight" and format_of(linear)):  # a packed weight is frozen and never written to
                layer._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
        adapt(layer, spec)
        layer.lora_state.shares_weight = True
        assert isinstance(layer, LoRALinear)
        return layer

    @property
    def linear(self) -> nn.Linear:
        """A view of the frozen base as the class it had, over the same tensors."""
        view = unadapt(shallow_copy(self))
        assert isinstance(view, nn.Linear)
        return view

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's forward plus the update, by the first of these roads that is open.

        1. Merged or disabled, or with arguments that only the base knows: the definition, for the others do not know these.
        2. Shared input: before the others, since another layer of the group may have computed this output already.
        3. Fused: base and update as one operation, where the Triton kernels serve. Without them it was faster at no size and for no kind
           of weight (benchmarks/README.md, "The short road").
        4. Tensor parallel: on this rank's pieces, since DTensors take longer to decide where results go than to compute them.
        5. The definition (:meth:`LoRALayer.forward`): the base's forward, then :meth:`lora_update` added to it. For a small layer the
           shortest, so everything before it has to say no in a few attribute reads. Compilers and torch.func transforms take it too.

        Which one it is depends neither on grad mode nor on what another call found: a checkpointed forward runs twice, and draws the
        same dropout both times.
        """
        if self.lora_state.merge is not None or self.disabled or args or kwargs:
            return super().forward(input, *args, **kwargs)
        y = None
        if self.shared_input is not None and self.shared_input.open:
            y = self.shared_input.output(self, input)
        if y is None and backends.usable(input):
            y = self.fused_output(input)
        if y is None and is_sharded(input):
            y = self.tensor_parallel_output(input)
        elif y is None and input.ndim != 2 and self._takes_rows(input):
            rows = super().forward(input.reshape(-1, input.shape[-1]))  # of two dimensions, so that the update may be added in place
            y = rows.view(*input.shape[:-1], rows.shape[-1])
        return super().forward(input) if y is None else y

    def _takes_rows(self, x: Tensor) -> bool:
        """Whether base and update give for the rows of x (n, in) what they give for x (..., in)."""
        return self.plain_forward and self.plain_update and low_rank.has_rows(x) and not low_rank.transformed()

    def fused_output(self, x: Tensor) -> Tensor | None:
        """Road 3; None where it is closed."""
        weight = self.frozen_weight(x) if serves(x) else None
        return None if weight is None else compute([self], [weight], x)[0]

    def tensor_parallel_output(self, x: Tensor) -> Tensor | None:
        """Road 4, for a DTensor x; None where it is closed."""
        plain = self.plain_forward and not self.has_output_scale and self.is_plain_sum()
        return local_forward(self, x) if plain else None

    def frozen_weight(self, x: Tensor) -> FrozenWeight | None:
        """The base's weight, for an operation that computes the whole output for x; None if that would not be this layer's output now."""
        reader = self.weight_reader
        if reader is None or self.merged or self.disabled or not self.is_plain_sum() or is_sharded(self.lora_A) or not low_rank.has_rows(x):
            return None
        return reader.read(self, x)

    def is_plain_sum(self) -> bool:
        """Not for a variant with an update or an output of its own."""
        return self.plain_update

    @classmethod
    def adapter_shapes(cls, module: nn.Linear, spec: LayerSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A (r, in), B (out, r)."""
        return (spec.rank, module.in_features), (module.out_features, spec.rank)

    @classmethod
    def example_input(cls, module: nn.Linear, generator: torch.Generator) -> Tensor:
        """(2, 3, in)."""
        return torch.randn(2, 3, module.in_features, generator=generator, dtype=torch.float64)

    @classmethod
    def adapter_placements(cls, placement: Any) -> dict[str, Any]:
        """Colwise (rows of W split): A whole, B split; rowwise (columns of W split): A split, B whole."""
        from torch.distributed.tensor import Replicate, Shard

        split = getattr(placement, "dim", None)
        A, B = Shard(1) if split == 1 else Replicate(), Shard(0) if split == 0 else Replicate()
        return {"lora_A": A, "lora_B": B, "lora_A0": A, "lora_B0": B}

    def lora_update(self, y: Tensor, x: Tensor) -> Tensor:
        """``y + scaling · B·A·dropout(x)``."""
        return low_rank.lora_update(y, x, *self.update_factors(), self.scaling, self.dropout_now(), inplace=self.plain_forward)
