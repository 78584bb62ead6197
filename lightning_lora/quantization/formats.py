"""Quantized weights: read, write and dequantize the weight of a layer, and undo a merge into it.

The forward pass of a quantized base needs none of this. An adapted layer calls the base through ``super().forward``, or passes the
quantized weight to one operation for base and update (:mod:`lightning_lora.ops.frozen_weight`). Merging, exporting and identifying the
base need it. Each storage format has one :class:`QuantizedFormat`, found by the qualified name of the layer's type, of its weight's
type, or of the mark that a library sets on it. So a library is imported only for a model that uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.registry import qualified_name, qualified_names
from lightning_lora.utils.checksums import sampled_digest
from lightning_lora.utils.sharding import is_sharded, local_tensor
from lightning_lora.utils.torch_private_parallel import let_fsdp2_shard_integers

QUANTIZED_FORMATS: dict[str, QuantizedFormat] = {}  # qualified name of a layer's or a weight's type → its format

DIGEST, CODES = "_unpacked_digest", "_packed_digest"  # see content.py
PACKED, PACKED_STACKS = "packed_stack", "packed_stacks"  # the marks of a layer with one packed stack, of a module with several
_MARKS = ("quantization_scheme", PACKED)  # marks on a layer of a plain type; the first is compressed-tensors'


class QuantizedFormat:
    """One storage format of a linear layer's weight, or of the weights of experts."""

    #: The layer's other attributes that belong to the quantized weight.
    attributes: ClassVar[tuple[str, ...]] = ()
    #: True if :meth:`requantize` is implemented.
    requantizes: ClassVar[bool] = True
    #: True if FSDP2 can shard and gather the quantized weight.
    shards: ClassVar[bool] = False
    #: What :meth:`unpacked_class` returns.
    plain_class: ClassVar[type[nn.Module] | None] = None

    def is_quantized(self, module: Any) -> bool:
        """True if the weight is quantized already. Some formats quantize only when the layer is moved to a device."""
        return True

    def refusal(self, module: Any) -> str | None:
        """Return only the reason why the layer cannot be trained on; None if it can."""
        return None

    def input_error(self, module: Any) -> float:
        """Return the relative error of the layer's products from inputs that it quantizes too; 0 if it multiplies inputs as they are."""
        return 0.0

    def prepare(self, module: Any, dtype: torch.dtype | None) -> None:
        """Prepare a layer that is not refused for training adapters on it. Quantize it if it is not quantized yet.

        Args:
            module: the layer.
            dtype: dtype of the surrounding model, for a format that does not record the dtype it was quantized from.
        """

    def restore(self, module: Any) -> None:
        """Undo what :meth:`prepare` changed about the layer's class, once it has no adapter."""

    def packed(self, module: Any) -> tuple[str, ...]:
        """Return the names of the quantized parameters."""
        return ("weight",)

    def shape(self, module: Any, name: str) -> torch.Size:
        """Return the shape that a quantized parameter stands for."""
        return torch.Size((module.out_features, module.in_features))

    def single(self, module: Any, name: str) -> Any:
        """Return the layer that has a quantized parameter as its ``weight``."""
        return module

    def unpacked_class(self, module: Any) -> type[nn.Module] | None:
        """Return the layer's class once its weight is in floating point; None keeps the class."""
        return self.plain_class

    def digest(self, module: Any) -> str | None:
        """Return the digest of the weight from before it was quantized, None if it is not known."""
        digest: str | None = module.__dict__.get(DIGEST)
        return digest

    def dequantize(self, module: Any) -> Tensor:
        """Return the weight (out, in) in the floating dtype that the layer would multiply in."""
        raise NotImplementedError(f"{type(self).__name__} must implement dequantize")

    def requantize(self, module: Any, weight: Tensor) -> None:
        """Quantize another weight in the way this one is quantized. The old one's tensors are not written to."""
        raise NotImplementedError(f"{type(self).__name__} must implement requantize")

    def codes(self, module: Any) -> list[Tensor]:
        """Return the tensors that store the weight."""
        raise NotImplementedError(f"{type(self).__name__} must implement codes")

    def unpacked_dtype(self, module: Any) -> torch.dtype:
        """Return the dtype that the weight had, or would have had, before it was quantized."""
        raise NotImplementedError(f"{type(self).__name__} must implement unpacked_dtype")

    def take_over(self, module: Any, other: Any) -> None:
        """Take the quantized weight of another layer of the same sizes; if this one is sharded, this rank's piece."""
        raise NotImplementedError(f"{type(self).__name__} must implement take_over")


@dataclass
class QuantizedUndo:
    """Undo record of a merge into a quantized layer: the quantized weight, the layer's class and attributes.

    It is kept while a merged weight replaces the quantized one.
    """

    layer_class: type[nn.Module]
    weight: nn.Parameter
    attributes: dict[str, Any]

    def put_back(self, module: nn.Module) -> None:
        """Restore them in the layer that they were taken from, bit for bit."""
        module.__class__ = self.layer_class
        module._parameters["weight"] = self.weight
        module.__dict__.update(self.attributes)


def format_of(module: nn.Module) -> QuantizedFormat | None:
    """Return the format of the layer's quantized weight, None for a weight in floating point."""
    packing = _candidate(module)
    return packing if packing is not None and packing.is_quantized(module) else None


