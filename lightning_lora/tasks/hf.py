"""Load a model and its tokenizer or image processor from Hugging Face: from a hub id, a local folder, or a GGUF file in either."""

from __future__ import annotations

import copy
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from lightning_lora.data.chat import stop_tokens
from lightning_lora.tasks.model_source import check_there
from lightning_lora.utils.sharding import is_sharded

DType = Literal["auto", "float32", "bfloat16", "float16"]
# Class of transformers of each task → its table of models, by configuration.
_MAPPINGS = {
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
}


def load_model(auto_class: str, model: str, gguf_file: str | None = None, dtype: DType = "auto", **config: Any) -> Any:
    """Load a model, in evaluation mode.

    Args:
        auto_class: The class of transformers that picks the model's own, such as ``"AutoModelForCausalLM"``.
        model: A hub id or a local folder.
        gguf_file: A GGUF file in it. Its weights are dequantized to ``dtype``, since adapted layers multiply by the base weight.
        dtype: The weights' dtype; "auto" keeps the checkpoint's own.
        **config: Fields of the model's configuration, such as ``id2label``. Weights that then differ in shape, or that the checkpoint
            lacks, start fresh; transformers' table of them is left out, because a caller knows whether they train or come from elsewhere.

    Raises:
        ImportError: ``gguf_file`` is given, and the package that reads it is not installed; the message names the extra.
        ValueError: ``model`` is neither a model's folder nor a hub id, the hub cannot be reached or lacks the model, files are damaged, or
            there is no such class for its type.
    """
    import transformers

    options: dict[str, Any] = {"dtype": dtype, **config, **_source(model, gguf_file)}
    if gguf_file is not None and hasattr(transformers, "GgufConfig"):  # releases without it always dequantize
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if config:
        options["ignore_mismatched_sizes"] = True
    elif gguf_file is not None:
        options["config"] = load_config(model, gguf_file)
    with _named(model), _only_errors() if config else nullcontext():
        return getattr(transformers, auto_class).from_pretrained(model, **options)


def load_empty(auto_class: str, model: str, gguf_file: str | None = None, dtype: DType = "auto", **config: Any) -> Any:
    """Build a model on the meta device, in evaluation mode. Its weights are not read. Arguments are those of `load_model`.

    Raises:
        ValueError: As for `load_model`; or ``gguf_file`` is given.
    """
    import transformers

    if gguf_file is not None:
        raise ValueError(f"on_meta=True reads weights one by one from safetensors files, and gguf_file={gguf_file!r} has none")
    settings = load_config(model)
    for name, value in config.items():
        setattr(settings, name, value)
    saved = getattr(settings, "dtype", None) or torch.float32
    with _named(model), torch.device("meta"):
        made = getattr(transformers, auto_class).from_config(settings, dtype=saved if dtype == "auto" else getattr(torch, dtype))
    return made.eval()


def load_tokenizer(model: str, gguf_file: str | None = None) -> Any:
    """Load the tokenizer. One without a padding token gets its end token as one.

    Args:
        model: A hub id, a local folder, or an adapter's folder with a tokenizer.
        gguf_file: A GGUF file in it.

    Raises:
        ValueError: As for `load_model`.
    """
    import transformers

    source = {} if Path(model, "tokenizer_config.json").is_file() and gguf_file is None else _source(model, gguf_file)
    with _named(model):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, **source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(model: str) -> Any:
    """Load what turns images into the model's input.

    Raises:
        ImportError: Pillow is not installed; the message names the extra.
        ValueError: As for `load_model`.
    """
    import transformers

    if find_spec("PIL") is None:
        raise ImportError("images need the package pillow; pip install 'lightning-lora[vision]'")
    if not Path(model, "preprocessor_config.json").is_file():
        check_there(model)
    with _named(model):
        return transformers.AutoImageProcessor.from_pretrained(model)


def load_causal_lm(model: str, gguf_file: str | None = None, dtype: DType = "auto") -> tuple[Any, Any]:
    """Return a causal language model, in evaluation mode, and its tokenizer. See `load_model`."""
    return load_model("AutoModelForCausalLM", model, gguf_file, dtype), load_tokenizer(model, gguf_file)


