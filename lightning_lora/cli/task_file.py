"""What an adapter folder does not say of its task: the model's class and labels, and the tokenizer with its chat template.

PEFT's folder names neither. So a run leaves ``task.json`` and the tokenizer's files beside the adapter, and the commands read them.
A checkpoint says the same in its hyperparameters.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_lora import tasks
from lightning_lora.adapter_io.files import CONFIG
from lightning_lora.storage.atomic_files import write_atomic
from lightning_lora.storage.read_checkpoint import read_checkpoint
from lightning_lora.tasks.base import CHAT_TEMPLATE
from lightning_lora.tasks.labels import LabelTask

FILE = "task.json"
# PEFT's name of a task → the class of transformers that picks the model's own.
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True)
class Task:
    """How to load the model of an adapter.

    Attributes:
        auto_class: The class of transformers that picks the model's own.
        labels: The labels of its head, in order; empty for models without.
        preprocessor: A folder with the tokenizer or image processor; None for the base's own.
        chat_template: What a checkpoint says in place of the tokenizer's own template; None for that.
    """

    auto_class: str = "AutoModelForCausalLM"
    labels: tuple[str, ...] = ()
    preprocessor: str | None = None
    chat_template: Any = None

    def config(self) -> dict[str, Any]:
        """Return the fields of the model's configuration that hold the labels."""
        if not self.labels:
            return {}
        ids = {name: index for index, name in enumerate(self.labels)}
        return {"num_labels": len(ids), "id2label": dict(enumerate(self.labels)), "label2id": ids}


def write_task(folder: Path, module: LightningModule) -> None:
    """Write the task's file and its tokenizer or image processor into an adapter folder. Nothing for a module of another kind."""
    if not hasattr(module, "auto_class"):
        return
    for name in ("tokenizer", "processor"):
        if hasattr(getattr(module, name, None), "save_pretrained"):
            getattr(module, name).save_pretrained(folder)
    content = {"auto_class": module.auto_class, "labels": list(getattr(module, "labels", ()))}
    write_atomic(folder / FILE, (json.dumps(content, indent=2) + "\n").encode())


def read_task(path: str | None) -> Task:
    """Return the task of an adapter folder or a checkpoint; a causal language model's if nothing says otherwise.

    Raises:
        ValueError: The file is damaged, or names a class that no task here has.
    """
    if path is None:
        return Task()
    folder, template = Path(path), None
    if folder.is_dir():
        said = _json(folder / FILE) or {"auto_class": AUTO_CLASSES.get(str(_json(folder / CONFIG).get("task_type")))}
        own = any((folder / name).is_file() for name in ("tokenizer_config.json", "preprocessor_config.json"))
    else:
        found = read_checkpoint(folder) if folder.suffix == ".ckpt" else {}
        content = found if isinstance(found, dict) else {}
        hyper, template = content.get("hyper_parameters", {}), content.get(CHAT_TEMPLATE)
        cls = getattr(tasks, str(hyper.get("_class_path", "")).rpartition(".")[2], None)
        said, own = {"auto_class": getattr(cls, "auto_class", None), "labels": hyper.get("labels")}, False
    auto_class = said.get("auto_class") or Task.auto_class
    known = {getattr(tasks, name).auto_class for name in tasks.__all__ if hasattr(getattr(tasks, name), "auto_class")}
    if auto_class not in known | set(AUTO_CLASSES.values()):
        raise ValueError(f"{path}: {FILE} names auto_class={auto_class!r}; there are {', '.join(sorted(known))}")
    return Task(auto_class, tuple(map(str, said.get("labels") or ())), path if own else None, template)


def give_labels(module: LightningModule, ckpt_path: str | None, trainer: Trainer) -> None:
    """Give a task without labels of its own those that its checkpoint, or the adapter that it starts from, was trained with."""
    starts = (getattr(callback, "start_from", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    path = ckpt_path or next(filter(None, starts), None)
    if path is None or not Path(path).exists() or not isinstance(module, LabelTask) or module.labels_given:
        return
    if labels := read_task(path).labels:
        module.set_labels(labels)


def _json(file: Path) -> dict[str, Any]:
    """Return a file's content, {} if there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object")
    return content
