"""Read and write adapter files: a folder in PEFT's format, or a Lightning checkpoint, as one plain record.

The safetensors metadata holds what PEFT's format has no field for: our format version, the exact config and the base's identity.

Both files are written as one commit (:mod:`lightning_lora.storage.folder_commit`), and read from one. The metadata also holds the JSON's
fields and a checksum (:mod:`lightning_lora.adapter_io.integrity`). So files of two different saves are refused. So are damaged files, and
edits that change the adapter. Tensors without a JSON still load here, because their metadata holds the config.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_lora.adapter_io import peft_format
from lightning_lora.adapter_io.integrity import check_fields, seal
from lightning_lora.adapter_io.metadata import FORMAT_VERSION, META, parsed, understood
from lightning_lora.adapter_io.peft_names import PREFIX, factor_in_file, our_names
from lightning_lora.config import LoRAConfig
from lightning_lora.storage.atomic_files import write_atomic
from lightning_lora.storage.folder_commit import commit, occupied, read_undisturbed
from lightning_lora.storage.folders import standing
from lightning_lora.storage.read_checkpoint import read_checkpoint
from lightning_lora.storage.regular_files import WrongPath, read_regular, said_instead
from lightning_lora.storage.sharded_checkpoint import REST, read_folder

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
LONGEST = 2**24  # bytes of JSON; 100,000 layers that are named one by one take half of it


@dataclass(frozen=True)
class AdapterFile:
    """The content of a file, not yet checked against a model.

    Attributes:
        config: how the layers were adapted.
        tensors: by their names in the adapted model (``layers.0.q_proj.lora_A``), relative to the adapted model itself.
        base: the base's identity; None in files that PEFT wrote.
        beside: names of the tensors that are no adapter's and did not train: buffers, base weights that changed.
        fields: the JSON of a folder that PEFT wrote; ``config`` is then what the JSON alone says, without a model.
        extra_state: name in a state dict → a module's extra state, from a checkpoint.
        outside: tensors and extra state of the task around the adapted model, by their names there. The adapted model cannot take them.
        damaged: True if the checksum in the file is not that of its content. It is checked last, because other checks name the fault more
            exactly.
        root: name of the adapted model in the module of a checkpoint, with which patterns in ``config`` may begin.
    """

    config: LoRAConfig
    tensors: dict[str, Tensor]
    base: dict[str, Any] | None
    beside: frozenset[str] = frozenset()
    fields: dict[str, Any] | None = None
    extra_state: dict[str, Any] = field(default_factory=dict)
    outside: dict[str, Any] = field(default_factory=dict)
    damaged: bool = False
    root: str = field(default="", compare=False)

    def check_intact(self, where: str) -> None:
        """Raise ValueError if the content is not what was saved."""
        if self.damaged:
            raise ValueError(
                f"{where}: the content of {TENSORS} is not what was saved (its checksum differs): it is damaged or was edited. If you"
                " meant the edit, save the tensors without the file's metadata; the JSON then says what they are."
            )

    def checksum(self) -> str:
        """Return a checksum of the adapter, that which a merge certificate has."""
        return seal({"config": self.config.to_dict()}, self.tensors)

    def meta(self, **more: Any) -> dict[str, Any]:
        """Return the metadata that is stored beside the tensors, as plain types."""
        return {"format_version": FORMAT_VERSION, "config": self.config.to_dict(), "base": self.base, **more}


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter folder with the names and fields of its files.

    Attributes:
        tensors: by their names in the file.
        fields: the content of ``adapter_config.json``.
        config: the exact config; None in folders that PEFT wrote.
        base: the base's identity, if the files have it.
        beside: names of the tensors that did not train, as in :class:`AdapterFile`.
    """

    tensors: dict[str, Tensor]
    fields: dict[str, Any]
    config: LoRAConfig | None
    base: dict[str, Any] | None
    beside: frozenset[str] = frozenset()


def read_raw(folder: str | Path) -> AdapterFolder:
    """Read an adapter folder, and check it as :func:`read_adapter` does.

    Raises:
        ValueError: a file is missing, damaged or of another save.
    """
    return read_undisturbed(Path(folder), (TENSORS, CONFIG), _read_raw)


def _read_raw(folder: Path) -> AdapterFolder:
    content = _read_folder(folder)
    content.check_intact(str(folder))
    fields = content.fields if content.fields is not None else _read_json(folder / CONFIG)
    config = content.config if content.fields is None else None
    return AdapterFolder(safetensors.torch.load_file(folder / TENSORS), dict(fields), config, content.base, content.beside)


def encoded(adapter: AdapterFolder) -> bytes:
    """Return the content of the tensors' file: with our metadata if the adapter has a config of ours."""
    if adapter.config is None:
        return safetensors.torch.save(adapter.tensors, {"format": "pt"})
    content = AdapterFile(adapter.config, adapter.tensors, adapter.base, adapter.beside)
    return _encoded(content, adapter.tensors, adapter.fields)


def _encoded(content: AdapterFile, tensors: dict[str, Tensor], fields: dict[str, Any]) -> bytes:
    meta = content.meta(json=fields, **({"beside": sorted(content.beside)} if content.beside else {}))
    return safetensors.torch.save(tensors, {"format": "pt", META: json.dumps(meta | {"checksum": seal(meta, tensors)})})


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise ValueError if a folder is a file, or is not empty and must not be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is a file; choose another.")
    if occupied(folder) and not overwrite:
        raise ValueError(f"folder={str(folder)!r} is not empty; choose another or pass overwrite=True.")


