"""Load a causal language model and its tokenizer from Hugging Face: from a hub id, a local folder, or a GGUF file in either."""

from __future__ import annotations

import difflib
import os
import pickle
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from lightning_lora.data.chat import stop_tokens
from lightning_lora.storage.regular_files import WrongPath

DType = Literal["auto", "float32", "bfloat16", "float16"]
REACHED = 10.0  # seconds within which the hub has to answer
_HUB_ID = re.compile(r"([\w.-]+/)?[\w.-]+", re.ASCII)


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
        ValueError: ``model`` is neither a model's folder nor a hub id, the hub cannot be reached or lacks the model, or files are damaged.
    """
    import transformers

    if gguf_file is not None and find_spec("gguf") is None:
        raise ImportError(f"gguf_file={gguf_file!r} needs the package gguf; pip install 'lightning-lora[gguf]'")
    check_there(model, gguf_file)
    source: dict[str, Any] = {}
    quantization: dict[str, Any] = {}
    if gguf_file is not None:
        source["gguf_file"] = gguf_file
        if hasattr(transformers, "GgufConfig"):  # releases without it always dequantize
            quantization["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _named(model):
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

    check_there(model, gguf_file)
    if gguf_file is not None:
        return load_causal_lm(model, gguf_file)[0]
    with _named(model), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(model)
        return transformers.AutoModelForCausalLM.from_config(config)


@contextmanager
def _named(model: str | os.PathLike[str]) -> Iterator[None]:
    """Name the model in what transformers raises about it, on one line."""
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, OSError, ValueError) as error:
        damaged = "its weights are damaged, or no weights: " if isinstance(error, (SafetensorError, pickle.UnpicklingError)) else ""
        raise ValueError(f"model={os.fspath(model)!r}: {damaged}{str(error).strip().splitlines()[0]}") from error


def check_there(model: str | os.PathLike[str], gguf_file: str | None = None) -> None:
    """Check that ``model`` is a model's folder, or may be a hub id. Transformers would try an unreachable hub for a minute.

    Raises:
        WrongPath: It can only be a folder and is no model's; or the folder does not exist and the hub cannot be reached.
    """
    model, path = os.fspath(model), Path(model)
    if not model:
        raise WrongPath("model='' is empty; name a folder or a hub id")
    if path.is_file():
        raise WrongPath(f"model={model!r} is a file; name its folder ({str(path.parent)!r})")
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise WrongPath(f"model={model!r} is an adapter; name the model that it was trained on, and give the adapter as adapter")
        needed = gguf_file or "config.json"
        if not (path / needed).is_file():
            raise WrongPath(f"model={model!r} is not a model: the folder has no {needed}")
        return
    beside = sorted(other.name for other in path.parent.iterdir() if other.is_dir()) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, 1)
    hint = f"; did you mean {str(path.parent / close[0])!r}?" if close else ""
    if model.startswith((".", "~")) or path.is_absolute() or len(path.parts) > 2 or not _HUB_ID.fullmatch(model):
        raise WrongPath(
            f"model={model!r} is no folder (seen from {Path.cwd()}; ~ stays as it is), nor a hub id: 'name' or 'owner/name'{hint}"
        )
    reason = _unreachable(model, gguf_file or "config.json")
    if reason is not None:
        raise WrongPath(f"model={model!r} is no folder (seen from {Path.cwd()}), and the hub cannot be reached: {reason}{hint}")


def _unreachable(model: str, file: str) -> str | None:
    """Return why a model can be loaded neither from the hub nor from its cache; None if it may be."""
    import huggingface_hub

    if isinstance(huggingface_hub.try_to_load_from_cache(model, file), str):
        return None
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and the model is not in the cache"
    try:
        urllib.request.urlopen(f"{huggingface_hub.constants.ENDPOINT}/api/models/{model}", timeout=REACHED).close()
    except urllib.error.HTTPError:
        return None  # it answered, and will say the rest itself
    except OSError as error:
        reason = getattr(error, "reason", error)
        return None if isinstance(reason, ssl.SSLError) else str(reason)  # certificates may be set for the hub's library alone
    return None


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass. Non-reentrant: the reentrant kind loses gradients if the embedding is frozen."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # its name in earlier releases, deprecated since
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def token_probe(model: Any, length: int) -> Callable[[Any], Any] | None:
    """Return what a merge certificate compares logits on: a random sequence of tokens, the same at every call. None for length 0.

    Args:
        model: A causal language model.
        length: In tokens; at most the model's context.
    """
    if not length:
        return None
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    vocabulary, generator = model.get_input_embeddings().num_embeddings, torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, min(length, longest)), generator=generator).to(model.device)
    return lambda model: {"logits": model(input_ids=ids, use_cache=False).logits}


def generate_text(model: Any, tokenizer: Any, input_ids: Any, attention_mask: Any, max_new_tokens: int) -> list[str]:
    """Return the model's greedy continuation of left-padded prompts ``input_ids (B, T)``, without special tokens."""
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stop_tokens(model, tokenizer) or None,
    )
    return tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
