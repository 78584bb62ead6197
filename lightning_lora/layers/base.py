"""``LoRALayer``: a frozen layer that became its own low-rank-adapted subclass, in place.

``adapt`` swaps a module's class for a cached subclass of it and gives it two parameters::

    y = super().forward(x)                  # whatever the base does: nn.Linear, a 4-bit linear, a user's subclass
    y + scaling · lora_B · lora_A · x       # unless merged

It is exact for bases that are linear in their weight with the input as it is. A subclass that does more in its forward (scales the
output, say) is found by :mod:`~lightning_lora.layers.linearity` and refused: give such a base a kind of its own.

The module stays the same object under the same name, so state-dict keys, tied weights, hooks, ``isinstance`` checks and
sharding plans stay as they were. A wrapper module would move keys and break tensor-parallel plans; a parametrization of
the weight would build the dense product, hold many times the activations and could not serve packed weights.

A *kind* (one file each) says how a layer's shape works; a *variant* is a mixin before the kind in the MRO that changes the
formula. Neither knows the other: a variant sees the weight and the factors as matrices (:meth:`LoRALayer.to_matrix`,
:meth:`LoRALayer.factor_matrices`), the output by :meth:`LoRALayer.per_output`, and the base by :meth:`LoRALayer.base_forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.classes import adapted_class
from lightning_lora.layers.mergeable import PREFIX, Mergeable
from lightning_lora.ops import backends
from lightning_lora.ops.output_scale import apply_output_scale
from lightning_lora.quantization import formats
from lightning_lora.registry import INITS, look_up
from lightning_lora.utils.sharding import is_sharded

_HALF = (torch.float16, torch.bfloat16)


class LoRALayer(Mergeable):
    """What all kinds share: parameters, the forward pass, dtypes, pickling; merging is in :class:`Mergeable`.

    Attributes:
        lora_A: down-projection, (r, in) for a linear.
        lora_B: up-projection, (out, r) for a linear.
        lora_dropout: ``nn.Dropout`` on the adapter's input.
        rank: r.
        alpha: scaling numerator.
        merged: whether the update is in the weight.
        lora_config: the config that this layer was made from.
    """

    #: Names of A and B in PEFT's adapter files.
    peft_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    #: Whether ``target_modules="all-linear"`` means this kind.
    is_linear: ClassVar[bool] = False
    #: Whether the weight is stored (in, out).
    transposed: ClassVar[bool] = False
    #: What PEFT's ``adapter_config.json`` says of this variant, beside what it says of plain LoRA.
    peft_fields: ClassVar[dict[str, Any]] = {}

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_dropout: nn.Dropout
    lora_config: LoRAConfig
    rank: int
    alpha: float
    lora_base: ClassVar[type[nn.Module]]

    # What a kind fills in.

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not the base's, which may want arguments: what is made here is no subclass of the user's."""

    @classmethod
    def adapter_shapes(cls, module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of ``lora_A`` and ``lora_B`` for a module of this kind."""
        raise NotImplementedError(f"{cls.__name__} has to say its adapter's shapes")

    @classmethod
    def check(cls, module: Any, rank: int, dropout: float) -> None:
        """Raise ValueError, with the reason only, if this kind or variant cannot adapt this module with this rank and dropout."""

    def lora_update(self, y: Tensor, x: Tensor) -> Tensor:
        """The base's output ``y`` plus this layer's update for the input ``x``."""
        raise NotImplementedError(f"{type(self).__name__} has to say its update")

    def output_scale(self) -> Tensor | None:
        """What the sum of base product and update is multiplied by before the bias, (out,), at least fp32; a variant may have one."""
        return None

    @property
    def has_output_scale(self) -> bool:
        """Whether there is an :meth:`output_scale`, which may take work to say."""
        return type(self).output_scale is not LoRALayer.output_scale

    def is_plain_sum(self) -> bool:
        """Whether the output now is ``g∘(W·x + update) + b`` and no more: what one operation may compute in the layer's place."""
        return True

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """A and B as the update multiplies them; a variant may put something between them."""
        return self.lora_A, self.lora_B

    def lora_factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The factor that starts random and the one that starts at zero."""
        return self.lora_A, self.lora_B

    def to_matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as an (out, in) matrix, or as one a group: (groups, out/groups, in/groups)."""
        return tensor.t() if self.transposed else tensor

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`to_matrix`."""
        return matrix.t() if self.transposed else matrix

    def factor_matrices(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), or one each a group; ``scaling · B @ A`` is the update of :meth:`to_matrix` of the weight."""
        return self.update_factors()

    def per_output(self, vector: Tensor) -> Tensor:
        """One number an output channel, (out,), shaped so that it broadcasts over this layer's output."""
        return vector

    def to_peft(self) -> dict[str, Tensor]:
        """The adapter's tensors under the names, and in the shapes, that PEFT has for them."""
        return dict(zip(self.peft_names, (self.lora_A, self.lora_B), strict=True))

    @classmethod
    def exported(cls, layers: dict[str, LoRALayer]) -> dict[str, LoRALayer]:
        """FQN → layer as adapter files have it: the layers themselves, but for variants that are a way to train and no format."""
        return layers

    @classmethod
    def from_peft(cls, module: Any, part: str, tensor: Tensor) -> Tensor:
        """PEFT's tensor for an adapter parameter in the shape that this kind has, where the two differ; else unchanged.

        Raises:
            ValueError: it cannot be brought into that shape.
        """
        return tensor

    @classmethod
    def adapter_placements(cls, placement: Any) -> tuple[Any, Any]:
        """Where A and B lie on a tensor-parallel mesh dimension on which the weight lies as ``placement`` says.

        Raises:
            ValueError: this kind cannot be adapted on such a base.
        """
        raise ValueError(f"{cls.__name__} on a tensor-parallel base ({placement}) is not supported; apply LoRA before parallelizing")

    @classmethod
    def example_input(cls, module: Any, generator: torch.Generator) -> Tensor:
        """A small random input of the module's forward, float64 or int64 on the CPU; a class with a forward of its own is tried with it."""
        raise NotImplementedError(f"{cls.__name__} has to say what a forward takes")

    # Construction.

    @classmethod
    def parameter_shapes(cls, module: Any, rank: int) -> dict[str, tuple[int, ...]]:
        """Name → shape of every adapter parameter: A and B, and what a variant has beside them."""
        return dict(zip(("lora_A", "lora_B"), cls.adapter_shapes(module, rank), strict=True))

    def init_adapter(self, config: LoRAConfig, rank: int, alpha: float) -> None:
        """Freeze the base parameters and add the adapter's on the weight's device, at least in fp32."""
        formats.prepare(self)
        weight = self.weight
        dtype = weight.dtype if weight.dtype.is_floating_point and weight.dtype.itemsize >= 4 else torch.float32
        self.lora_config, self.rank, self.alpha = config, rank, alpha
        self.merged, self._undo, self._owns_weight = False, None, True
        for parameter in self.base_parameters().values():
            parameter.requires_grad_(False)
        # No child module: parallelization plans and module walks see the tree that they know.
        self.__dict__["lora_dropout"] = nn.Dropout(config.dropout).train(self.training)
        for name, shape in self.parameter_shapes(self, rank).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype)))
        self.reset_lora_parameters()
        backends.look_at(weight.device)

    def reset_lora_parameters(self) -> None:
        """Start the adapter anew, A and B as the config's init has it."""
        with torch.no_grad():
            look_up(INITS, "init", self.lora_config.init)(self)

    def reset_parameters(self) -> None:
        """What materialising a meta module calls: the base's own reset, then the adapter's."""
        base = getattr(super(), "reset_parameters", None)
        if base is not None:
            base()
        if "lora_A" in self._parameters:  # a constructor of the base calls this before there is an adapter
            self.reset_lora_parameters()

    def rebase_class(self, base: type[nn.Module]) -> None:
        """Be the adapted class of another base: what a quantized layer's is once its weight is a plain one."""
        cls = adapted_class(base, self.lora_config.variant)
        assert cls is not None
        self.__class__ = cls

    # Use.

    @property
    def scaling(self) -> float:
        """The factor in front of ``B·A``."""
        return self.lora_config.scaling_of(self.rank, self.alpha)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's forward plus the update."""
        y = super().forward(input, *args, **kwargs)
        return y if self.merged else self.lora_output(self.lora_update(y, input))

    def lora_output(self, z: Tensor) -> Tensor:
        """What the layer returns, given the base's output plus the update: with the scale, if there is one, on all but the bias. For what
        is not computed as one operation; a variant that does something else here is not."""
        out_scale = self.output_scale()
        if out_scale is None:
            return z
        bias = self._parameters.get("bias")
        return apply_output_scale(z, self.per_output(out_scale), None if bias is None else self.per_output(bias))

    def base_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's forward alone."""
        return super().forward(input, *args, **kwargs)

    def lora_delta(self) -> Tensor:
        """``scaling · B·A`` in the weight's shape."""
        A, B = self.factor_matrices()
        return self.from_matrix(B @ A) * self.scaling

    def dropout_now(self) -> float:
        """The dropout probability in force: 0 in evaluation."""
        # Lightning sets `training` back after validation, module by module without a call: `lora_dropout`, no child, would stay behind.
        return self.lora_dropout.p if self.training else 0.0

    # What torch calls.

    def train(self, mode: bool = True) -> LoRALayer:
        """As in torch; the dropout goes along."""
        self.lora_dropout.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALayer:
        # `.to(bfloat16)`, `.half()` and Lightning's half-precision plugins convert the base: fp32 adapters stay fp32,
        # or small updates would be rounded away.
        before = {name: (p.data, None if p.grad is None else p.grad.data) for name, p in self.lora_parameters().items()}
        super()._apply(fn, recurse)
        for name, parameter in self.lora_parameters().items():
            data, grad = before[name]
            if parameter.dtype in _HALF and data.dtype not in _HALF:
                data, grad = data.to(parameter.device), None if grad is None else grad.to(parameter.device)
                if is_sharded(parameter):  # a DTensor keeps its dtype when its data is set
                    torch.utils.swap_tensors(parameter, nn.Parameter(data, requires_grad=parameter.requires_grad))
                else:
                    parameter.data = data
                parameter.grad = grad
        backends.look_at(next(iter(self.lora_parameters().values())).device)
        return self

    def extra_repr(self) -> str:
        """The base's, and the adapter's rank, alpha and dropout."""
        mine = f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.lora_dropout.p:g}, merged={self.merged}"
        return ", ".join(filter(None, (super().extra_repr(), mine)))

    __repr__ = nn.Module.__repr__  # some bases have one of their own that would hide the adapter

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self.__getstate__()  # torch's leaves out what does not travel, such as compiled code
        state.pop("shared_input", None)  # the parent has them; a copy of one layer would take the others along
        return _rebuild, (type(self).lora_base, self.lora_config.variant), state


def _rebuild(base: type[nn.Module], variant: str) -> LoRALayer:
    """Unpickle: the dynamic class is made, not looked up."""
    cls: Any = adapted_class(base, variant)
    layer: LoRALayer = cls.__new__(cls)
    return layer


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """``(FQN, layer)`` of every adapted layer; one that two parents share comes once."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            yield name, module


def kept_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """``(name, parameter)`` of what a checkpoint has to hold: all that trains, and every adapter parameter though some variants
    freeze one, since it started at random.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or name.rpartition(".")[2].startswith(PREFIX):
            yield name, parameter
