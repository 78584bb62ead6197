"""Modules with stacks of packed matrices: experts that ``quantize_base`` packed, or that came packed. One class for all formats.

A format says how it packs a stack, (E, m, n), and which :class:`~lightning_lora.ops.frozen_stack.FrozenStack` multiplies it
(:class:`StackFormat`). Here is the rest: the module becomes, in place, a subclass of its class (:func:`packed_class`) that runs the class's
own forward with those stacks in place of its weights. The parameters keep their names and hold the codes, as bytes, so that nothing takes
them for numbers. What else a format stores (scales) is beside them, in one :class:`Packed` a weight, and in state dicts.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.ops import backends
from lightning_lora.ops.experts_forward import ExpertsForward
from lightning_lora.ops.frozen_stack import FrozenStack
from lightning_lora.quantization.formats import PACKED, PACKED_STACKS, QUANTIZED_FORMATS, QuantizedFormat, stand_ins
from lightning_lora.registry import qualified_name
from lightning_lora.utils.checksums import sampled_digest
from lightning_lora.utils.parameters import make_parameter
from lightning_lora.utils.sharding import full_tensor

STACK_FORMATS: dict[str, StackFormat] = {}  # quantize=… → how it packs stacks


class StackFormat:
    """How a format packs a stack of matrices."""

    #: What ``quantize`` calls it, or the library.
    name: ClassVar[str]
    #: Names of the tensors beside the codes, as in state dicts after the weight's name and "_".
    beside: ClassVar[tuple[str, ...]]
    #: Number that the count of a matrix's entries must be a multiple of.
    unit: ClassVar[int] = 1

    def pack(self, weight: Tensor, transposed: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize.

        Args:
            weight: (E, m, n).
            transposed: True if a matrix is (in, out).

        Returns:
            The codes, (E, ...) as bytes, and the tensors beside them, by name.
        """
        raise NotImplementedError(f"{type(self).__name__} must define pack")

    def stack(self, codes: Tensor, packed: Packed) -> FrozenStack:
        """Return the weight as products take it."""
        raise NotImplementedError(f"{type(self).__name__} must define stack")


@dataclass(frozen=True)
class Packed:
    """How a stack is packed, besides its codes.

    Attributes:
        format: its format.
        tensors: by the names of the format's :attr:`StackFormat.beside`.
        shape: of the plain weight, (E, m, n).
        dtype: of the plain weight. ``.to(dtype)`` changes it.
        transposed: True if a matrix is (in, out).
        digest: sampled digest of the weight from before it was packed; None if it came packed.
    """

    format: StackFormat
    tensors: dict[str, Tensor]
    shape: torch.Size
    dtype: torch.dtype
    transposed: bool = False
    digest: str | None = None

    def stack(self, codes: Tensor) -> FrozenStack:
        """Return the weight as products take it. The tensors stay behind where FSDP2 moves a model, its parameters and buffers."""
        for name, tensor in self.tensors.items():
            if tensor.device != codes.device:
                self.tensors[name] = tensor.to(codes.device)
        return self.format.stack(codes, self)


class _Class(type):
    """The type of the classes of :func:`packed_class`. Pickles name the class that they were made of."""


def _reduced(cls: Any) -> Any:
    return (packed_class, (cls.plain_class, cls.mixin)) if "computes" in vars(cls) else cls.__qualname__


copyreg.pickle(_Class, _reduced)


