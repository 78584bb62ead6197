"""The commands that do not train, by their names. Each is a function on files; its signature is its command line."""

from __future__ import annotations

from lightning_lora import LoRAConfig
from lightning_lora.cli.chat import chat
from lightning_lora.cli.combine import combine, compress
from lightning_lora.cli.estimate import estimate
from lightning_lora.cli.export import export
from lightning_lora.cli.generate import generate
from lightning_lora.cli.init import init
from lightning_lora.cli.inspect_files import inspect_adapter, inspect_model, is_adapter
from lightning_lora.cli.merge import merge

__all__ = ["chat", "combine", "compress", "estimate", "export", "generate", "init", "inspect", "merge"]


ALL = LoRAConfig(target_modules="all-linear")  # the names of a model's layers are what a user wants to know


def inspect(path: str, gguf_file: str | None = None, lora: LoRAConfig = ALL, json: bool = False) -> None:
    """Print what is in an adapter, what ``lora`` would adapt in a model, or what a run would train on (see `inspect_rows`).

    Args:
        path: An adapter folder, a checkpoint (.ckpt, or a folder of shards), a model (a hub id or a folder, whose weights are not loaded),
            a run's config (.yaml), or a data file, which needs --model. The last two take the options of fit.
        gguf_file: A GGUF file in the model's folder.
        lora: Which layers to adapt, and how; by default all linears.
        json: Print JSON.

    Raises:
        ValueError: The adapter cannot be read, or the config does not fit the model.
    """
    if is_adapter(path):
        inspect_adapter(path, json)
    else:
        inspect_model(path, gguf_file, lora, json)
