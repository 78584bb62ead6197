"""Loading a causal language model and its tokenizer from Hugging Face: a hub id, a local folder, or a GGUF file in either."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

DType = Literal["auto", "float32", "bfloat16", "float16"]


def load_causal_lm(model: str, gguf_file: str | None = None, dtype: DType = "auto") -> tuple[Any, Any]:
    """Load the model, in evaluation mode, and the tokenizer, which gets a padding token if it has none.

    Args:
        model: A hub id or a local folder.
        gguf_file: A GGUF file in it; its weights are unpacked to ``dtype``, since adapters need a base to multiply with.
        dtype: Of the weights; "auto" keeps the checkpoint's own.

    Returns:
        The model and the tokenizer.

    Raises:
        ImportError: A GGUF file is asked for and the package that reads it is not installed; names the extra.
        ValueError: It can only be a folder, and there is none.
        OSError: From transformers, where there is no such model on the hub.
    """
    import transformers

    _check_there(model)
    source: dict[str, Any] = {}
    quantization: dict[str, Any] = {}
    if gguf_file is not None:
        if find_spec("gguf") is None:
            raise ImportError(f"gguf_file={gguf_file!r} needs the package gguf; pip install 'lightning-lora[gguf]'")
        source["gguf_file"] = gguf_file
        if hasattr(transformers, "GgufConfig"):  # releases before it always dequantize
            quantization["quantization_config"] = transformers.GgufConfig(dequantize=True)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **source, **quantization)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, **source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return network, tokenizer


def skeleton(model: str, gguf_file: str | None = None) -> Any:
    """The model's modules on the meta device, from its configuration alone: no weights are read or downloaded.

    A GGUF file holds its configuration among the weights, so there the whole file is read.
    """
    import transformers

    _check_there(model)
    if gguf_file is not None:
        return load_causal_lm(model, gguf_file)[0]
    config = transformers.AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def _check_there(model: str | os.PathLike[str]) -> None:
    """Transformers takes what is no folder for a hub id, and says of a missing folder that it is a malformed id."""
    name, path = os.fspath(model), Path(model)
    if not path.is_dir() and (name.startswith((".", "~")) or path.is_absolute() or len(path.parts) > 2):
        raise ValueError(f"model={name!r} is no folder (seen from {Path.cwd()}; ~ stays as it is), nor a hub id: 'name' or 'owner/name'.")


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward; not re-entrant, which would cut the gradient off below a frozen embedding."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # its name in earlier releases, deprecated since
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def generate_text(model: Any, tokenizer: Any, input_ids: Any, attention_mask: Any, max_new_tokens: int) -> list[str]:
    """The model's greedy continuation of left-padded prompts ``input_ids (B, T)``, without special tokens."""
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
