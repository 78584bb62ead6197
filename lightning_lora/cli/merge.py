"""`merge`: write a tuned model as a folder that ``from_pretrained`` reads, with a certificate of what rounding lost."""

from __future__ import annotations

from json import loads

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt

from lightning_lora import export_merged, lora_layers
from lightning_lora.adapter_io.certificate import CERTIFICATE, summary
from lightning_lora.cli.console import print_json, working
from lightning_lora.cli.output_folder import replaced_folder, weight_bytes
from lightning_lora.cli.tuned import Tuned, load_tuned
from lightning_lora.data.chat import stop_tokens
from lightning_lora.tasks.hf import DType, token_probe


def merge(
    model: str,
    adapter: str,
    out: str,
    gguf_file: str | None = None,
    dtype: DType = "auto",
    overwrite: bool = False,
    max_lost: NonNegativeFloat | None = None,
    probe_tokens: NonNegativeInt = 64,
    json: bool = False,
) -> None:
    """Write a model with its adapter merged in, for ``from_pretrained``, and a certificate of the merge beside it.

    The checkpoint of a full fine-tune has nothing to merge: its weights are written as they are, without a certificate.

    Args:
        model: The base: a hub id or a local folder.
        adapter: An adapter folder, or a checkpoint (.ckpt), that of a full fine-tune too.
        out: The new folder.
        gguf_file: A GGUF file in the model's folder.
        dtype: The merged weights' dtype; the base's own by default.
        overwrite: Replace a folder that holds a model.
        max_lost: The largest share of an update that rounding may lose, such as 0.1. Any by default.
        probe_tokens: Length of a random sequence on which the certificate compares a causal language model's logits, unmerged and merged.
            0: none.
        json: Print the result as JSON.

    Raises:
        ValueError: The folder is not empty, is or contains the base or the adapter; the adapter does not fit the base; or rounding loses
            more than ``max_lost``.
    """
    with replaced_folder(out, overwrite, keep=(model, adapter), room=weight_bytes(model, gguf_file, dtype)) as folder:
        tuned = load_tuned(model, adapter, gguf_file, dtype)
        _keep_stops(tuned)
        layers = len(list(lora_layers(tuned.network)))
        certificate = None
        with working("merging"):
            if layers:
                probe = token_probe(tuned.network, probe_tokens) if tuned.task.auto_class == "AutoModelForCausalLM" else None
                export_merged(tuned.network, folder, probe=probe, max_lost=max_lost)
                certificate = loads((folder / CERTIFICATE).read_text())
            else:
                tuned.network.save_pretrained(folder)
            tuned.preprocessor.save_pretrained(folder)
            tuned.task.write(folder)
    if json:
        print_json({"model": out, "base": model, "adapter": adapter, "merged_layers": layers, "certificate": certificate})
    else:
        print(f"merged model in {out}" + (f": {summary(certificate)}; {CERTIFICATE} has each layer" if certificate else ""))


def _keep_stops(tuned: Tuned) -> None:
    """Write all tokens that end an answer into the generation config. vLLM and transformers stop at these, whatever the template."""
    if tuned.network.can_generate():
        stops = stop_tokens(tuned.network, tuned.preprocessor)
        tuned.network.generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops or None
