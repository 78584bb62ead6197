"""Write the merged model as a folder, tensor by tensor: no process ever holds the full model twice.

A copy of the model's modules without adapters is written. Each weight is computed when its file is written: gathered alone, merged, passed
to the first process and freed. A Hugging Face model is written by its own ``save_pretrained``. So its folder has the files, names and
layouts of any other model of its class. For other models the names are those of a state dict.
Quantized weights are dequantized one by one and written in full precision.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapter_io.certificate import CERTIFICATE, MergeCertificate, merge_certificate
from lightning_lora.adapter_io.extras import is_adapter
from lightning_lora.adapter_io.merged_weights import MergedWeights
from lightning_lora.adapter_io.weight_files import write_weights
from lightning_lora.layers.base import lora_layers
from lightning_lora.layers.rounding import check_limit
from lightning_lora.model.plain_copy import plain_copy
from lightning_lora.model.probe import Probe
from lightning_lora.model.ties import tied_weights, untying
from lightning_lora.storage.atomic_files import sync_files
from lightning_lora.storage.folder_commit import commit, occupied
from lightning_lora.storage.room import check_room
from lightning_lora.utils.names import adapter_root, clean_name
from lightning_lora.utils.sharding import on_first_rank, on_first_rank_with_help

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")  # files that from_pretrained reads


def export_merged(
    model: nn.Module,
    folder: str | Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = 5_000_000_000,
    probe: Probe | None = None,
    max_lost: float | None = None,
) -> Path:
    """Write a model with its adapters merged, and a certificate of the merge. The model itself does not change.

    A Hugging Face model is written by its own ``save_pretrained``: the folder is that of the merged model, with its configs. An adapted
    weight that is tied (an embedding and the head) is written under its own name, and ``from_pretrained`` leaves it untied.

    Under sharding every process has to call it. An error of the first process is raised on all.

    Args:
        model: an adapted model, merged or not, sharded or not; or a LightningModule around one.
        folder: created if it does not exist.
        overwrite: write into a folder that is not empty. Weights of an earlier export are removed, other files stay.
        shard_bytes: largest size in bytes of a file, and of the tensors in memory. A tensor that would exceed it begins the next
            file. A class whose ``save_pretrained`` has no ``max_shard_size`` decides by itself.
        probe: what the certificate compares outputs on, see :func:`~lightning_lora.merge_certificate`.
        max_lost: the largest share of an update that rounding may lose in any layer. Default: no limit.

    Returns:
        The folder.

    Raises:
        ValueError: the folder is not empty and ``overwrite`` is False, or it holds an adapter, or it cannot be written to, or there is no
            room for the model; an adapter holds NaN or is disabled; a quantized weight is sharded or of an unknown format; an adapted
            weight is tied and the file cannot record its broken tie; the certificate cannot be made, or rounding loses more than
            ``max_lost``. Nothing is written then.

    Examples:
        >>> model = load_adapter(model, "runs/legal/adapter")
        >>> folder = export_merged(model, "merged", probe=batch, max_lost=0.3)
        >>> (folder / "merge_certificate.json").exists()
        True
    """
    folder, (_, root) = Path(folder), adapter_root(model)
    check_limit(max_lost)
    check = partial(_check_free, folder, overwrite, _least_bytes(root))
    on_first_rank(check)
    weights = MergedWeights(root)
    merged, originals = plain_copy(root, weights.deferred)
    weights.make_plain(originals)
    _untie(root, merged)
    asked = probe is not None or max_lost is not None or any(lora_layers(root))
    certificate = merge_certificate(model, probe=probe) if asked else None
    if certificate is not None:
        certificate.check(max_lost)
    with torch.no_grad():
        on_first_rank_with_help(lambda ask: _write(merged, folder, shard_bytes, weights, ask, certificate, check), weights.read)
    return folder


def _least_bytes(root: nn.Module) -> int:
    """Return the least size of the files in bytes: that of the base's weights, packed ones as they are."""
    return sum(p.numel() * p.element_size() for name, p in root.named_parameters() if not is_adapter(name) and not nn.parameter.is_lazy(p))


def _check_free(folder: Path, overwrite: bool, least: int) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is a file; name a folder.")
    if occupied(folder) and not overwrite:
        raise ValueError(f"folder={str(folder)!r} is not empty; choose another or pass overwrite=True.")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"folder={str(folder)!r} holds an adapter, which from_pretrained would load on top; choose another.")
    check_room(folder, least, "folder", "the merged model takes at least")


def _untie(root: nn.Module, merged: nn.Module) -> None:
    """Break the ties of adapted weights in the copy, so that each value is written and read under its own name."""
    tied = tied_weights(root)
    if tied and not hasattr(type(merged), "save_pretrained"):
        name, others = next(iter(tied.items()))
        raise ValueError(
            f"{name} is tied to {', '.join(others)}, and merged they differ: a state dict that is loaded into a tied model loses one of"
            " them. Call merge_lora(model, untie=True) first, and untie the model that loads it."
        )
    if tied:
        untying(merged, tied).apply()


def _write(
    merged: Any,
    folder: Path,
    limit: int,
    weights: MergedWeights,
    ask: Callable[[int], Tensor],
    certificate: MergeCertificate | None,
    check: Callable[[], object],
) -> None:
    """Write the files as one commit: a failure or a kill leaves the folder as it was."""
    weights.ask = ask
    outdated = re.compile(f"{_WEIGHTS.pattern}|{re.escape(CERTIFICATE)}")  # from_pretrained might read old weights instead of the new ones
    with commit(folder, "config.json", check, outdated.fullmatch) as staged:
        _save(merged, staged, limit)
        if certificate is not None:
            certificate.write(staged)
        sync_files(staged)


def _save(model: Any, folder: Path, limit: int) -> None:
    if hasattr(type(model), "save_pretrained"):
        sizes = {"max_shard_size": limit} if "max_shard_size" in inspect.signature(type(model).save_pretrained).parameters else {}
        model.save_pretrained(folder, **sizes)
        return
    write_weights(folder, _tensors(model), limit)
    config = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):  # a Hugging Face config in a model of the user's own class
        config = copy.copy(config)
        config.__dict__.pop("quantization_config", None)  # all weights were written dequantized
        config.save_pretrained(folder)  # type: ignore[union-attr]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            warnings.warn(f"{name!r} is of type {type(tensor).__name__}, no tensor, and is not in the export.", stacklevel=2)
        elif id(tensor) not in seen:  # tied weights are written under one name
            seen.add(id(tensor))
            yield clean_name(name), tensor
