"""Load a model as it was tuned: with an adapter, or with the weights of a full fine-tune's checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lightning_lora import load_adapter, quantize_base
from lightning_lora.adapter_io.files import read_adapter
from lightning_lora.adapter_io.fingerprint import PACKED, OtherBase
from lightning_lora.adapter_io.metadata import META
from lightning_lora.cli.console import working
from lightning_lora.cli.task_file import Task, read_task
from lightning_lora.quantization.quantizers import QUANTIZERS
from lightning_lora.storage.read_checkpoint import read_checkpoint
from lightning_lora.storage.sharded_checkpoint import REST, read_folder
from lightning_lora.tasks.hf import DType, auto_class_of, load_config, load_image_processor, load_model, load_tokenizer

IDENTIFYING: tuple[DType, ...] = ("auto", "float16")  # dtypes in which an adapter's base may have had its fingerprint
PREFIX = "model."  # the attribute of our tasks that holds the Hugging Face model


@dataclass(frozen=True)
class Tuned:
    """A loaded model.

    Attributes:
        network: The Hugging Face model, in evaluation mode.
        preprocessor: Its tokenizer, or its image processor.
        task: How it was loaded.
    """

    network: Any
    preprocessor: Any
    task: Task


def load_tuned(model: str, adapter: str | None, gguf_file: str | None, dtype: DType) -> Tuned:
    """Load a model, its adapter and its tokenizer.

    Args:
        model: A hub id or a local folder.
        adapter: An adapter folder, a checkpoint (a file or a folder of shards) with an adapter, or one of a full fine-tune; None for the
            model as it is.
        gguf_file: A GGUF file in the model's folder.
        dtype: The weights' dtype.

    Raises:
        ValueError: A path does not exist, or the adapter does not fit the model.
    """
    if adapter is not None and (not adapter or not Path(adapter).exists()):
        raise ValueError(f"adapter={adapter!r}: no such folder or checkpoint")
    with working("loading the model"):
        # The preprocessor and the template of the model's own folder are loaded with it, or come from its GGUF file.
        own = Task() if adapter or not Path(model).is_dir() else replace(read_task(model), preprocessor=None, chat_template=None)
        task = own if adapter is None else read_task(adapter)
        if task.auto_class is None:
            task = replace(task, auto_class=auto_class_of(load_config(model, gguf_file)))
        load = partial(load_model, str(task.auto_class), model, gguf_file, **task.config())
        weights = None if adapter is None else full_weights(adapter)
        network = _adapted(load, adapter, dtype) if adapter is not None and weights is None else load(dtype=dtype)
        if weights is not None:
            _load_full(network, weights, str(adapter))
        preprocessor = _preprocessor(model, gguf_file, task)
    return Tuned(network.eval(), preprocessor, task)


def _adapted(load: Callable[..., Any], adapter: str, dtype: DType) -> Any:
    """Load a base, in any dtype, and an adapter of it.

    In float16 a base may have another fingerprint than in its own dtype. So if the fingerprint is another one, the base is loaded in both
    dtypes, one after the other, and compared in each.

    Args:
        load: returns the base in ``dtype=``.
        adapter: An adapter folder, or a checkpoint with one.
        dtype: The weights' dtype.
    """
    refused, quantize = None, quantizing(adapter)
    for tried in dict.fromkeys((dtype, *IDENTIFYING)):
        network = load(dtype=tried)
        quantize(network)
        try:
            load_adapter(network, adapter)
        except OtherBase as error:
            refused = refused or error.with_traceback(None)  # which would keep the model in memory
            del network
        else:
            break
    else:
        assert refused is not None
        raise refused
    if tried != dtype:
        del network
        network = load(dtype=dtype)
        quantize(network)
        load_adapter(network, adapter, check_base=False)
    return network


def quantizing(adapter: str) -> Callable[[nn.Module], Any]:
    """Return what quantizes a base as that of an adapter with LoftQ was, whose file names the format; nothing for other adapters.

    Raises:
        ValueError: the base had several formats, or one that nothing here makes.
    """
    saved = read_adapter(adapter)
    packed = (saved.base or {}).get(PACKED)
    if packed is None:
        return lambda network: None
    formats = packed.rpartition(" ")[0]
    how = next((name for name, quantizer in QUANTIZERS.items() if quantizer.makes == formats), None)
    if how is None:
        raise ValueError(
            f"adapter={adapter!r} belongs to a base of the formats {formats}, which this command cannot quantize to; in Python:"
            " quantize_base(model, how, lora=config), load_adapter(model, folder), export_merged(model, folder)"
        )
    return partial(quantize_base, how=how, modules_to_save=saved.config.modules_to_save, lora=saved.config)


def _preprocessor(model: str, gguf_file: str | None, task: Task) -> Any:
    if task.auto_class == "AutoModelForImageClassification":
        return load_image_processor(task.preprocessor or model)
    tokenizer = load_tokenizer(task.preprocessor) if task.preprocessor else load_tokenizer(model, gguf_file)
    if task.chat_template:
        tokenizer.chat_template = task.chat_template
    return tokenizer


def is_checkpoint(path: str) -> bool:
    """Return whether a path is a checkpoint, a file or a folder of shards, and no adapter folder."""
    return Path(path).is_file() or Path(path, REST).is_file()


def content_of(path: str) -> dict[str, Any] | None:
    """Return what a checkpoint holds, a file or a folder of shards; None if the path is neither, or holds something else."""
    content: Any = None
    if Path(path, REST).is_file():
        content = read_folder(Path(path))
    elif path.endswith(".ckpt") and Path(path).is_file():
        content = read_checkpoint(path)
    return content if isinstance(content, dict) else None


def full_weights(path: str) -> dict[str, Any] | None:
    """Return the model's weights in the checkpoint of a full fine-tune, None if the path holds anything else."""
    content = content_of(path)
    state = content.get("state_dict") if content is not None and META not in content else None
    if not isinstance(state, dict):
        return None
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}


def _load_full(network: nn.Module, weights: dict[str, Any], path: str) -> None:
    """Replace all weights of a model, or none."""
    mine = network.state_dict()
    other = sorted(mine.keys() ^ weights.keys()) or [name for name in mine if mine[name].shape != weights[name].shape]
    if other:
        raise ValueError(f"{path} is a full fine-tune of another model: they differ in {other[0]!r}; name the model that it began from")
    network.load_state_dict(weights)
