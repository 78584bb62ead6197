"""Quantized weights: read, write and dequantize the weight of a layer, and undo a merge into it.

The forward pass of a quantized base needs none of this. An adapted layer calls the base through ``super().forward``, or passes the
quantized weight to one operation for base and update (:mod:`lightning_lora.ops.frozen_weight`). Merging, exporting and identifying the
base need it. Each storage format has one :class:`QuantizedFormat`, found by the qualified name of the layer's type, of its weight's
type, or of the mark that a library sets on it. So a library is imported only for a model that uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.registry import look_up, qualified_name
from lightning_lora.utils.checksums import sampled_digest
from lightning_lora.utils.sharding import is_sharded, local_tensor
from lightning_lora.utils.torch_private_parallel import let_fsdp2_shard_integers

QUANTIZED_FORMATS: dict[str, QuantizedFormat] = {}  # qualified name of a layer's or a weight's type → its format
QUANTIZERS: dict[str, Quantizer] = {}  # quantize=… → what quantizes a linear

UNKNOWN = "packed:"  # prefix of the digest of a weight that was loaded quantized
_DIGEST = "_unpacked_digest"
_CODES = "_packed_digest"
_LOST = "_lost_factors"
_SCHEME = "quantization_scheme"  # compressed-tensors' mark on a layer of a plain type


class QuantizedFormat:
    """One storage format of a linear layer's weight."""

    #: The layer's other attributes that belong to the quantized weight.
    attributes: ClassVar[tuple[str, ...]] = ()
    #: True if :meth:`requantize` is implemented.
    requantizes: ClassVar[bool] = True
    #: True if FSDP2 can shard and gather the quantized weight.
    shards: ClassVar[bool] = False
    #: The layer's class once its weight is in floating point; None keeps the class.
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

    def dequantize(self, module: Any) -> Tensor:
        """Return the weight (out, in) in the floating dtype that the layer would multiply in."""
        raise NotImplementedError(f"{type(self).__name__} must implement dequantize")

    def requantize(self, module: Any, weight: Tensor) -> None:
        """Quantize another weight in the way this one is quantized. The old one's tensors are not written to."""
        raise NotImplementedError(f"{type(self).__name__} must implement requantize")

    def codes(self, module: Any) -> list[Tensor]:
        """Return the tensors that store the weight."""
        raise NotImplementedError(f"{type(self).__name__} must implement codes")


@dataclass(frozen=True)
class Quantizer:
    """One way to quantize a plain linear.

    Attributes:
        pack: quantizes the layer's weight in place, computing on a device. The quantized weight is on the plain one's device.
        check_installed: imports the library, or raises ImportError that names the extra to install.
        makes: the format, as :func:`packed_digest` names it.
        unit: number that the count of the weight's entries must be a multiple of.
    """

    pack: Callable[[nn.Linear, torch.device], None]
    check_installed: Callable[[], Any]
    makes: str
    unit: int = 1


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


def quantizer_of(name: str) -> Quantizer:
    """Return the quantizer for a format, by its name in ``quantize``.

    Raises:
        ValueError: the name is unknown. The message lists the known names.
    """
    return look_up(QUANTIZERS, "quantize", name)


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
    if not packing.is_quantized(module) and not module.weight.is_meta:
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
    if not packing.shards and "weight" in module._parameters and is_sharded(module.weight):
        return f"its quantized weight ({type(module).__name__}) cannot be sharded: use 'nf4' or 'fp8', or do not shard it"
    return packing.refusal(module)


def plain_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of the model's first floating-point parameter that is not quantized (embeddings, norms), None if it has none."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point() and not (name == "weight" and _candidate(module)):
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
    """Return how many numbers a parameter represents. A quantized weight stores several per element."""
    packed = name == "weight" and format_of(module) is not None
    return module.in_features * module.out_features if packed else parameter.numel()  # type: ignore[operator, return-value]


def remember(module: nn.Module, digest: str) -> None:
    """Record the digest of the weight before it is quantized, so that a quantized copy counts as the same base."""
    module.__dict__[_DIGEST] = digest


def remember_lost(module: nn.Module, A: Tensor, B: Tensor) -> None:
    """Keep low-rank factors of what quantizing a weight lost, (r, in) and (out, r), for an adapter that makes up for it."""
    module.__dict__[_LOST] = (A, B)


def lost_factors(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return what :func:`remember_lost` kept, None if nothing was."""
    return module.__dict__.get(_LOST)


def packed_digest(module: Any) -> str | None:
    """Return ``format=digest`` of a quantized weight as it is stored, sampled; None for a plain weight. A merge does not change it."""
    packing = format_of(module) if "weight" in module._parameters else None
    if packing is not None and not module.weight.is_meta and _CODES not in module.__dict__:
        codes = "+".join(sampled_digest(code) for code in packing.codes(module))
        module.__dict__[_CODES] = f"{type(packing).__name__.removesuffix('Format')}={codes}"
    return module.__dict__.get(_CODES)


def weight_digest(module: Any) -> str:
    """Return the sampled digest of a layer's weight.

    For a quantized weight it is the digest from before it was quantized, or ``packed:…`` if that is unknown.
    """
    content = digest_or_weight(module)
    return content if isinstance(content, str) else sampled_digest(content)


def digest_or_weight(module: Any) -> str | Tensor:
    """Return :func:`weight_digest` if it is known or the weight is quantized; otherwise the weight that it is to be computed from."""
    packing = format_of(module)
    if packing is None:
        weight: Tensor = module.weight
        return weight
    if _DIGEST in module.__dict__:
        return module.__dict__[_DIGEST]
    return UNKNOWN + "+".join(sampled_digest(code) for code in packing.codes(module))


def _candidate(module: nn.Module) -> QuantizedFormat | None:
    if isinstance(module, torch.jit.ScriptModule):  # never quantized; its table of parameters is no dict
        return None
    weight, scheme = module._parameters.get("weight"), module.__dict__.get(_SCHEME)
    for cls in (*type(module).__mro__, *(() if weight is None else type(local_tensor(weight)).__mro__), *type(scheme).__mro__):
        packing = QUANTIZED_FORMATS.get(qualified_name(cls))
        if packing is not None:
            return packing
    return None
