"""Write the merged model as a folder of safetensors, tensor by tensor: no process ever holds the full model.

Under sharding each weight is gathered alone, merged, passed to the first process and freed. ``from_pretrained`` reads the files: numbered
shards and an index, or one file if the model is small. Quantized weights are dequantized one by one and written in full precision.
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_lora.layers.base import PREFIX, LoRALayer
from lightning_lora.quantization.formats import dequantized, format_of
from lightning_lora.utils.atomic_files import write_atomic
from lightning_lora.utils.names import adapter_root, clean_name, persistent_buffers
from lightning_lora.utils.sharding import full_tensor, gathered_parameters, on_first_rank


def export_merged(model: nn.Module, folder: str | Path, *, overwrite: bool = False, shard_bytes: int = 5_000_000_000) -> Path:
    """Write a model with its adapters merged. The model itself does not change.

    Under sharding every process has to call it. An error of the first process is raised on all.

    Args:
        model: an adapted model, merged or not, sharded or not; or a LightningModule around one.
        folder: created if it does not exist.
        overwrite: write into a folder that is not empty.
        shard_bytes: largest size of a file in bytes. A tensor that would exceed it begins the next file.

    Returns:
        The folder.

    Raises:
        ValueError: the folder is not empty and ``overwrite`` is False, or a quantized weight is sharded.
    """
    folder, (_, root) = Path(folder), adapter_root(model)
    writer = _Shards(folder, shard_bytes)
    on_first_rank(lambda: writer.begin(overwrite))
    seen: set[int] = set()
    for module_name, module, name, parameter in gathered_parameters(root):
        if name.startswith(PREFIX) or id(parameter) in seen:  # tied weights are written under one name
            continue
        seen.add(id(parameter))
        with torch.no_grad():
            layers = module.by_weight() if isinstance(module, LoRALayer) else {"weight": module}
            layer = layers.get(name)
            packed = layer is not None and format_of(layer) is not None
            tensor = _unpacked(layer, module_name) if packed else full_tensor(parameter.detach())
            if isinstance(layer, LoRALayer) and not layer.merged:
                tensor, _ = layer.merged_weight()
        on_first_rank(functools.partial(writer.add, clean_name(f"{module_name}.{name}" if module_name else name), tensor))
    on_first_rank(lambda: _finish(writer, root))
    return folder


def _finish(writer: _Shards, root: nn.Module) -> None:
    for name, buffer in persistent_buffers(root).items():
        writer.add(name, buffer)
    writer.close()
    config = getattr(root, "config", None)
    if hasattr(config, "save_pretrained"):
        config = copy.copy(config)
        config.__dict__.pop("quantization_config", None)  # all weights were written dequantized
        config.save_pretrained(writer.folder)  # type: ignore[union-attr]


def _unpacked(module: Any, name: str) -> Tensor:
    try:
        return dequantized(module)
    except ValueError as error:
        raise ValueError(f"{name!r} cannot be exported: {error}.") from error


class _Shards:
    """Collect tensors on the CPU and write a file whenever the size limit is reached. Only the first process uses it."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.places: dict[str, int] = {}  # tensor → number of its file
        self.pending: dict[str, Tensor] = {}
        self.files = self.size = 0

    def begin(self, overwrite: bool) -> None:
        if self.folder.is_dir() and any(self.folder.iterdir()) and not overwrite:
            raise ValueError(f"folder={str(self.folder)!r} is not empty; choose another or pass overwrite=True.")
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        if self.pending and sum(t.nbytes for t in self.pending.values()) + tensor.nbytes > self.limit:
            self._write()
        self.pending[name] = tensor.detach().cpu().contiguous().clone()
        self.places[name] = self.files
        self.size += tensor.nbytes

    def close(self) -> None:
        """Write the remaining tensors, rename the files, now that their number is known, and write the index."""
        self._write()
        if self.files == 1:
            (self.folder / self._staged(0)).rename(self.folder / "model.safetensors")
            return
        names = [f"model-{number + 1:05d}-of-{self.files:05d}.safetensors" for number in range(self.files)]
        for number, name in enumerate(names):
            (self.folder / self._staged(number)).rename(self.folder / name)
        index: dict[str, Any] = {"metadata": {"total_size": self.size}, "weight_map": {t: names[n] for t, n in self.places.items()}}
        write_atomic(self.folder / "model.safetensors.index.json", json.dumps(index, indent=2).encode())

    def _write(self) -> None:
        write_atomic(self.folder / self._staged(self.files), safetensors.torch.save(self.pending, {"format": "pt"}))
        self.files, self.pending = self.files + 1, {}

    def _staged(self, number: int) -> str:
        return f".model-{number:05d}.part"
