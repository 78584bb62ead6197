"""The commands that do not train: `inspect`, `merge` and `generate`. Each is a function on files; its signature is its command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from lightning_lora import LoRAConfig, export_merged, find_targets, load_adapter
from lightning_lora.adapter_io.certificate import CERTIFICATE, summary
from lightning_lora.adapter_io.files import CONFIG, TENSORS, read_adapter
from lightning_lora.adapter_io.fingerprint import OtherBase
from lightning_lora.cli.messages import UsageError
from lightning_lora.cli.output_folder import replaced_folder, weight_bytes
from lightning_lora.data.batching import Example, collate_prompts
from lightning_lora.data.chat import encode_prompt
from lightning_lora.storage.sharded_checkpoint import REST
from lightning_lora.tasks.hf import DType, generate_text, load_causal_lm, skeleton, token_probe

IDENTIFYING: tuple[DType, ...] = ("auto", "float16")  # dtypes in which an adapter's base may have had its fingerprint


def inspect(path: str, gguf_file: str | None = None, lora: LoRAConfig = LoRAConfig()) -> None:  # noqa: B008 (frozen)
    """Print what is in an adapter, or what ``lora`` would adapt in a model.

    Args:
        path: An adapter folder, a checkpoint (.ckpt, or a folder of shards), or a model: a hub id or a folder. A model's weights are
            not loaded.
        gguf_file: A GGUF file in the model's folder.
        lora: Which layers to adapt, and how.

    Raises:
        ValueError: The adapter cannot be read, or the config does not fit the model.
    """
    if path.endswith(".ckpt") or any(Path(path, file).is_file() for file in (CONFIG, TENSORS, REST)):
        adapter = read_adapter(path)
        adapter.check_intact(path)
        print(f"adapter {path}\n{adapter.config}")
        for name, tensor in adapter.tensors.items():
            print(f"{name}  {tuple(tensor.shape)}  {str(tensor.dtype).removeprefix('torch.')}")
        print(f"{len(adapter.tensors)} tensors, {sum(t.numel() for t in adapter.tensors.values()):,} parameters")
        print(f"checksum {adapter.checksum()}")  # a merge certificate has it too
        return
    print(find_targets(skeleton(path, gguf_file), lora))


def merge(
    model: str,
    adapter: str,
    out: str,
    gguf_file: str | None = None,
    dtype: DType = "auto",
    overwrite: bool = False,
    max_lost: NonNegativeFloat | None = None,
    probe_tokens: NonNegativeInt = 64,
) -> None:
    """Write a model with its adapter merged in, for ``from_pretrained``, and a certificate of the merge beside it.

    Args:
        model: The base: a hub id or a local folder.
        adapter: An adapter folder or a checkpoint (.ckpt).
        out: The new folder.
        gguf_file: A GGUF file in the model's folder.
        dtype: The merged weights' dtype; the base's own by default.
        overwrite: Replace a folder that holds a model.
        max_lost: The largest share of an update that rounding may lose, such as 0.1. Any by default.
        probe_tokens: Length of a random sequence on which the certificate compares the logits, unmerged and merged. 0: none.

    Raises:
        ValueError: The folder is not empty, is or contains the base or the adapter; the adapter does not fit the base; or rounding loses
            more than ``max_lost``.
    """
    with replaced_folder(out, overwrite, keep=(model, adapter), room=weight_bytes(model, gguf_file, dtype)) as folder:
        network, tokenizer = _load(model, adapter, gguf_file, dtype)
        export_merged(network, folder, probe=token_probe(network, probe_tokens), max_lost=max_lost)
        tokenizer.save_pretrained(folder)
        certificate = json.loads((folder / CERTIFICATE).read_text())
    print(f"merged model in {out}: {summary(certificate)}; {CERTIFICATE} has each layer")


def generate(
    model: str,
    prompt: str,
    adapter: str | None = None,
    system: str | None = None,
    gguf_file: str | None = None,
    dtype: DType = "auto",
    max_new_tokens: PositiveInt = 64,
) -> None:
    """Print a model's greedy answer to one prompt.

    Args:
        model: A hub id or a local folder.
        prompt: The user's message.
        adapter: An adapter folder or a checkpoint (.ckpt); without one the base model answers.
        system: The system message, for models with a chat template.
        gguf_file: A GGUF file in the model's folder.
        dtype: The weights' dtype.
        max_new_tokens: Longest answer, in tokens.

    Raises:
        ValueError: The prompt is empty, or the adapter does not fit the model.
    """
    if not prompt:
        raise UsageError("prompt is empty; give the model something to answer")
    network, tokenizer = _load(model, adapter, gguf_file, dtype) if adapter is not None else load_causal_lm(model, gguf_file, dtype)
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    batch = collate_prompts([Example(encode_prompt(tokenizer, messages))], pad=tokenizer.pad_token_id)
    with torch.inference_mode():
        print(generate_text(network.eval(), tokenizer, batch["input_ids"], batch["attention_mask"], max_new_tokens)[0])


def _load(model: str, adapter: str, gguf_file: str | None, dtype: DType) -> tuple[Any, Any]:
    """Load a base, in any dtype, and an adapter of it. Return the adapted model and the tokenizer.

    In float16 a base may have another fingerprint than in its own dtype. So if the fingerprint is another one, the base is loaded in both
    dtypes, one after the other, and compared in each.
    """
    refused = None
    for tried in dict.fromkeys((dtype, *IDENTIFYING)):
        network, tokenizer = load_causal_lm(model, gguf_file, tried)
        try:
            load_adapter(network, adapter)
            break
        except OtherBase as error:
            refused = refused or error.with_traceback(None)  # which would keep the model in memory
            del network
    else:
        assert refused is not None
        raise refused
    if tried != dtype:
        del network
        network, tokenizer = load_causal_lm(model, gguf_file, dtype)
        load_adapter(network, adapter, check_base=False)
    return network, tokenizer
