"""Read and write adapter files: a folder in PEFT's format, or a Lightning checkpoint, as one plain record.

The safetensors metadata holds what PEFT's format has no field for: our format version, the exact config and the base's identity.

Two files cannot be renamed in one step. So when a folder is overwritten with another config, the old JSON is removed first and the new
one is written last. A crash leaves a matching pair, or tensors without a JSON, but never a mixed pair. Tensors without a JSON still load
here, because their metadata holds the config. The exception is a folder that PEFT wrote, whose tensors have no such metadata: after a
crash between the two writes, loading it says that the JSON is missing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_lora.adapter_io import peft_format
from lightning_lora.adapter_io.metadata import FORMAT_VERSION, META, parsed, understood
from lightning_lora.adapter_io.peft_names import PREFIX, our_names
from lightning_lora.config import LoRAConfig
from lightning_lora.utils.atomic_files import sync_folder, write_atomic
from lightning_lora.utils.read_checkpoint import read_checkpoint

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class AdapterFile:
    """The content of a file, not yet checked against a model.

    Attributes:
        config: how the layers were adapted.
        tensors: by their names in the adapted model (``layers.0.q_proj.lora_A``), relative to the adapted model itself.
        base: the base's identity; None in files that PEFT wrote.
        beside: names of tensors beside the adapter and what trained: buffers, base weights that changed.
        fields: the JSON of a folder that PEFT wrote; ``config`` is then what it says without a model.
        extra_state: name in a state dict → a module's extra state, from a checkpoint.
        outside: the same two, of the task around the adapted model, by their names there; for the adapted model alone they have no place.
    """

    config: LoRAConfig
    tensors: dict[str, Tensor]
    base: dict[str, Any] | None
    beside: frozenset[str] = frozenset()
    fields: dict[str, Any] | None = None
    extra_state: dict[str, Any] = field(default_factory=dict)
    outside: dict[str, Any] = field(default_factory=dict)

    def meta(self, **more: Any) -> dict[str, Any]:
        """Return the metadata that is stored beside the tensors, as plain types."""
        return {"format_version": FORMAT_VERSION, "config": self.config.to_dict(), "base": self.base, **more}


def read_adapter(path: str | Path) -> AdapterFile:
    """Read an adapter folder or a checkpoint written under ``LoRACallback``.

    Raises:
        ValueError: a file is missing, unreadable or of a newer format, or the two files are of different saves.
    """
    path = Path(path)
    return _read_checkpoint(path) if path.is_file() else _read_folder(path)


def write_folder(folder: Path, content: AdapterFile, fields: dict[str, Any]) -> None:
    """Write both files of a folder.

    Args:
        folder: created if it does not exist.
        content: its tensors have PEFT's names, without PEFT's prefix.
        fields: the content of ``adapter_config.json``.
    """
    tensors = {PREFIX + name: tensor.detach().cpu().clone().contiguous() for name, tensor in content.tensors.items()}
    meta = content.meta(**({"beside": sorted(content.beside)} if content.beside else {}))
    data = safetensors.torch.save(tensors, {"format": "pt", META: json.dumps(meta)})
    text = (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / CONFIG).is_file() and (folder / CONFIG).read_bytes() != text:
        (folder / CONFIG).unlink()
        sync_folder(folder)
    write_atomic(folder / TENSORS, data)
    write_atomic(folder / CONFIG, text)


def _read_folder(folder: Path) -> AdapterFile:
    file = folder / TENSORS
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such adapter folder or checkpoint.")
    if not file.is_file():
        pickled = folder / "adapter_model.bin"
        hint = (
            f"; {pickled.name} is a pickle, which can run code: load it in PEFT and save it with safe_serialization=True"
            if pickled.exists()
            else ""
        )
        raise ValueError(f"{file} is missing{hint}.")
    try:
        with safe_open(file, framework="pt") as reader:
            said = (reader.metadata() or {}).get(META, "null")
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file (truncated?): {error}") from error
    meta = parsed(said, f"{file}: its {META} metadata", kinds=(dict, NoneType))
    named: dict[str, Tensor] = {}
    for name, ours in our_names(tensors, str(file)).items():
        twin = named.setdefault(ours, tensors[name])
        if twin is not tensors[name] and not (twin.dtype == tensors[name].dtype and twin.equal(tensors[name])):
            raise ValueError(f"{file} holds two tensors for the parameter of {name!r}, with different values.")
    if meta is None:  # PEFT wrote the file
        words = _read_json(folder / CONFIG)
        return AdapterFile(peft_format.from_peft(words, str(folder / CONFIG), named), named, None, fields=words)
    config, base, _ = understood(meta, str(file))
    fields = peft_format.as_lora(_read_json(folder / CONFIG), str(folder / CONFIG)) if (folder / CONFIG).is_file() else None
    said = {"r": config.rank, "lora_alpha": config.alpha, "use_rslora": config.scaling == "rslora", "bias": config.bias}
    for name, mine in said.items():
        if fields is not None and fields.get(name) != mine:
            raise ValueError(
                f"{folder}: {CONFIG} says {name}={fields.get(name)!r}, the tensors were saved with {mine!r}: files of two different saves."
            )
    if fields is not None and (other := peft_format.variant_of(fields)) != peft_format.variant_of(peft_format.variant_fields(config)):
        raise ValueError(
            f"{folder}: {CONFIG} is of a {other!r} adapter, the tensors were saved with {config.variant!r}: files of two different saves."
        )
    return AdapterFile(config, named, base, frozenset(meta.get("beside", ())))


def _read_checkpoint(file: Path) -> AdapterFile:
    if file.suffix == ".safetensors":
        raise ValueError(f"{file} is part of an adapter folder: load {file.parent}.")
    checkpoint = read_checkpoint(file)
    meta = checkpoint.get(META) if isinstance(checkpoint, dict) else None
    if meta is None:
        raise ValueError(f"{file} was not written under LoRACallback: it holds no adapter.")
    config, base, root = understood(meta, str(file))
    prefix, tensors = f"{root}." if root else "", checkpoint.get("state_dict", {})
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{file}: its state_dict is no mapping from names to tensors.")
    beside = frozenset(meta.get("beside", ()))  # of the task around the adapted model, where it is outside
    outside = [name for name in tensors if not name.startswith(prefix) and name not in beside]
    if outside:
        raise ValueError(f"{file}: {outside[0]!r} is not part of {root!r}; load it through Trainer(...).fit(ckpt_path=...).")
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    rest = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
    extra = {name: value for name, value in own.items() if not isinstance(value, Tensor)}
    own = {name: tensor for name, tensor in own.items() if name not in extra}
    beside = frozenset(name.removeprefix(prefix) for name in beside if name.startswith(prefix))
    return AdapterFile(config, own, base, beside, extra_state=extra, outside=rest)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text()
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON, and cannot be read: {error}.") from error
    return parsed(text, str(file))
