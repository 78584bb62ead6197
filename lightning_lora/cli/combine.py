"""The commands `combine` and `compress`: adapters as one, and one adapter smaller. No model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning_lora import combine_adapters, compress_adapter
from lightning_lora.adapter_io.file_arithmetic import read_pairs
from lightning_lora.cli.console import print_json
from lightning_lora.ops.task_vectors import Majority
from lightning_lora.storage.folder_commit import occupied


def combine(
    adapters: str,
    out: str,
    method: str = "svd",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority: Majority = "total",
    seed: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Write one adapter that adds several adapters of one base.

    Args:
        adapters: The folders with their weights, such as one=0.7,two=-0.3.
        out: The new folder.
        method: cat (exact, ranks add up), svd (the best of a rank), or PEFT's linear, ties, dare_linear, dare_ties, magnitude_prune, each
            but linear also with _svd.
        rank: The result's rank, for the methods with svd; by default the largest of the adapters'.
        energy: In place of rank, the share of each update's square that stays, such as 0.95.
        density: The share of entries that ties, dare_linear, dare_ties and magnitude_prune keep.
        majority: How ties elects signs, by the sum of the entries or by their number.
        seed: Of what dare drops.
        device: Where to compute.
        overwrite: Replace an adapter in a folder that is not empty.
        json: Print the result as JSON.

    Raises:
        ValueError: An option is out of range, or the adapters cannot be added.
    """
    weights = _weights(adapters)
    _check_free(out, overwrite)
    combine_adapters(
        weights, out, method=method, rank=rank, energy=energy, density=density, majority=majority, seed=seed, device=device,
        overwrite=overwrite,
    )  # fmt: skip
    _tell(out, {"method": method, "made_from": weights}, json)


def compress(
    adapter: str, out: str, rank: int | None = None, energy: float | None = None, overwrite: bool = False, json: bool = False
) -> None:
    """Write an adapter at a lower rank, each layer's best approximation.

    Args:
        adapter: The folder.
        out: The new folder.
        rank: Of every layer; lower ones stay.
        energy: In place of rank, the share of each update's square that stays, such as 0.95.
        overwrite: Replace an adapter in a folder that is not empty.
        json: Print the result as JSON.

    Raises:
        ValueError: An option is out of range, or the adapter cannot be made smaller.
    """
    _check_free(out, overwrite)
    compress_adapter(adapter, out, rank=rank, energy=energy, overwrite=overwrite)
    _tell(out, {"made_from": adapter}, json)


def _weights(text: str) -> dict[str, float]:
    """Return folder → weight."""
    found: dict[str, float] = {}
    for part in text.split(","):
        folder, equals, weight = part.strip().rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            equals = ""
        if not equals or not folder:
            raise ValueError(f"adapters={text!r}: {part.strip()!r} is no folder with a weight; write one=0.7,two=-0.3")
        if folder in found:
            raise ValueError(f"adapters={text!r}: {folder!r} is there twice; add its weights")
        found[folder] = number
    return found


def _check_free(out: str, overwrite: bool) -> None:
    if occupied(Path(out)) and not overwrite:
        raise ValueError(f"out={out!r} is not empty; name another folder, or pass --overwrite to replace the adapter in it")


def _tell(out: str, said: dict[str, object], json: bool) -> None:
    ranks = sorted({layer.rank for layer in read_pairs(out).layers.values()})
    if json:
        print_json({"adapter": out, "ranks": ranks, **said})
    else:
        print(f"adapter in {out}, rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else ""))
