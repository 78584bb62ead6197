"""Load a causal language model and its tokenizer from Hugging Face: from a hub id, a local folder, or a GGUF file in either."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

DType = Literal["auto", "float32", "bfloat16", "float16"]


def load_causal_lm(model: str, gguf_file: str | None = None, dtype: DType = "auto") -> tuple[Any, Any]:
    """Load the model, in evaluation mode, and the tokenizer. A tokenizer without a padding token gets its end token as one.

    Args:
        model: A hub id or a local folder.
        gguf_file: A GGUF file in it. Its weights are dequantized to ``dtype``, since adapted layers multiply by the base weight.
        dtype: The weights' dtype; "auto" keeps the checkpoint's own.

    Returns:
        The model and the tokenizer.

    Raises:
        ImportError: ``gguf_file`` is given, and the package that reads it is not installed; the message names the extra.
        ValueError: ``model`` can only be a folder, and does not exist.
        OSError: Transformers finds no such model on the hub.
    """
    import transformers

    _check_there(model)
    source: dict[str, Any] = {}
    quantization: dict[str, Any] = {}
    if gguf_file is not None:
        if find_spec("gguf") is None:
            raise ImportError(f"gguf_file={gguf_file!r} needs the package gguf; pip install 'lightning-lora[gguf]'")
        source["gguf_file"] = gguf_file
        if hasattr(transformers, "GgufConfig"):  # releases without it always dequantize
            quantization["quantization_config"] = transformers.GgufConfig(dequantize=True)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **source, **quantization)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, **source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return network, tokenizer


def skeleton(model: str, gguf_file: str | None = None) -> Any:
    """Build the model on the meta device from its configuration alone: no weights are read or downloaded.

    A GGUF file stores its configuration with the weights, so the full file is read.
    """
    import transformers

    _check_there(model)
    if gguf_file is not None:
        return load_causal_lm(model, gguf_file)[0]
    config = transformers.AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def _check_there(model: str | os.PathLike[str]) -> None:
    """Raise ValueError if ``model`` can only be a folder and does not exist. Transformers would report a malformed hub id instead."""
    name, path = os.fspath(model), Path(model)
    if not path.is_dir() and (name.startswith((".", "~")) or path.is_absolute() or len(path.parts) > 2):
        raise ValueError(f"model={name!r} is no folder (seen from {Path.cwd()}; ~ stays as it is), nor a hub id: 'name' or 'owner/name'.")


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass. Non-reentrant: the reentrant kind loses gradients if the embedding is frozen."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # its name in earlier releases, deprecated since
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def generate_text(model: Any, tokenizer: Any, input_ids: Any, attention_mask: Any, max_new_tokens: int) -> list[str]:
    """Return the model's greedy continuation of left-padded prompts ``input_ids (B, T)``, without special tokens."""
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
