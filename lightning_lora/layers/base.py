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

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.layers.classes import adapted_class
from lightning_lora.layers.factors import Factors
from lightning_lora.layers.mergeable import PREFIX
from lightning_lora.layers.spec import LayerSpec, Option
from lightning_lora.layers.state import AdapterState
from lightning_lora.ops import backends
from lightning_lora.ops.output_scale import apply_output_scale
from lightning_lora.quantization import formats
from lightning_lora.registry import INITS, has_start, look_up
from lightning_lora.utils.sharding import is_sharded, local_tensor

_HALF = (torch.float16, torch.bfloat16)


class LoRALayer(Factors):
    """What all kinds share: parameters, the forward pass, dtypes, pickling. A and B are in :class:`Factors`, merging in :class:`Mergeable`.

    Attributes:
        lora_A: down-projection, (r, in) for a linear.
        lora_B: up-projection, (out, r) for a linear.
        lora_dropout: ``nn.Dropout`` on the adapter's input.
        lora_state: what else the layer knows of its adapter; ``spec``, ``rank``, ``alpha``, ``lora_config`` and ``merged`` read it.
    """

    #: Whether ``target_modules="all-linear"`` means this kind.
    is_linear: ClassVar[bool] = False
    #: What a variant takes in ``variant_options``.
    options: ClassVar[dict[str, Option]] = {}

    lora_dropout: nn.Dropout
    #: Whether the layer computes what its base does, for now; :func:`lightning_lora.model.disable.disabled_lora` sets it on the instance.
    disabled: bool = False
    lora_base: ClassVar[type[nn.Module]]

    # What a kind fills in.

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not the base's, which may want arguments: what is made here is no subclass of the user's."""

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        """Raise ValueError, with the reason only, if this kind or variant cannot adapt this module as the spec says."""
        if not has_start(spec.config.init):
            return
        (r, *inputs), (outputs, again, *_) = cls.adapter_shapes(module, spec)
        what = f"init={spec.config.init!r}"
        if (r, again) != (spec.rank, spec.rank):
            raise ValueError(f"{what} takes B·A from the weight, and here A and B meet in groups; exclude it")
        if getattr(module, "padding_idx", None) is not None:
            raise ValueError(f"{what} would train the row of padding_idx={module.padding_idx} too; exclude it")
        if r > min(outputs, math.prod(inputs)):
            raise ValueError(f"{what} with rank={r} is above min(in, out)={min(outputs, math.prod(inputs))}; choose a lower rank")

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

    def per_output(self, vector: Tensor) -> Tensor:
        """One number an output channel, (out,), shaped so that it broadcasts over this layer's output."""
        return vector

    @classmethod
    def example_input(cls, module: Any, generator: torch.Generator) -> Tensor | None:
        """A small random input of the module's forward, float64 or int64 on the CPU: with it a class that has a forward of its own is tried
        (:mod:`~lightning_lora.layers.linearity`). None: this kind does not say, and its layers are taken as they are."""
        return None

    # Construction.

    @classmethod
    def finish(cls, layers: dict[str, LoRALayer]) -> None:
        """What spans layers, once all of a model are adapted: a variant that shares something among them does it here.

        Args:
            layers: FQN → layer; what was adapted together, all of this variant.

        Raises:
            ValueError: it cannot be; nothing stays adapted then.
        """

    def init_adapter(self, spec: LayerSpec) -> None:
        """Freeze the base parameters and add the adapter's on the weight's device, at least in fp32."""
        formats.prepare(self)
        weight = self.weight
        dtype = weight.dtype if weight.dtype.is_floating_point and weight.dtype.itemsize >= 4 else torch.float32
        self.lora_state = AdapterState(spec)
        for parameter in self.base_parameters().values():
            parameter.requires_grad_(False)
        # No child module: parallelization plans and module walks see the tree that they know.
        self.__dict__["lora_dropout"] = nn.Dropout(spec.dropout).train(self.training)
        for name, shape in self.parameter_shapes(self, spec).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype)))
        self.reset_lora_parameters()
        backends.look_at(weight.device)

    def reset_lora_parameters(self) -> None:
        """Start the adapter anew, A and B as the config's init has it."""
        with torch.no_grad():
            look_up(INITS, "init", self.lora_config.init)(self)
            for name in ("lora_A", "lora_B"):
                start = self._parameters.get(f"{name}0")
                if start is not None:
                    local_tensor(start.requires_grad_(False)).copy_(local_tensor(self._parameters[name]))  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """What materialising a meta module calls: the base's own reset, then the adapter's."""
        base = getattr(super(), "reset_parameters", None)
        if base is not None:
            base()
        if "lora_state" in self.__dict__:  # a constructor of the base calls this before there is an adapter
            self.reset_lora_parameters()

    def rebase_class(self, base: type[nn.Module]) -> None:
        """Be the adapted class of another base: what a quantized layer's is once its weight is a plain one."""
        cls = adapted_class(base, self.lora_config.variant, self.spec.kind)
        assert cls is not None
        self.__class__ = cls

    # Use.

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's forward plus the update."""
        y = super().forward(input, *args, **kwargs)
        return y if self.lora_state.merge is not None or self.disabled else self.lora_output(self.lora_update(y, input))

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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # Base weights that come after the adapter (a start on the meta device, say): a start that was taken from others is taken anew.
        alone = prefix + "weight" in state_dict and prefix + "lora_A" not in state_dict and not self.merged
        if alone and "lora_A0" in self._parameters and not self.lora_A0.is_meta and self.adds_nothing():
            self.reset_lora_parameters()

    def extra_repr(self) -> str:
        """The base's, and the adapter's rank, alpha and dropout."""
        mine = f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.lora_dropout.p:g}, merged={self.merged}"
        return ", ".join(filter(None, (super().extra_repr(), mine)))

    __repr__ = nn.Module.__repr__  # some bases have one of their own that would hide the adapter

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self.__getstate__()  # torch's leaves out what does not travel, such as compiled code
        state.pop("shared_input", None)  # the parent has them; a copy of one layer would take the others along
        state.pop("disabled", None)  # nobody would switch the copy on again
        return _rebuild, (type(self).lora_base, self.lora_config.variant, self.spec.kind), state


def _rebuild(base: type[nn.Module], variant: str, kind: str | None = None) -> LoRALayer:
    """Unpickle: the dynamic class is made, not looked up."""
    cls: Any = adapted_class(base, variant, kind)
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
