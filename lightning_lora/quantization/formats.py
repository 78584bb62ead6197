"""Quantized weights: how a layer that stores its weight packed is read, written and made plain again.

The forward pass of a quantized base needs none of this: an adapted layer calls it through ``super().forward``, or hands the
packed tensors to one operation for both (:mod:`lightning_lora.ops.frozen_weight`). Merging, exporting and naming the base do. One
:class:`QuantizedFormat` a storage format, found by the qualified name of the layer's type or of its weight's, so that no library is
imported for a model that does not use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.registry import look_up, qualified_name
from lightning_lora.utils.checksums import sampled_digest
from lightning_lora.utils.sharding import full_tensor, is_sharded, local_tensor

QUANTIZED_FORMATS: dict[str, QuantizedFormat] = {}  # qualified name of a layer's or a weight's type → how it is packed
QUANTIZERS: dict[str, Quantizer] = {}  # quantize=… → what packs a linear

UNKNOWN = "packed:"  # begins the digest of a weight that came quantized
_DIGEST = "_unpacked_digest"


class QuantizedFormat:
    """One storage format of a linear layer's weight."""

    #: What else an instance holds that goes with the packed weight.
    attributes: ClassVar[tuple[str, ...]] = ()
    #: Whether :meth:`repack` is known.
    requantizes: ClassVar[bool] = True
    #: Whether FSDP2 can take the packed weight apart and put it together again.
    shards: ClassVar[bool] = False
    #: The layer's class once its weight is a plain one; None: the class it has.
    plain_class: ClassVar[type[nn.Module] | None] = None

    def is_quantized(self, module: Any) -> bool:
        """Whether the weight is packed already; some are while the layer is on its way to a device."""
        return True

    def prepare(self, module: Any, dtype: torch.dtype | None) -> None:
        """Make the layer fit for training adapters on it: pack it if that is still to come.

        Args:
            module: the layer.
            dtype: of the model around it, for a format that does not keep the one it was packed from.

        Raises:
            ValueError: it cannot be trained on; the reason only.
        """

    def dequantize(self, module: Any) -> Tensor:
        """The weight (out, in) in the floating dtype that the layer would multiply with."""
        raise NotImplementedError(f"{type(self).__name__} has to say how its weight is unpacked")

    def requantize(self, module: Any, weight: Tensor) -> None:
        """Pack another weight as this one is packed; the old one's tensors are not written to."""
        raise NotImplementedError(f"{type(self).__name__} has to say how a weight is packed")

    def codes(self, module: Any) -> list[Tensor]:
        """The tensors that the weight is stored in."""
        raise NotImplementedError(f"{type(self).__name__} has to say what it stores")


@dataclass(frozen=True)
class Quantizer:
    """One way to pack a plain linear.

    Attributes:
        pack: packs its weight in place, computing on a device; the packed weight is where the plain one was.
        check_installed: imports what it needs, or raises ImportError naming the extra.
        unit: number that the weight's entries have to be a multiple of.
    """

    pack: Callable[[nn.Linear, torch.device], None]
    check_installed: Callable[[], Any]
    unit: int = 1


@dataclass
class QuantizedUndo:
    """The way back for a quantized weight: the packed weight itself, and the layer's class, kept while a merged one stands in its place."""

    layer_class: type[nn.Module]
    weight: nn.Parameter
    attributes: dict[str, Any]

    def put_back(self, module: nn.Module) -> None:
        """Into the layer it was taken from, bit for bit."""
        module.__class__ = self.layer_class
        module._parameters["weight"] = self.weight
        module.__dict__.update(self.attributes)


def quantizer_of(name: str) -> Quantizer:
    """What packs a linear, by the name that ``quantize`` has for the format.

    Raises:
        ValueError: there is none; the message lists what there is.
    """
    return look_up(QUANTIZERS, "quantize", name)


def format_of(module: nn.Module) -> QuantizedFormat | None:
    """How the layer's weight is packed; None for one in floating point."""
    packing = _candidate(module)
    return packing if packing is not None and packing.is_quantized(module) else None


