"""Note a model's buffers and extra state when it is adapted, so that what moved since can be told from the base.

Training moves more than parameters: a running normalizer, a codebook that follows an average, a queue, a counter. An adapter file needs
what moved. What did not move is the base's, and only its digest is stored. The notes are on the modules, so copies and pickles of a model
have them too.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.quantization.formats import format_of
from lightning_lora.utils.checksums import checksum
from lightning_lora.utils.names import clean_name, join

_NOTED = "_lora_noted_state"  # of a module: name of a buffer → dtype → checksum of it in that dtype; and the digest of its extra state
_CASTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # a model that is cast, as for precision="bf16-true", has not moved
EXTRA = "_extra_state"  # torch's name for extra state in state dicts


def note_state(model: nn.Module) -> None:
    """Note the present buffers and extra state of a model as its base's."""
    for _, module in model.named_modules():
        noted: dict[str, Any] = {name: _checksums(buffer) for name, buffer in _buffers(module)}
        if has_extra_state(module):
            noted[EXTRA] = _digest(module)
        if noted:
            module.__dict__[_NOTED] = noted


def forget_state(model: nn.Module) -> None:
    """Remove the notes."""
    for module in model.modules():
        module.__dict__.pop(_NOTED, None)


def base_buffers(model: nn.Module, *, moved: bool) -> dict[str, Tensor]:
    """Return FQN → persistent buffer that moved since it was noted, or that did not.

    Buffers of packed weights are left out: a merge changes them. So are those on the meta device, sparse and sharded ones.
    """
    return {
        clean_name(join(prefix, name)): buffer
        for prefix, module in model.named_modules()
        for name, buffer in _buffers(module)
        if _moved(module, name, buffer) == moved
    }


def _moved(module: nn.Module, name: str, buffer: Tensor) -> bool:
    noted = module.__dict__.get(_NOTED, {}).get(name)
    return noted is not None and noted.get(buffer.dtype) != checksum(buffer)


def _checksums(buffer: Tensor) -> dict[torch.dtype, str]:
    """Return the buffer's checksum in its dtype, and in those that a module is cast to."""
    return {dtype: checksum(buffer.to(dtype)) for dtype in {buffer.dtype, *(_CASTS if buffer.is_floating_point() else ())}}


def moved_extra_state(model: nn.Module) -> list[str]:
    """Return the names of the modules whose extra state (torch's ``get_extra_state``) moved, as far as it can be compared."""
    return [
        clean_name(prefix) or type(module).__name__
        for prefix, module in model.named_modules()
        if has_extra_state(module) and (module.__dict__.get(_NOTED, {}).get(EXTRA) or "unknown") != _digest(module)
    ]


def has_extra_state(module: nn.Module) -> bool:
    """Return whether a module has state of its own kind in its state dict."""
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the persistent buffers that are plain tensors with values. Sharded ones are not."""
    if format_of(module) is None:
        for name, buffer in module._buffers.items():
            if type(buffer) is not Tensor or name in module._non_persistent_buffers_set:
                continue
            if buffer.layout is torch.strided and not (buffer.is_meta or buffer.is_quantized):
                yield name, buffer


def _digest(module: Any) -> str | None:
    try:
        return sha256(pickle.dumps(module.get_extra_state())).hexdigest()
    except (pickle.PicklingError, TypeError, AttributeError):  # of objects that cannot be pickled
        return None
