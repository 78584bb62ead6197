"""Linear layers: ``y = W₀x + b + scaling · B(A·dropout(x))`` (LoRA, arXiv:2106.09685, equation 3).

``LoRALinear`` is the class of an adapted ``nn.Linear``. It is also the mixin for subclasses of ``nn.Linear``, quantized ones included.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.adapting import adapt, refusal, shallow_copy, unadapt
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.linearity import why_not_linear
from lightning_lora.layers.plan_hooks import PlainInput
from lightning_lora.layers.shared_input import SharedInputGroup, compute
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.layers.tensor_parallel import local_forward, local_outputs
from lightning_lora.ops import backends, low_rank
from lightning_lora.ops.frozen_weight import FrozenWeight, WeightReader, reader_of
from lightning_lora.ops.fused_linear import one_operation_takes
from lightning_lora.quantization.formats import format_of
from lightning_lora.registry import register_kind
from lightning_lora.utils.sharding import is_sharded


@register_kind(nn.Linear, name="linear")
class LoRALinear(LoRALayer, nn.Linear):
    """An ``nn.Linear`` with a low-rank update. Construct it directly, or make it from a linear with :meth:`from_linear`.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        rank: r.
        alpha: numerator of the scaling.
        dropout: dropout probability on the adapter's input.
        bias: True if the base has a bias.
        device: device of the base and the adapter.
        dtype: dtype of the base; the adapter is fp32 or wider.

    Shape:
        input (..., in), output (..., out), ``lora_A`` (r, in), ``lora_B`` (out, r).

    Examples:
        >>> layer = LoRALinear.from_linear(torch.nn.Linear(16, 8), rank=2)
        >>> tuple(layer.lora_A.shape), tuple(layer.lora_B.shape), layer.scaling
        ((2, 16), (8, 2), 8.0)
        >>> layer(torch.ones(3, 16)).shape
        torch.Size([3, 8])
    """

    lora_base = nn.Linear
    is_linear = reads_rows = True
    sizes = ("in_features", "out_features")
    #: The linears that share this one's input; :func:`lightning_lora.model.fuse.fuse` sets it.
    shared_input: SharedInputGroup | None = None

    # Decided once per class, so that no call has to check.

    #: Reads the weight of the base's forward; None if that forward does more, or is unknown.
    weight_reader: ClassVar[WeightReader | None] = reader_of(nn.Linear)
    #: True if the base's forward is ``nn.Linear``'s own. Its output is a new tensor, which may be updated in place.
    plain_forward: ClassVar[bool] = True
    #: True if update and output are this class's own; a variant may override them.
    plain_update: ClassVar[bool] = True
    #: True if, split by a tensor-parallel plan, it may compute on plain tensors.
    takes_plain: ClassVar[bool] = True
    #: The plan's hook on the input; :func:`lightning_lora.layers.plan_hooks.take_over` sets it.
    lora_split: PlainInput | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.weight_reader = reader_of(cls.lora_base)
        cls.plain_forward = cls.lora_base.forward is nn.Linear.forward
        cls.plain_update = cls.lora_update is LoRALinear.lora_update and cls.lora_output is LoRALinear.lora_output
        plain = cls.plain_forward and cls.plain_update and cls.output_scale is LoRALayer.output_scale
        cls.takes_plain = plain and cls.forward is LoRALinear.forward and cls.is_plain_sum is LoRALinear.is_plain_sum

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
        """Return a LoRA layer over the same weight, frozen. ``linear`` itself is never changed, not even by a merge.

        Args:
            linear: an ``nn.Linear`` or a subclass.
            rank: r.
            alpha: numerator of the scaling.
            dropout: dropout probability on the adapter's input.

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
            if parameter is not None and not (name == "weight" and format_of(linear)):  # a quantized weight is frozen and never written to
                layer._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
        adapt(layer, spec)
        layer.lora_state.shares_weight = True
        assert isinstance(layer, LoRALinear)
        return layer

    @property
    def linear(self) -> nn.Linear:
        """A view of the frozen base with its original class, over the same tensors."""
        view = unadapt(shallow_copy(self))
        assert isinstance(view, nn.Linear)
        return view

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output plus the update, by the first of these paths that applies.

        1. Tensor-parallel: on the local shards. With DTensors, choosing placements takes longer than the computation.
        2. Merged, disabled, or with extra arguments: the definition, because the other paths do not handle these.
        3. Shared input: before the others, because another layer of the group may have computed this output already.
        4. Fused: base and update as one operation, where the Triton kernels can run. Without them it was faster at no size and for no kind
           of weight (benchmarks/README.md, "The cost of one adapted layer").
        5. As path 1, where the input is a DTensor already.
        6. The definition (:meth:`LoRALayer.forward`): the base's forward, then :meth:`lora_update` added to it. For a small layer it is
           the fastest, so the checks before it read only a few attributes. Compilers and torch.func transforms use it too.

        The choice depends neither on grad mode nor on the results of other calls. A checkpointed forward runs twice, so it must draw the
        same dropout mask both times.
        """
        if self.lora_split is not None and not is_sharded(input):
            y = None if args or kwargs else self._plain_output(input)
            if y is not None:
                return y
            input = self.lora_split.hook(self, (input,))
        if self.lora_state.merge is not None or self.disabled or args or kwargs:
            return super().forward(input, *args, **kwargs)
        y = None
        if self.shared_input is not None and self.shared_input.open:
            y = self.shared_input.output(self, input)
        if y is None and backends.worth_kernels(input):
            y = self.fused_output(input)
        if y is None and is_sharded(input):
            y = self.tensor_parallel_output(input)
        elif y is None and input.ndim != 2 and self._takes_rows(input):
            rows = super().forward(input.reshape(-1, input.shape[-1]))  # two-dimensional, so that the update can be added in place
            y = rows.view(*input.shape[:-1], rows.shape[-1])
        return super().forward(input) if y is None else y

    def _takes_rows(self, x: Tensor) -> bool:
        """True if base and update give for the rows of x, (n, in), what they give for x (..., in)."""
        return self.plain_forward and self.plain_update and low_rank.has_rows(x) and not low_rank.transformed()

    def fused_output(self, x: Tensor) -> Tensor | None:
        """Return the output by path 4; None if it does not apply."""
        weight = self.frozen_weight(x) if one_operation_takes(x) else None
        return None if weight is None else compute([self], [weight], x)[0]

    def tensor_parallel_output(self, x: Tensor) -> Tensor | None:
        """Return the output by path 5, for a DTensor x; None if it does not apply."""
        plain = self.plain_forward and not self.has_output_scale and self.is_plain_sum()
        return local_forward(self, x) if plain else None

    def _plain_output(self, x: Tensor) -> Tensor | None:
        """Return the output by path 1, for a plain x of a tensor-parallel layer; None if it does not apply."""
        y = None
        if self.shared_input is not None and self.shared_input.open:
            y = self.shared_input.output(self, x)
        if y is None:
            (y,) = local_outputs([self], x) or (None,)
        return y

    def frozen_weight(self, x: Tensor) -> FrozenWeight | None:
        """Return the base's weight, for a fused operation that computes the whole output for x.

        None if the operation would not give this layer's output at the moment.
        """
        reader = self.weight_reader
        if reader is None or self.merged or self.disabled or not self.is_plain_sum() or is_sharded(self.lora_A) or not low_rank.has_rows(x):
            return None
        return reader.read(self, x)

    def is_plain_sum(self) -> bool:
        """False for a variant that overrides the update or the output."""
        return self.plain_update

    @classmethod
    def weight_shape(cls, module: Any) -> tuple[int, ...]:
        """Return (out, in)."""
        return module.out_features, module.in_features

    @classmethod
    def adapter_shapes(cls, module: nn.Linear, spec: LayerSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A, (r, in), and of B, (out, r)."""
        return (spec.rank, module.in_features), (module.out_features, spec.rank)

    @classmethod
    def example_input(cls, module: nn.Linear, generator: torch.Generator) -> Tensor:
        """(2, 3, in)."""
        return torch.randn(2, 3, module.in_features, generator=generator, dtype=torch.float64)

    @classmethod
    def adapter_placements(cls, placement: Any) -> dict[str, Any]:
        """Return the factors' placements.

        Column-parallel (W sharded by rows): A is replicated, B sharded. Row-parallel (W sharded by columns): A is sharded, B replicated.
        """
        from torch.distributed.tensor import Replicate, Shard

        split = getattr(placement, "dim", None)
        A, B = Shard(1) if split == 1 else Replicate(), Shard(0) if split == 0 else Replicate()
        return {"lora_A": A, "lora_B": B, "lora_A0": A, "lora_B0": B}

    def lora_update(self, y: Tensor, x: Tensor) -> Tensor:
        """Return ``y + scaling · B·A·dropout(x)``."""
        return low_rank.lora_update(y, x, *self.update_factors(), self.scaling, self.dropout_now(), inplace=self.plain_forward)