def load_config(model: str, gguf_file: str | None = None) -> Any:
    """Return the model's configuration. That of a GGUF file is kept: reading its metadata, which has the vocabulary, takes seconds.

    Raises:
        ValueError: As for `load_model`.
    """
    source, file = _source(model, gguf_file), Path(model, gguf_file or "")
    if gguf_file is None or not file.is_file():
        return _config(model, **source)
    stat = file.stat()
    return copy.deepcopy(_kept_config(model, gguf_file, stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=1)
def _kept_config(model: str, gguf_file: str, *changed: int) -> Any:
    return _config(model, gguf_file=gguf_file)


def _config(model: str, **source: str) -> Any:
    import transformers

    with _named(model):
        return transformers.AutoConfig.from_pretrained(model, **source)


def auto_class_of(config: Any) -> str:
    """Return the class of transformers that a model is loaded with, by its configuration: of those that the tasks have, the one whose head
    the checkpoint has, or else the first that there is for its type.
    """
    import transformers

    names = getattr(config, "architectures", None) or ()
    heads = [name for name in _MAPPINGS if any(str(each).endswith(name.removeprefix("AutoModel")) for each in names)]
    there = [name for name, mapping in _MAPPINGS.items() if type(config) in getattr(transformers, mapping)]
    return [*heads, *there, "AutoModelForCausalLM"][0]


def check_writes(auto_class: str, model: str, config: Any) -> None:
    """Check that a model can learn to write text, if that is what its class is for.

    ``AutoModelForCausalLM`` has a class for BERT too. It reads a text in both directions, so it sees the token that it is to predict.

    Raises:
        ValueError: The model is an encoder.
    """
    import transformers

    encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_encoder_decoder", False)
    if auto_class == "AutoModelForCausalLM" and encoder and not (getattr(config, "is_decoder", False) or getattr(config, "causal", False)):
        raise ValueError(
            f"model={model!r} is an encoder ({config.model_type}), which reads a text in both directions and cannot write one: name a"
            " model that writes, or rows with labels and a task for them"
        )


def skeleton(model: str, gguf_file: str | None = None, auto_class: str | None = None) -> Any:
    """Build the model on the meta device from its configuration alone: no weights are read or downloaded.

    Args:
        model: A hub id or a local folder.
        gguf_file: A GGUF file in it, of which only the metadata is read.
        auto_class: The class of transformers that picks the model's own; by default the one that wrote the checkpoint, or else
            `auto_class_of` its configuration.
    """
    import transformers

    config = load_config(model, gguf_file)
    own = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None) if auto_class is None else None
    with _named(model), torch.device("meta"):
        return own(config) if own is not None else getattr(transformers, auto_class or auto_class_of(config)).from_config(config)


def _source(model: str, gguf_file: str | None) -> dict[str, str]:
    """Return what ``from_pretrained`` takes beside the model's name, once the files can be there."""
    if gguf_file is not None and find_spec("gguf") is None:
        raise ImportError(f"gguf_file={gguf_file!r} needs the package gguf; pip install 'lightning-lora[gguf]'")
    check_there(model, gguf_file)
    return {} if gguf_file is None else {"gguf_file": gguf_file}


@contextmanager
def _only_errors() -> Iterator[None]:
    """Let transformers log errors only."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _named(model: str | os.PathLike[str]) -> Iterator[None]:
    """Name the model in what transformers raises about it, on one line."""
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, OSError, ValueError) as error:
        if other := re.match(r"Unrecognized configuration class .*?(\w+)'> for this kind of AutoModel: (\w+)", str(error)):
            raise ValueError(
                f"model={os.fspath(model)!r}: there is no {other[2]} for a {other[1]}; choose another task or model"
            ) from error
        if "backend tokenizer" in str(error):
            raise ValueError(f"model={os.fspath(model)!r} has no tokenizer; choose a task or a model for what the rows are") from error
        damaged = "its weights are damaged, or no weights: " if isinstance(error, (SafetensorError, pickle.UnpicklingError)) else ""
        raise ValueError(f"model={os.fspath(model)!r}: {damaged}{str(error).strip().splitlines()[0]}") from error


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
        synced_gpus=is_sharded_model(model),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stop_tokens(model, tokenizer) or None,
    )
    return tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)


def is_sharded_model(model: Any) -> bool:
    """Return True if each step of generation needs all processes, so that none may stop before the others."""
    return any(is_sharded(parameter) for parameter in model.parameters())