def unknown_storage(module: nn.Module, name: str) -> str | None:
    """What a layer's weight of that name is stored as, if that is neither plain floating point nor a format that is known; else None.

    A weight in 8 bit has scales somewhere, and a tensor subclass with operations of its own may hold anything: neither is the number that
    it looks like, and adding an update to it would lose the update without a word.
    """
    weight = module._parameters.get(name)
    if weight is None or _candidate(module) is not None:
        return None
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return str(weight.dtype)
    cls: Any = type(local_tensor(weight))
    plain = cls.__torch_dispatch__ is Tensor.__torch_dispatch__ or cls.__module__.startswith("torch._subclasses.")  # torch's fake tensors
    return None if plain else qualified_name(cls)


def prepare(module: Any, dtype: torch.dtype | None = None) -> None:
    """Make a layer ready for adapters, on it or before it; a no-op for plain ones.

    Args:
        module: any layer.
        dtype: of the model around it.

    Raises:
        ValueError: it cannot be trained on; the reason only.
    """
    packing = _candidate(module)
    if packing is None:
        return
    if is_sharded(module.weight) and not packing.shards:
        raise ValueError(f"its quantized weight ({type(module).__name__}) does not work sharded: use 'nf4', or do not shard it")
    if not packing.is_quantized(module) and not module.weight.is_meta:
        remember(module, sampled_digest(module.weight))
    packing.prepare(module, dtype)


def plain_dtype(model: nn.Module) -> torch.dtype | None:
    """Of a model's parameters that are not packed (embeddings, norms); None if it has none in floating point."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point() and not (name == "weight" and _candidate(module)):
                return parameter.dtype
    return None


def dequantized(module: Any) -> Tensor:
    """The layer's weight in floating point: itself, or what a quantized one unpacks to.

    Raises:
        ValueError: it is sharded, or packed in a way that no packing knows; the reason only.
    """
    packing = format_of(module)
    if packing is None:
        if not module.weight.is_floating_point():
            raise ValueError(f"the weight is quantized ({module.weight.dtype}) in a way that is not known")
        return module.weight
    if is_sharded(module.weight):
        raise ValueError(
            "its quantized weight is sharded and no process can dequantize it: save the adapter and do this in a single process"
        )
    with torch.no_grad():
        return packing.dequantize(module)


def take(module: Any, packing: QuantizedFormat) -> QuantizedUndo:
    """The packed weight with what belongs to it, still in the layer."""
    return QuantizedUndo(
        type(module), module.weight, {name: module.__dict__[name] for name in packing.attributes if name in module.__dict__}
    )


def elements(module: nn.Module, name: str, parameter: Tensor) -> int:
    """How many numbers a parameter stands for; packed ones hold several an element."""
    packed = name == "weight" and format_of(module) is not None
    return module.in_features * module.out_features if packed else parameter.numel()  # type: ignore[operator, return-value]


def remember(module: nn.Module, digest: str) -> None:
    """Note what the weight was before it was packed, so that a quantized copy is known as the same base."""
    module.__dict__[_DIGEST] = digest


def weight_digest(module: Any) -> str:
    """Sampled digest of a layer's weight; of a quantized one what it was before it was packed, or if that is not known, ``packed:…``."""
    packing = format_of(module)
    if packing is None:
        return sampled_digest(full_tensor(module.weight.detach()))
    if _DIGEST in module.__dict__:
        return module.__dict__[_DIGEST]
    return UNKNOWN + "+".join(sampled_digest(code) for code in packing.codes(module))


def _candidate(module: nn.Module) -> QuantizedFormat | None:
    weight = module._parameters.get("weight")
    for cls in (*type(module).__mro__, *(() if weight is None else type(local_tensor(weight)).__mro__)):
        packing = QUANTIZED_FORMATS.get(qualified_name(cls))
        if packing is not None:
            return packing
    return None
