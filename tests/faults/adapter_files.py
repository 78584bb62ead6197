"""How the tests spoil an adapter folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import safe_open
from torch import Tensor


def as_peft(folder: Path) -> None:
    """Drop what only our own files carry, so that the JSON is what counts."""
    file = folder / "adapter_model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, {"format": "pt"})


def edit_json(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    changed = {name: value for name, value in {**json.loads(file.read_text()), **fields}.items() if value is not ...}
    file.write_text(json.dumps(changed))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    file = folder / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as reader:
        meta = reader.metadata()
    tensors = safetensors.torch.load_file(file)
    edit(tensors)
    safetensors.torch.save_file(tensors, file, meta)


def shrink(tensors: dict[str, Tensor]) -> None:
    """Tensors of rank 1 under a config of rank 2."""
    for name, tensor in tensors.items():
        tensors[name] = (tensor[:1] if ".lora_A." in name else tensor[:, :1]).contiguous()


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:40])


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def only_a_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


def peft(**fields: Any) -> Callable[[Path], object]:
    return lambda folder: (as_peft(folder), edit_json(folder, **fields))


def tensors(edit: Callable[[dict[str, Tensor]], Any], foreign: bool = False) -> Callable[[Path], object]:
    return lambda folder: (edit_tensors(folder, edit), foreign and as_peft(folder))


HEAD = "base_model.model.head.weight"
A0 = "base_model.model.layers.0.q_proj.lora_A.weight"
OURS_A0 = "layers.0.q_proj.lora_A"
FILE, JSON = "adapter_model.safetensors", "adapter_config.json"
