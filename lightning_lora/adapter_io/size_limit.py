"""Refuse a file that is too large for the model, before it is read. A file from an unknown source must not fill the memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lightning_lora.adapter_io.files import TENSORS
from lightning_lora.utils.sharding import is_distributed

SMALL = 64 * 2**20  # bytes; a file up to this size is always accepted
#: Bytes of a file per byte of the model. A checkpoint that trained everything has fp32 values and two moments per bf16 parameter: 6.
SHARE = 16


def check_size(path: Path, model: nn.Module) -> None:
    """Compare the size of an adapter's file with the model's.

    Args:
        path: an adapter folder, or a checkpoint, a file or a folder of shards. A path that does not exist is left to the reader.
        model: the model that it will be loaded into, sharded or not.

    Raises:
        ValueError: the file is larger than 64 MiB, and than 16 times the model.
    """
    file = path / TENSORS if (path / TENSORS).is_file() else path
    size = 0 if not file.exists() else sum(each.stat().st_size for each in (file.iterdir() if file.is_dir() else [file]) if each.is_file())
    processes = torch.distributed.get_world_size() if is_distributed() else 1  # each may hold a shard only
    tensors = [*model.parameters(), *model.buffers()]
    room = max(SMALL, SHARE * processes * sum(t.numel() * t.element_size() for t in tensors if not nn.parameter.is_lazy(t)))
    if size > room:
        raise ValueError(
            f"{file} has {size:,} bytes; an adapter of this {type(model).__name__} has at most {room:,}. It was made for another model, or"
            " is damaged."
        )
