"""The command `export`: an adapter as vLLM, SGLang, llama.cpp, diffusers or PEFT loads it, with what is known of its run in the card."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import nn

from lightning_lora import export_adapter, lora_layers
from lightning_lora.cli.console import print_json
from lightning_lora.cli.task_file import read_task
from lightning_lora.cli.tuned import is_checkpoint, load_tuned
from lightning_lora.data.chat import turn_ends
from lightning_lora.storage.folder_commit import occupied
from lightning_lora.tasks.hf import load_tokenizer

METRICS, SETTINGS = "metrics.csv", "config.yaml"  # what a run leaves beside its adapter and its checkpoints


def export(
    adapter: str,
    out: str,
    target: Literal["peft", "vllm", "sglang", "llama.cpp", "diffusers"] = "peft",
    base: str | None = None,
    gguf_file: str | None = None,
    component: str | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Write an adapter as a server loads it, with a model card and the tokenizer that it was trained with.

    Args:
        adapter: An adapter folder; or, with ``base``, a checkpoint (.ckpt, or a folder of shards).
        out: The new folder.
        target: What will load it.
        base: The model it was trained on: a hub id or a folder. By default the one that the adapter names.
        gguf_file: A GGUF file in the base's folder, for a checkpoint.
        component: The part of a diffusers pipeline, such as unet; by default by the base's class.
        overwrite: Replace an adapter in a folder that is not empty.
        json: Print the result as JSON.

    Raises:
        ValueError: The adapter has a part that the server does not load, or the folder is not empty.
    """
    if not out or base == "":
        raise ValueError("out='' is empty; name a folder" if not out else "base='' is empty; name a hub id or a folder")
    if Path(out).is_file():
        raise ValueError(f"out={out!r} is a file; name a folder")
    if occupied(Path(out)) and not overwrite:
        raise ValueError(f"out={out!r} is not empty; name another folder, or pass --overwrite to replace the adapter in it")
    source: str | nn.Module = adapter
    tokenizer, task = None, read_task(adapter)
    if is_checkpoint(adapter):
        if base is None:
            raise ValueError(f"adapter={adapter!r} is a checkpoint; give --base, the model that it was trained on")
        tuned = load_tuned(base, adapter, gguf_file, "auto")
        if not any(lora_layers(tuned.network)):
            raise ValueError(
                f"adapter={adapter!r} is the checkpoint of a full fine-tune; write it as a model with lightning-lora merge, and serve that"
            )
        source = tuned.network
        if task.auto_class != "AutoModelForImageClassification":
            tokenizer = tuned.preprocessor
    elif task.preprocessor and (Path(task.preprocessor) / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(task.preprocessor)
    data, metrics = run_of(Path(adapter))
    described: dict[str, Any] = {"component": component, "data": data, "metrics": metrics, "tokenizer": tokenizer}
    described |= {"stops": [] if tokenizer is None else turn_ends(tokenizer), "labels": task.labels}
    export_adapter(source, out, target=target, base=base, overwrite=overwrite, **described)
    if task.auto_class is not None:
        task.write(Path(out))
    if json:
        print_json({"adapter": out, "target": target, "made_from": adapter})
    else:
        print(f"adapter for {target} in {out}; {Path(out) / 'README.md'} says how to load it")


def run_of(adapter: Path) -> tuple[str | None, dict[str, float]]:
    """Return the training data and the last validation and test metrics of the run that an adapter or a checkpoint lies in."""
    folder = adapter.absolute().parent
    folder = folder.parent if folder.name == "checkpoints" else folder
    metrics: dict[str, float] = {}
    if (folder / METRICS).is_file():
        with open(folder / METRICS, newline="") as file:
            rows = csv.DictReader(file)
            for row in rows if {"epoch", "step"} <= {*(rows.fieldnames or ())} else ():  # CSVLogger's
                metrics |= {name: float(value) for name, value in row.items() if name and value and name.startswith(("val_", "test_"))}
    return _train_file(folder / SETTINGS), metrics


def _train_file(settings: Path) -> str | None:
    """Return ``data.train`` of a run's config; None for a file that is no run's."""
    if not settings.is_file():
        return None
    try:
        found: Any = yaml.safe_load(settings.read_text())
    except yaml.YAMLError:
        return None
    for key in ("data", "init_args", "train"):
        found = found.get(key, found if key == "init_args" else None) if isinstance(found, dict) else None
    return None if found is None else str(found)
