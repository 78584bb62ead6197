"""What a quantized weight was before, and what it is now: digests, and the factors of what quantizing lost."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_lora.quantization.formats import CODES, DIGEST, format_of
from lightning_lora.utils.checksums import sampled_digest

UNKNOWN = "packed:"  # prefix of the digest of a weight that was loaded quantized
_LOST = "_lost_factors"


def remember_lost(module: nn.Module, A: Tensor, B: Tensor) -> None:
    """Keep low-rank factors of what quantizing a weight lost, (r, in) and (out, r), for an adapter that makes up for it."""
    module.__dict__[_LOST] = (A, B)


def lost_factors(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return what :func:`remember_lost` kept, None if nothing was."""
    return module.__dict__.get(_LOST)


def forget_origin(module: nn.Module) -> None:
    """Forget what a quantized weight was before it was quantized: it is another one now, and stays so."""
    for name in (DIGEST, CODES, _LOST):
        module.__dict__.pop(name, None)


def packed_digest(module: Any) -> str | None:
    """Return ``format=digest`` of a quantized weight as it is stored, sampled; None for a plain weight. A merge does not change it."""
    packing = format_of(module) if "weight" in module._parameters else None
    if packing is not None and not module.weight.is_meta and CODES not in module.__dict__:
        codes = "+".join(sampled_digest(code) for code in packing.codes(module))
        module.__dict__[CODES] = f"{type(packing).__name__.removesuffix('Format')}={codes}"
    return module.__dict__.get(CODES)


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
    if (digest := packing.digest(module)) is not None:
        return digest
    return UNKNOWN + "+".join(sampled_digest(code) for code in packing.codes(module))
