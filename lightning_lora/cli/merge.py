"""`merge`: write a tuned model as a folder that ``from_pretrained`` reads."""

from __future__ import annotations

from lightning_lora import export_merged, lora_layers
from lightning_lora.cli.console import print_json, working
from lightning_lora.cli.output_folder import replaced_folder
from lightning_lora.cli.tuned import load_tuned
from lightning_lora.tasks.hf import DType


def merge(
    model: str, adapter: str, out: str, gguf_file: str | None = None, dtype: DType = "auto", overwrite: bool = False, json: bool = False
) -> None:
    """Write a model with its adapter merged in, for ``from_pretrained``. The checkpoint of a full fine-tune is written as it is.

    Args:
        model: The base: a hub id or a local folder.
        adapter: An adapter folder, or a checkpoint (.ckpt), that of a full fine-tune too.
        out: The new folder.
        gguf_file: A GGUF file in the model's folder.
        dtype: The merged weights' dtype; the base's own by default.
        overwrite: Replace a folder that holds a model.
        json: Print the result as JSON.

    Raises:
        ValueError: The folder is not empty, is or contains the base or the adapter, or the adapter does not fit the base.
    """
    with replaced_folder(out, overwrite, keep=(model, adapter)) as folder:
        tuned = load_tuned(model, adapter, gguf_file, dtype)
        layers = len(list(lora_layers(tuned.network)))
        with working("merging"):
            export_merged(tuned.network, folder)
            tuned.preprocessor.save_pretrained(folder)
    print_json({"model": out, "base": model, "adapter": adapter, "merged_layers": layers}) if json else print(f"merged model in {out}")
