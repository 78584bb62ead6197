"""``LoRALayer``: a frozen layer whose class was replaced, in place, by a low-rank-adapted subclass of it.

``adapt`` replaces a module's class with a cached subclass and adds two parameters::

    y = super().forward(x)                  # the base's own: nn.Linear, a 4-bit linear, a user's subclass
    y + scaling · lora_B · lora_A · x       # unless merged

This is exact for bases that are linear in their weight and use the input unchanged. A subclass whose forward does more (scales the output,
say) is found by :mod:`~lightning_lora.layers.linearity` and refused. Register a kind of its own for such a base.

The module stays the same object under the same name. So state-dict keys, tied weights, hooks, ``isinstance`` checks and sharding plans stay
valid. A wrapper module would rename keys and break tensor-parallel plans. A parametrization would build the dense product, store many
times the activations and could not support quantized weights.

A *kind* defines a layer's shapes. A *variant*, a mixin before it in the MRO, changes the formula and sees weight and factors as matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.layers.awaiting import await_data
from lightning_lora.layers.classes import adapted_class
from lightning_lora.layers.factors import Factors
from lightning_lora.layers.mergeable import PREFIX
from lightning_lora.layers.spec import LayerSpec, Option
from lightning_lora.layers.state import AdapterState
from lightning_lora.layers.whole_factors import check_whole
from lightning_lora.ops import backends
from lightning_lora.ops.output_scale import apply_output_scale
from lightning_lora.quantization import formats
from lightning_lora.registry import data_of, frozen_factor, has_start, init_check, init_of
from lightning_lora.utils.gradient_reducer import kept_reduced
from lightning_lora.utils.names import checked
from lightning_lora.utils.parameters import make_parameter
from lightning_lora.utils.sharding import local_tensor

_HALF = (torch.float16, torch.bfloat16)


class LoRALayer(Factors):
    """What all kinds share: parameters, the forward pass, dtypes, pickling. A and B are in :class:`Factors`, merging in :class:`Mergeable`.

    Attributes:
        lora_A: down-projection, (r, in) for a linear.
        lora_B: up-projection, (out, r) for a linear.
        lora_dropout: ``nn.Dropout`` that holds the probability; the layer's own ``training`` says if it is active.
        lora_state: the rest of the adapter's state; ``spec``, ``rank``, ``alpha``, ``lora_config`` and ``merged`` read it.

    Examples:
        >>> isinstance(apply_lora(model).model.layers[0].self_attn.q_proj, LoRALayer)
        True
    """

    #: False for a kind that has no A and B, and so no variant.
    low_rank: ClassVar[bool] = True
    #: True if ``target_modules="all-linear"`` includes this kind.
    is_linear: ClassVar[bool] = False
    #: True if the weight multiplies the rows of the input, ``x (..., in) → y (..., out)``. Inits that read data need that.
    reads_rows: ClassVar[bool] = False
    #: Names of the module's children that are adapted together with it, with its rank and alpha; its own forward calls them.
    children_too: ClassVar[tuple[str, ...]] = ()
    #: Names of the module's attributes that say the shape of its weight.
    sizes: ClassVar[tuple[str, ...]] = ()
    #: Options that a variant accepts in ``variant_options``, by name.
    options: ClassVar[dict[str, Option]] = {}
    #: Options that a kind accepts in ``kind_options``, by name.
    kind_options: ClassVar[dict[str, Option]] = {}

    lora_dropout: nn.Dropout
    #: True while the layer computes its base's output only. :func:`~lightning_lora.disabled_lora` sets it on the instance.
    disabled: bool = False
    lora_base: ClassVar[type[nn.Module]]

    # Methods that a kind defines.

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Skip the base's own hook: it may require arguments, and these classes are not subclasses that the user wrote."""

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        """Raise ValueError if this kind or variant cannot adapt this module with this spec.

        The message is the reason only; the caller adds the layer's name.
        """
        init = spec.config.init
        if data_of(init) is not None and not cls.reads_rows:
            raise ValueError(f"init={init!r} reads the rows that a linear multiplies, and a {cls.__name__} has none; exclude it")
        check = init_check(init)
        if check is not None:
            check(module, spec, *cls.adapter_shapes(module, spec))
        if has_start(init):
            check_whole(module, spec, *cls.adapter_shapes(module, spec), f"init={init!r}")

    @classmethod
    def unfit(cls, module: Any) -> str | None:
        """Return why this kind cannot adapt this module, whatever the config; None if it can.

        ``target_modules="all-linear"`` passes over such a module.
        """
        return None

    @classmethod
    def weight_shape(cls, module: Any) -> tuple[int, ...] | None:
        """Return the weight's shape by the module's own :attr:`sizes`, which determine the adapter's shapes. None: it is not checked."""
        return None

    def lora_update(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the base's output ``y`` plus this layer's update for the input ``x``."""
        raise NotImplementedError(f"{type(self).__name__} must define lora_update")

    def output_scale(self) -> Tensor | None:
        """Return the output scale g, (out,), at least fp32, or None.

        It multiplies the sum of base product and update, before the bias is added. A variant may define one.
        """
        return None

    @property
    def has_output_scale(self) -> bool:
        """True if the layer has an :meth:`output_scale`. Does not compute it, which may be expensive."""
        return type(self).output_scale is not LoRALayer.output_scale

    def is_plain_sum(self) -> bool:
        """True if the output is exactly ``g∘(W·x + update) + b`` at the moment.

        Only then may one fused operation replace the layer's forward.
        """
        return True

    def per_output(self, vector: Tensor) -> Tensor:
        """Reshape one number per output channel, (out,), so that it broadcasts over this layer's output."""
        return vector

    @classmethod
    def example_input(cls, module: Any, generator: torch.Generator) -> Tensor | None:
        """Return a small random input of the module's forward, float64 or int64 on the CPU.

        :mod:`~lightning_lora.layers.linearity` tries classes that have a forward of their own with it. None: they are not tried.
        """
        return None

    # Construction.

    @classmethod
    def finish(cls, layers: dict[str, LoRALayer]) -> None:
        """Set up state that spans layers, after all layers of a model are adapted. A variant whose layers share something does it here.

        Args:
            layers: module name → layer; all layers of this variant that were adapted together.

        Raises:
            ValueError: the layers cannot be set up; no layer stays adapted then.
        """

    def init_adapter(self, spec: LayerSpec) -> None:
        """Freeze the base's parameters. Add the adapter's parameters on the weight's device, in fp32 or wider."""
        formats.prepare(self)
        weight = self.weight
        dtype = weight.dtype if weight.dtype.is_floating_point and weight.dtype.itemsize >= 4 else torch.float32
        self.lora_state = AdapterState(spec)
        for parameter in self.base_parameters().values():
            parameter.requires_grad_(False)
        # Not a child module: parallelization plans and module walks must see the tree that they know.
        self.__dict__["lora_dropout"] = nn.Dropout(spec.dropout)
        for name, shape in self.parameter_shapes(self, spec).items():
            self.register_parameter(name, make_parameter(torch.empty(shape, device=weight.device, dtype=dtype), True))
        self.reset_lora_parameters()
        if self.low_rank and (frozen := frozen_factor(spec.config.init)):
            self.get_parameter(frozen).requires_grad_(False)
        if self.low_rank and data_of(spec.config.init) is not None:
            await_data(self)
        backends.look_at(weight.device)

    def reset_lora_parameters(self) -> None:
        """Reset the adapter to its start. The config's init sets A and B."""
        with torch.no_grad():
            init_of(self.lora_config.init)(self)
            self.keep_start()

    @torch.no_grad()
    def keep_start(self) -> None:
        """Take A and B as the start, for an init that keeps it."""
        for name in ("lora_A", "lora_B"):
            start = self._parameters.get(f"{name}0")
            if start is not None:
                local_tensor(start.requires_grad_(False)).copy_(local_tensor(self._parameters[name]))  # type: ignore[arg-type]

    def base_was_loaded(self, loaded: set[str]) -> None:
        """Compute what was made from the weight (not from data) again, unless the adapter was loaded too or has trained."""
        init = self.lora_config.init
        from_weight = ("lora_A0" in self._parameters or frozen_factor(init)) and data_of(init) is None
        if from_weight and "lora_A" not in loaded and self._starts():
            self.reset_lora_parameters()

    def reset_parameters(self) -> None:
        """Reset the base, then the adapter. torch calls this when it materializes a module on the meta device."""
        base = getattr(super(), "reset_parameters", None)
        if base is not None:
            base()
        if "lora_state" in self.__dict__:  # the base's constructor may call this before the adapter exists
            self.reset_lora_parameters()

    def rebase_class(self, base: type[nn.Module]) -> None:
        """Switch to the adapted class over another base. A quantized layer needs this once its weight is a plain one."""
        cls = adapted_class(base, self.lora_config.variant, self.spec.kind, sliced=self.spec.slices is not None)
        assert cls is not None
        self.__class__ = cls

    # Use.

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output plus the update."""
        y = super().forward(input, *args, **kwargs)
        return y if self.lora_state.merge is not None or self.disabled else self.lora_output(self.lora_update(y, input))

    def lora_output(self, z: Tensor) -> Tensor:
        """Return the layer's output, given the base's output plus the update.

        Applies the output scale, if there is one, to everything but the bias. Used where no fused operation computes the layer;
        a variant that overrides it is never fused.
        """
        out_scale = self.output_scale()
        if out_scale is None:
            return z
        bias = self._parameters.get("bias")
        if bias is None:  # in a backward pass FSDP1 has plain tensors in place of parameters; checkpointing runs the forward there
            bias = self.__dict__.get("bias")
        return apply_output_scale(z, self.per_output(out_scale), None if bias is None else self.per_output(bias))

    def base_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output alone."""
        return super().forward(input, *args, **kwargs)

    def dropout_now(self) -> float:
        """Return the dropout probability in force: 0 in evaluation."""
        return self.lora_dropout.p if self.training else 0.0

    # What torch calls.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALayer:
        # `.to(bfloat16)`, `.half()` and Lightning's half-precision plugins convert the base. Adapters in fp32 stay in fp32:
        # in half precision small updates would be rounded away.
        adapters = self.lora_parameters().values()
        mine = {id(tensor): tensor for p in adapters for tensor in (p, p.grad) if tensor is not None}

        def converted(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            halved = id(tensor) in mine and new.dtype in _HALF and tensor.dtype not in _HALF
            return tensor.to(new.device) if halved else new

        with kept_reduced(adapters):
            super()._apply(converted, recurse)
        backends.look_at(next(iter(self.lora_parameters().values())).device)
        return self

    def extra_repr(self) -> str:
        """Return the base's text, then the adapter's rank, alpha and dropout."""
        mine = f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.lora_dropout.p:g}, merged={self.merged}"
        return ", ".join(filter(None, (super().extra_repr(), mine)))

    __repr__ = nn.Module.__repr__  # some bases define their own, which would hide the adapter

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self.__getstate__()  # torch's method leaves out what cannot be pickled, such as compiled code
        state.pop("shared_input", None)  # the parent owns the group; a copy of one layer would copy the others too
        state.pop("disabled", None)  # nobody would switch the copy on again
        return _rebuild, (type(self).lora_base, self.lora_config.variant, self.spec.kind, self.spec.slices is not None), state


def _rebuild(base: type[nn.Module], variant: str, kind: str | None = None, sliced: bool = False) -> LoRALayer:
    """Unpickle: the dynamic class is made, not looked up."""
    cls: Any = adapted_class(base, variant, kind, sliced=sliced)
    layer: LoRALayer = cls.__new__(cls)
    return layer


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Yield the full module name and the layer of every adapted layer. A layer that two parents share is yielded once.

    Examples:
        >>> [name for name, layer in lora_layers(apply_lora(model)) if layer.rank == 8][:2]
        ['model.layers.0.self_attn.q_proj', 'model.layers.0.self_attn.v_proj']
    """
    yield from ((name, module) for name, module in checked(model).named_modules() if isinstance(module, LoRALayer))


def kept_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield ``(name, parameter)`` of everything that a checkpoint must hold.

    That is every parameter that trains, and every adapter parameter. Some variants freeze one, but it started at random.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or name.rpartition(".")[2].startswith(PREFIX):
            yield name, parameter
