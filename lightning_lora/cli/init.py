"""`init`: look at a model and at data, and write a config that trains the one on the other, with the reason of each value."""

from __future__ import annotations

import shlex
from pathlib import Path

from lightning_lora.cli.console import print_json
from lightning_lora.cli.recipe import recipe
from lightning_lora.storage.atomic_files import write_atomic


def init(
    model: str,
    data: str,
    out: str = "run.yaml",
    task: str | None = None,
    val: str | None = None,
    gguf_file: str | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Write a config for a model and a data file. Its values follow from both, and a comment says how.

    Args:
        model: A hub id or a local folder. Its weights are not loaded.
        data: The training rows, in any format that ``data.train`` takes.
        out: The YAML file to write.
        task: The task's class; by default what the rows are for.
        val: Validation rows, or a share of the training rows; by default one is taken if there are enough.
        gguf_file: A GGUF file in the model's folder.
        overwrite: Replace the file.
        json: Print the result as JSON.

    Raises:
        ValueError: A path is wrong, a row is malformed, or the file exists.
    """
    target = Path(out)
    if target.exists() and not overwrite:
        raise ValueError(f"out={out!r} exists; name another file, or pass --overwrite")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"out={out!r}: there is no folder {str(target.parent)!r}")
    text = recipe(model, data, task, val, gguf_file)
    write_atomic(target, text.encode())
    if json:
        print_json({"config": out})
        return
    print(text)
    print(f"# written to {out}; next:")
    for command in ("inspect", "fit --config"):
        print(f"#   lightning-lora {command} {shlex.quote(out)}")