def read_adapter(path: str | Path) -> AdapterFile:
    """Read an adapter folder, or a checkpoint written under ``LoRACallback``: a file or a folder of shards.

    Raises:
        WrongPath: there is no such adapter or checkpoint.
        ValueError: a file is unreadable or of a newer format, or the two files are of different saves.
    """
    path = Path(path)
    place = standing(path)
    if place.is_file():
        return _of_checkpoint(_read_file(place), place)
    if (place / REST).is_file():
        return _of_checkpoint(read_folder(place), place)
    return read_undisturbed(path, (TENSORS, CONFIG), _read_folder)


def write_folder(folder: Path, content: AdapterFile, fields: dict[str, Any], check: Callable[[], object] = lambda: None) -> None:
    """Write both files of a folder in one step. Other files in it stay.

    Args:
        folder: created if it does not exist.
        content: its tensors have PEFT's names, without PEFT's prefix.
        fields: the content of ``adapter_config.json``.
        check: raises if the folder must not be written to; called once no other process writes to it.
    """
    tensors = {PREFIX + name: tensor.detach().cpu().clone().contiguous() for name, tensor in content.tensors.items()}
    data = _encoded(content, tensors, fields)
    text = (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
    with commit(folder, CONFIG, check) as staged:
        write_atomic(staged / TENSORS, data)
        write_atomic(staged / CONFIG, text)


def _read_folder(folder: Path) -> AdapterFile:
    file = folder / TENSORS
    if not folder.is_dir():
        hub = "; of the hub nothing is downloaded here: huggingface_hub.snapshot_download of this name gives a folder"
        raise WrongPath(f"{folder}: there is no such adapter folder or checkpoint{hub if _HUB_ID.fullmatch(str(folder)) else ''}.")
    if not file.is_file():
        raise WrongPath(f"{file} is missing{_beside(folder)}.")
    try:
        with safe_open(file, framework="pt") as reader:
            said = (reader.metadata() or {}).get(META)
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        if instead := said_instead(file):
            raise ValueError(f"{file} is {instead}.") from error
        raise ValueError(f"{file} is not a readable safetensors file (truncated?): {error}") from error
    meta = None if said is None else parsed(said, f"{file}: its {META} metadata")
    named: dict[str, Tensor] = {}
    for name, ours in our_names(tensors, str(file)).items():
        tensor = tensors[name] if (by := factor_in_file(name)) == 1 else tensors[name] / by
        twin = named.setdefault(ours, tensor)
        if twin is not tensor and not (twin.dtype == tensor.dtype and twin.equal(tensor)):
            raise ValueError(f"{file} holds two tensors for the parameter of {name!r}, with different values.")
    if meta is None:  # PEFT wrote the file
        words = _read_json(standing(folder / CONFIG))
        return AdapterFile(peft_format.from_peft(words, str(folder / CONFIG), named), named, None, fields=words)
    config, base, _ = understood(meta, str(file))
    if (folder / CONFIG).is_file():
        check_fields(_read_json(folder / CONFIG), meta, config, named, str(folder / CONFIG))
    damaged = "checksum" in meta and seal(meta, tensors) != meta["checksum"]
    return AdapterFile(config, named, base, frozenset(meta.get("beside", ())), damaged=damaged)


def _beside(folder: Path) -> str:
    """Return a hint at what is there in place of the tensors' file."""
    if (folder / "adapter_model.bin").exists():
        return "; adapter_model.bin is a pickle, which can run code: load it in PEFT and save it with safe_serialization=True"
    if (folder / f"{TENSORS}.index.json").exists():
        return "; the tensors are in several files: load them in PEFT, and save them in one"
    inner = sorted(found.parent.name for found in folder.glob(f"*/{TENSORS}"))
    return f"; there are adapters in the folders below it, {', '.join(inner[:5])}: name one" if inner else ""


def _read_file(file: Path) -> Any:
    if file.name in (TENSORS, CONFIG):
        raise ValueError(f"{file} is part of an adapter folder: load {file.parent}.")
    if file.suffix == ".safetensors":
        raise ValueError(
            f"{file} is no adapter folder: PEFT's has {TENSORS} and {CONFIG}. Convert other formats with the library of theirs."
        )
    return read_checkpoint(file)


def _of_checkpoint(checkpoint: Any, file: Path) -> AdapterFile:
    meta = checkpoint.get(META) if isinstance(checkpoint, dict) else None
    if meta is None:
        holds = "no adapter" if isinstance(checkpoint, dict) else f"a {type(checkpoint).__name__}"
        raise ValueError(f"{file} was not written under LoRACallback: it holds {holds}.")
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
    odd = [name for name, value in tensors.items() if isinstance(value, Tensor) and (value.is_meta or value.layout != torch.strided)]
    if odd:
        how = "the meta device" if tensors[odd[0]].is_meta else str(tensors[odd[0]].layout)
        raise ValueError(f"{file}: {odd[0]!r} has no plain values ({how}): it is damaged, or is for Trainer(...).fit(ckpt_path=...) alone.")
    beside = frozenset(name.removeprefix(prefix) for name in beside if name.startswith(prefix))
    return AdapterFile(config, own, base, beside, extra_state=extra, outside=rest, root=root)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        text = read_regular(file, LONGEST).decode()
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON, and cannot be read: {error}.") from error
    return parsed(text, str(file))
