"""What an adapter folder does not say of its task: the model's class, labels and source prefix, and the tokenizer with its chat template.

PEFT's folder names none of them. So a run leaves ``task.json`` and the tokenizer's files beside the adapter, ``merge`` beside the model,
and the commands read them. A checkpoint, a file or a folder of shards, says the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_lora import tasks
from lightning_lora.adapter_io.files import CONFIG
from lightning_lora.storage.atomic_files import write_atomic
from lightning_lora.storage.read_checkpoint import read_checkpoint
from lightning_lora.storage.sharded_checkpoint import REST
from lightning_lora.tasks import Seq2SeqTask
from lightning_lora.tasks.base import CHAT_TEMPLATE, TASK, HFTask
from lightning_lora.tasks.labels import LabelTask

FILE, TEMPLATE = "task.json", "chat_template.jinja"  # the second is transformers' name
# PEFT's name of a task → the class of transformers that picks the model's own.
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True)
class Task:
    """How to load the model of an adapter, and how to ask it.

    Attributes:
        auto_class: The class of transformers that picks the model's own; None if that is not known.
        labels: The labels of its head, in order; empty for models without.
        source_prefix: Text before everything that an encoder and a decoder are asked.
        preprocessor: A folder with the tokenizer or image processor; None for the base's own.
        chat_template: What was trained with in place of the tokenizer's own template; None for that.
    """

    auto_class: str | None = None
    labels: tuple[str, ...] = ()
    source_prefix: str = ""
    preprocessor: str | None = None
    chat_template: Any = None

    def config(self) -> dict[str, Any]:
        """Return the fields of the model's configuration that hold the labels."""
        if not self.labels:
            return {}
        ids = {name: index for index, name in enumerate(self.labels)}
        return {"num_labels": len(ids), "id2label": dict(enumerate(self.labels)), "label2id": ids}

    def write(self, folder: Path) -> None:
        """Write the task's file into an adapter's or a model's folder."""
        content = {"auto_class": self.auto_class, "labels": list(self.labels), "source_prefix": self.source_prefix}
        text = json.dumps({name: value for name, value in content.items() if value}, indent=2, ensure_ascii=False)
        write_atomic(folder / FILE, f"{text}\n".encode())


def write_task(folder: Path, module: LightningModule) -> None:
    """Write the task's file and its tokenizer or image processor into an adapter folder. Nothing for a module of another kind."""
    if not isinstance(module, HFTask):
        return
    for name in ("tokenizer", "processor"):
        if hasattr(getattr(module, name, None), "save_pretrained"):
            getattr(module, name).save_pretrained(folder)
    _task(module.described(), FILE).write(folder)


def read_task(path: str) -> Task:
    """Return the task of a folder or a checkpoint: of an adapter, or of a model that ``merge`` wrote.

    Raises:
        ValueError: The file is damaged, or names a class that no task here has.
    """
    folder = Path(path)
    if folder.is_file() or (folder / REST).is_file():
        found = read_checkpoint(folder / REST if folder.is_dir() else folder)
        content = found if isinstance(found, dict) else {}
        return replace(_task(content.get(TASK), path), chat_template=content.get(CHAT_TEMPLATE))
    task = _task(_json(folder / FILE) or {"auto_class": AUTO_CLASSES.get(str(_json(folder / CONFIG).get("task_type")))}, str(folder / FILE))
    own = any((folder / name).is_file() for name in ("tokenizer_config.json", "preprocessor_config.json"))
    template = folder / TEMPLATE
    return replace(
        task, preprocessor=path if own else None, chat_template=template.read_text(encoding="utf-8") if template.is_file() else None
    )


def give_task(module: LightningModule, ckpt_path: str | None, trainer: Trainer) -> None:
    """Give a task what its checkpoint, or the adapter that it starts from, was trained with: its labels unless it has labels of its own,
    its chat template, its source prefix. The data module replaces the last two if it is given others.
    """
    starts = (getattr(callback, "start_from", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    path = ckpt_path or next(filter(None, starts), None)
    if path is None or not Path(path).exists() or not isinstance(module, HFTask):
        return
    task = read_task(path)
    if task.labels and isinstance(module, LabelTask) and not module.labels_given:
        module.set_labels(task.labels)
    if task.chat_template and hasattr(module, "tokenizer"):
        module.tokenizer.chat_template = task.chat_template
    if isinstance(module, Seq2SeqTask):
        module.source_prefix = task.source_prefix


def _task(said: Any, where: str) -> Task:
    """Return the task that a description says, see `HFTask.described`. It may come from anyone."""
    said = said if isinstance(said, dict) else {}
    auto_class, labels = said.get("auto_class"), said.get("labels")
    known = {getattr(tasks, name).auto_class for name in tasks.__all__ if hasattr(getattr(tasks, name), "auto_class")}
    if auto_class is not None and auto_class not in known:
        raise ValueError(f"{where} names auto_class={auto_class!r}; there are {', '.join(sorted(known))}")
    return Task(auto_class, tuple(map(str, labels if isinstance(labels, list) else ())), str(said.get("source_prefix") or ""))


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