class PackedStacks(nn.Module, metaclass=_Class):
    """What a module with packed stacks becomes: before its own class in the MRO.

    Attributes:
        packed_stacks: name of a parameter that holds codes → the rest of it.
    """

    plain_class: ClassVar[type[nn.Module]]
    mixin: ClassVar[type[PackedStacks]]
    computes: ClassVar[ExpertsForward]
    packed_stacks: dict[str, Packed]

    @classmethod
    def computed_as(cls, plain: type[nn.Module]) -> type[nn.Module]:
        """Return the class whose forward multiplies by dequantized weights, for a class that is made packed."""
        return plain

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module's own forward computes with the dequantized weights."""
        return self.computes(self, lambda: stand_ins(self), args, kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedStacks:
        super()._apply(fn, recurse)
        for name, packed in self.packed_stacks.items():
            old = next(iter(packed.tensors.values()))
            like = fn(torch.empty(0, dtype=packed.dtype, device=old.device))
            if like.device != old.device:
                there = "meta" if old.is_meta else like.device
                tensors = {
                    part: torch.empty_like(t, device=like.device) if there == "meta" else t.to(there) for part, t in packed.tensors.items()
                }
            else:
                tensors = {part: new if (new := fn(t)).dtype == t.dtype else t for part, t in packed.tensors.items()}  # never rounded
            self.packed_stacks[name] = replace(packed, tensors=tensors, dtype=like.dtype)
        backends.look_at(next(iter(self._parameters.values())).device)  # type: ignore[union-attr]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, packed in self.packed_stacks.items():
            destination.update({f"{prefix}{name}_{part}": tensor for part, tensor in packed.tensors.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _, strict, missing, unexpected, errors = args
        keys = {f"{prefix}{name}_{part}": (name, part) for name, packed in self.packed_stacks.items() for part in packed.tensors}
        for name, packed in self.packed_stacks.items():
            weight = state_dict.get(prefix + name)
            if isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() > 1:
                errors.append(
                    f"{prefix}{name}: a weight in {weight.dtype} for experts that are quantized ({packed.format.name}); load it first, then"
                    " quantize the model"
                )
                return
        super()._load_from_state_dict({key: value for key, value in state_dict.items() if key not in keys}, prefix, *args)
        unexpected[:] = [key for key in unexpected if key not in keys]
        for key, (name, part) in keys.items():
            new, old = state_dict.get(key), self.packed_stacks[name].tensors[part]
            if isinstance(new, Tensor) and new.shape == old.shape:
                tensors = self.packed_stacks[name].tensors | {part: new.detach().to(old.device, old.dtype, copy=True)}
                self.packed_stacks[name] = replace(self.packed_stacks[name], tensors=tensors)
            elif new is not None:
                errors.append(f"{key}: shape {tuple(new.shape)} is not {tuple(old.shape)}")
            elif strict and prefix + name in state_dict:
                missing.append(key)


_CLASSES: dict[tuple[type, type], type[Any]] = {}


def packed_class(cls: type[nn.Module], mixin: type[PackedStacks] = PackedStacks) -> type[Any]:
    """Return the subclass of a class of experts whose weights are packed."""
    if (cls, mixin) not in _CLASSES:
        own = {"__module__": cls.__module__, "plain_class": cls, "mixin": mixin, "computes": ExpertsForward(mixin.computed_as(cls))}
        _CLASSES[cls, mixin] = _Class(f"Packed{cls.__name__}", (mixin, cls), own)
    return _CLASSES[cls, mixin]


def pack_stacks(module: Any, names: Mapping[str, bool], how: StackFormat, device: torch.device | None) -> None:
    """Pack weights of a module, in place: all, or after a failure none.

    Args:
        module: of a plain class.
        names: name of a parameter (E, m, n) → True if a matrix is (in, out).
        how: the format.
        device: where to compute; None: where each weight is. The packed weight is on the plain one's device.
    """
    codes: dict[str, nn.Parameter] = {}
    packed: dict[str, Packed] = {}
    for name, transposed in names.items():
        weight = module._parameters[name].detach()
        new, beside = how.pack(weight.to(device or weight.device), transposed)
        codes[name] = make_parameter(new.to(weight.device), False)
        beside = {part: tensor.to(weight.device) for part, tensor in beside.items()}
        packed[name] = Packed(how, beside, weight.shape, weight.dtype, transposed, sampled_digest(weight))
    become_packed(module, codes, packed, packed_class(type(module)))


def become_packed(module: Any, codes: Mapping[str, nn.Parameter], packed: dict[str, Packed], cls: type[Any]) -> None:
    """Give a module codes in place of weights, and its packed class."""
    module._parameters.update(codes)
    module.packed_stacks = packed
    module.__class__ = cls
    backends.look_at(next(iter(codes.values())).device)


class StackedFormat(QuantizedFormat):
    """Format of a single packed stack, alone in a layer as its ``weight``."""

    shards = True
    attributes = (PACKED,)

    def shape(self, module: Any, name: str) -> torch.Size:
        """Return the plain weight's."""
        shape: torch.Size = module.packed_stack.shape
        return shape

    def dequantize(self, module: Any) -> Tensor:
        """Return the matrices in the plain weight's layout and dtype."""
        packed = module.packed_stack
        return packed.stack(full_tensor(module.weight.detach())).stored(packed.dtype)

    def requantize(self, module: Any, weight: Tensor) -> None:
        """Pack another stack the same way."""
        packed = module.packed_stack
        codes, tensors = packed.format.pack(weight.to(module.weight.device), packed.transposed)
        module.packed_stack = replace(packed, tensors=tensors, digest=None)
        module._parameters["weight"] = make_parameter(codes, False)

    def codes(self, module: Any) -> list[Tensor]:
        """Return the codes and what is beside them."""
        return [full_tensor(module.weight.detach()).as_subclass(Tensor), *module.packed_stack.tensors.values()]

    def digest(self, module: Any) -> str | None:
        """Return the digest from before it was packed."""
        digest: str | None = module.packed_stack.digest
        return digest


class PackedStacksFormat(QuantizedFormat):
    """Format of a :class:`PackedStacks`."""

    shards = True
    attributes: ClassVar[tuple[str, ...]] = (PACKED_STACKS,)

    def is_quantized(self, module: Any) -> bool:
        """False once all weights are merged into plain ones."""
        return bool(module.packed_stacks)

    def packed(self, module: Any) -> tuple[str, ...]:
        """Return the names of the parameters that hold codes."""
        return tuple(module.packed_stacks)

    def shape(self, module: Any, name: str) -> torch.Size:
        """Return the plain weight's."""
        shape: torch.Size = module.packed_stacks[name].shape
        return shape

    def single(self, module: Any, name: str) -> Any:
        """Return a layer with that weight alone."""
        return Alone(module._parameters[name], module.packed_stacks[name])

    def unpacked_class(self, module: Any) -> type[nn.Module]:
        """Return the class that it was made of."""
        cls: type[nn.Module] = type(module).plain_class
        return cls

    def restore(self, module: Any) -> None:
        """Give a module that has only plain weights left its plain class."""
        if not module.packed_stacks:
            module.__class__ = self.unpacked_class(module)
            del module.__dict__[PACKED_STACKS]


class Alone(nn.Module):
    """A single packed stack as a layer."""

    def __init__(self, weight: nn.Parameter, packed: Packed) -> None:
        super().__init__()
        self.weight, self.packed_stack = weight, packed


QUANTIZED_FORMATS[qualified_name(Packed)] = StackedFormat()
QUANTIZED_FORMATS[qualified_name(PackedStacks)] = PackedStacksFormat()
