"""Check that an adapter folder is what ``save_adapter`` wrote: its checksum, and the JSON's fields against those that were saved.

The metadata of the tensors holds the JSON's fields, and a checksum over the tensors and the rest of the metadata. Users often edit a JSON.
An edit that does not change the adapter, such as the base's path, takes effect. An edit that would change the adapter is refused by the
field's name, because it cannot be distinguished from the JSON of another save.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_lora.adapter_io import peft_format
from lightning_lora.config import LoRAConfig
from lightning_lora.utils.checksums import checksum


def seal(meta: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return the checksum of an adapter's metadata, except the checksum in it, and of its tensors' names, dtypes, shapes and bits."""
    parts = [json.dumps({name: value for name, value in meta.items() if name != "checksum"}, sort_keys=True)]
    parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)} {checksum(tensor)}" for name, tensor in sorted(tensors.items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def check_fields(fields: dict[str, Any], meta: dict[str, Any], config: LoRAConfig, tensors: Collection[str], where: str) -> None:
    """Check that a JSON follows PEFT's format, and that it agrees with the metadata of the tensors beside it.

    Args:
        fields: the JSON.
        meta: the metadata.
        config: from the metadata.
        tensors: names of the tensors.
        where: the JSON's path, for messages.

    Raises:
        ValueError: a field means another adapter than was saved, or is not supported.
    """
    said = {"r": config.rank, "lora_alpha": config.alpha, "use_rslora": config.scaling == "rslora", "bias": config.bias}
    saved = meta.get("json", fields | said)  # folders of earlier versions have no such entry
    if not isinstance(saved, dict):
        raise ValueError(f"{where}: the metadata beside it is malformed: json={saved!r}.")
    other, variant = peft_format.variant_of(fields), peft_format.variant_of(peft_format.variant_fields(config))
    if other != variant:
        names = [name for one in (variant, other) for name in peft_format.variant_fields(replace(config, variant=one))]
        name = next((name for name in names if fields.get(name) != saved.get(name)), names[0])
        raise ValueError(
            f"{where} says {name}={fields.get(name)!r} and so is of a {other!r} adapter, the tensors were saved with {variant!r}:"
            " files of two different saves."
        )
    now, then = peft_format.from_peft(fields, where, tensors), _meant(saved, where, tensors)
    if now == then:
        return
    # As text: 1, 1.0 and True are equal and do not mean the same.
    changed = [name for name in sorted(fields.keys() | saved.keys()) if repr(fields.get(name)) != repr(saved.get(name))]
    guilty = [name for name in changed if _meant({**saved, name: fields.get(name)}, where, tensors) != then]
    name = (guilty or changed)[0]
    raise ValueError(
        f"{where} says {name}={fields.get(name)!r}, the tensors were saved with {saved.get(name)!r}: files of two different saves, or an"
        " edit. Put the value back. If you meant the edit, save the tensors without the file's metadata; the JSON then counts."
    )


def _meant(fields: dict[str, Any], where: str, tensors: Collection[str]) -> LoRAConfig | None:
    """Return the config that a JSON means; None if it means no adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return peft_format.from_peft(fields, where, tensors)
        except ValueError:
            return None
