"""Measure what comparing checksums adds to ``load_adapter``: ``python -m tests.harness.checksum_cost --gib 0.5 --folder FOLDER``."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, load_adapter, save_adapter
from lightning_lora.adapter_io import files
from lightning_lora.adapter_io.metadata import FORMAT_VERSION, META
from lightning_lora.storage import read_checkpoint

CONFIG = LoRAConfig(rank=4, target_modules=["layer"], modules_to_save=["head"])


def fastest(model: nn.Module, path: Path, times: int = 3) -> float:
    """Return the shortest of several loads in seconds."""
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        load_adapter(model, path)
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=0.5, help="size of a head that is trained in full (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write; default: the folder for temporary files")
    options = parser.parse_args(argv)
    head = nn.Linear(4096, max(1, int(options.gib * 2**30 / 4 / 4096)), bias=False)
    model = apply_lora(nn.ModuleDict({"layer": nn.Linear(64, 64), "head": head}), config=CONFIG)
    meta: dict[str, Any] = {"format_version": FORMAT_VERSION, "config": CONFIG.to_dict(), "base": None, "root": ""}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name or "head" in name}
    with tempfile.TemporaryDirectory(dir=options.folder) as there:
        folder, file = Path(there, "adapter"), Path(there, "x.ckpt")
        save_adapter(model, folder)
        torch.save({META: meta, "state_dict": tensors}, file)
        without: dict[Path, Any] = {
            folder: patch.object(files, "seal", lambda meta, tensors: meta["checksum"]),
            file: patch.object(read_checkpoint, "check_checksums", lambda stream: None),
        }
        for path, unchecked in without.items():
            checked = fastest(model, path)
            with unchecked:
                plain = fastest(model, path)
            print(f"{path.name}: {checked:.2f} s, without checksums {plain:.2f} s ({checked / plain - 1:+.0%})")


if __name__ == "__main__":
    main()
