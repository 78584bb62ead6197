"""Read single weights from a folder of safetensors files, as ``save_pretrained`` writes it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

_INDEX, _ONE = "model.safetensors.index.json", "model.safetensors"


class WeightFolder:
    """A function that returns the tensor of a name. It raises KeyError for names that the folder does not have.

    Raises:
        ValueError: the folder has no such files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if (self.folder / _INDEX).is_file():
            self.files: dict[str, str] = json.loads((self.folder / _INDEX).read_text())["weight_map"]
        elif (self.folder / _ONE).is_file():
            with safe_open(self.folder / _ONE, "pt") as opened:
                self.files = dict.fromkeys(opened.keys(), _ONE)
        else:
            raise ValueError(f"weights={str(folder)!r} has neither {_INDEX} nor {_ONE}: give a model's folder with safetensors files.")

    def __call__(self, name: str) -> Tensor:
        """Return the tensor on the CPU."""
        with safe_open(self.folder / self.files[name], "pt") as opened:
            found: Tensor = opened.get_tensor(name)
        return found

    def header(self, name: str) -> Tensor:
        """Return a tensor on the meta device of that shape and dtype. Only the file's header is read."""
        with safe_open(self.folder / self.files[name], "pt") as opened:
            part = opened.get_slice(name)
            shape = part.get_shape()
            dtype = (part[:0] if shape else opened.get_tensor(name)).dtype
        return torch.empty(shape, dtype=dtype, device="meta")