def unknown_storage(module: nn.Module, name: str) -> str | None:
    """Return how a layer's weight of that name is stored, if that is neither plain floating point nor a known format; else None.

    An 8-bit weight has scales in another tensor. A tensor subclass with operations of its own may hold anything. Both differ from the
    numbers that they show, so adding an update to them would silently lose it.
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
    """Make a layer ready for adapters, on it or on layers before it. Does nothing for plain layers.

    Args:
        module: any layer.
        dtype: dtype of the surrounding model.

    Raises:
        ValueError: the layer cannot be trained on. The message is only the reason.
    """
    reason = why_not_prepared(module)
    if reason:
        raise ValueError(reason)
    packing = _candidate(module)
    if packing is None:
        return
    if packing.shards:
        let_fsdp2_shard_integers()
    if not packing.is_quantized(module) and "weight" in module._parameters and not module.weight.is_meta:
        remember(module, sampled_digest(module.weight))
    packing.prepare(module, dtype)


def restore(module: Any) -> None:
    """Undo :func:`prepare`, for a layer that has no adapter any more. Does nothing for plain layers."""
    packing = _candidate(module)
    if packing is not None:
        packing.restore(module)


def why_not_prepared(module: Any) -> str | None:
    """Return only the reason why :func:`prepare` refuses a layer; None if it does not."""
    packing = _candidate(module)
    if packing is None:
        return None
    weights = (module._parameters.get(name) for name in packing.packed(module))
    if not packing.shards and any(weight is not None and is_sharded(weight) for weight in weights):
        return f"its quantized weight ({type(module).__name__}) cannot be sharded: use 'nf4' or 'fp8', or do not shard it"
    return packing.refusal(module)


def plain_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of the model's first floating-point parameter that is not quantized (embeddings, norms), None if it has none."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point() and name not in _names(module):
                return parameter.dtype
    return None


def dequantized(module: Any) -> Tensor:
    """Return the layer's weight in floating point. A quantized weight is dequantized; any other is returned itself.

    Raises:
        ValueError: the weight is sharded, or quantized in an unknown format. The message is only the reason.
    """
    packing = format_of(module)
    if packing is None:
        if not module.weight.is_floating_point():
            raise ValueError(f"the weight is quantized ({module.weight.dtype}) in an unknown format")
        return module.weight
    if is_sharded(module.weight):
        raise ValueError(
            "its quantized weight is sharded and no process can dequantize it: save the adapter and do this in a single process"
        )
    with torch.no_grad():
        return packing.dequantize(module)


def take(module: Any, packing: QuantizedFormat) -> QuantizedUndo:
    """Return the undo record of a layer: its quantized weight and what belongs to it. The layer keeps them."""
    return QuantizedUndo(
        type(module), module.weight, {name: module.__dict__[name] for name in packing.attributes if name in module.__dict__}
    )


def elements(module: nn.Module, name: str, parameter: Tensor) -> int:
    """Return how many numbers of the model a parameter represents. A quantized weight stores several per element; its scales are none."""
    packing = format_of(module)
    if packing is not None and name in packing.attributes:
        return 0
    return plain_shape(module, name).numel() if packing is not None and name in packing.packed(module) else parameter.numel()


def plain_shape(module: Any, name: str) -> torch.Size:
    """Return the shape of a weight, or the shape that it stands for if it is quantized."""
    packing = format_of(module)
    if packing is not None and name in packing.packed(module):
        return packing.shape(module, name)
    shape: torch.Size = module._parameters[name].shape
    return shape


def single(module: Any, name: str) -> Any:
    """Return the layer that has a quantized parameter as its ``weight``, the module itself for a parameter of that name, else None."""
    packing = format_of(module)
    if packing is not None and name in packing.packed(module):
        return packing.single(module, name)
    return module if name == "weight" else None


def stand_ins(module: nn.Module) -> dict[str, Any]:
    """Return name → what stands for a packed stack of the module in products."""
    stacks = module.__dict__.get(PACKED_STACKS, {})
    return {name: packed.stack(module._parameters[name]) for name, packed in stacks.items()}


def hand_out(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Give a layer with one of a module's weights as its ``weight`` what is packed beside it."""
    layer.__dict__[PACKED] = module.__dict__.get(PACKED_STACKS, {}).get(name)


def take_back(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Give a module what is packed beside one of its weights, after the layer of :func:`hand_out` changed it."""
    stacks, packed = module.__dict__.get(PACKED_STACKS), layer.__dict__.get(PACKED)
    if stacks is not None:
        stacks.pop(name, None)
        stacks.update({} if packed is None else {name: packed})


def remember(module: nn.Module, digest: str) -> None:
    """Record the digest of the weight before it is quantized, so that a quantized copy counts as the same base."""
    module.__dict__[DIGEST] = digest
    module.__dict__.pop(CODES, None)  # that of the codes before


def _candidate(module: nn.Module) -> QuantizedFormat | None:
    if isinstance(module, torch.jit.ScriptModule):  # never quantized; its table of parameters is no dict
        return None
    weight = module._parameters.get("weight")
    for each in (module, None if weight is None else local_tensor(weight), *map(module.__dict__.get, _MARKS)):
        if each is not None:
            for name in qualified_names(type(each)):
                if name in QUANTIZED_FORMATS:
                    return QUANTIZED_FORMATS[name]
    return None


def _names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's parameters that belong to its weights, quantized or to be quantized."""
    packing = _candidate(module)
    return () if packing is None else (*packing.packed(module), *packing.attributes)
