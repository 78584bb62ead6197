"""One trial: a task, a base, a method with its config, a seed and a learning rate → one record.

Everything a user would use: the package's task and data module, a `Trainer`, and for LoRA the `LoRACallback`. A trial that chooses (its
``split`` is "val") reads no test row. One that reports reads both: validation as in the choice, then the test rows once.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from benchmarks.quality.bases import Base, load_base
from benchmarks.quality.methods import METHODS, PROMPTED, PromptedLM
from benchmarks.quality.tasks import Task, load_task
from lightning_lora.data import ClassificationDataModule, InstructionDataModule
from lightning_lora.tasks import CausalLMTask, SequenceClassificationTask

LENGTH = 256  # tokens of a row at most
EVAL_BATCH = {"encoder": 100, "decoder": 50}
QUIET: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


@dataclass(frozen=True)
class Trial:
    """What is run.

    Attributes:
        study: Whose trial it is.
        task: Name of a task.
        base: Name of a base.
        method: Name in `METHODS`.
        config: "lora" (fields of `LoRAConfig`), "callback" (arguments of `LoRACallback`), "peft" (fields of PEFT's config), "task"
            (arguments of the package's task, such as ``weight_decay``), "batch_size", "rows" (the first so many training rows).
            ``lora.target_modules`` may name a set of the base.
        seed: Of the start and of the order of rows.
        lr: Learning rate, or "auto" for the package's advice.
        steps: Optimizer steps.
        split: "val" leaves the test rows alone, "test" reports on them too.
        measures: "module:function"s of the trained task module, each of which returns a dict for the record.
    """

    study: str
    task: str
    base: str
    method: str
    seed: int
    lr: float | Literal["auto"]
    steps: int
    config: dict[str, Any] = field(default_factory=dict)
    split: Literal["val", "test"] = "test"
    measures: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What tells it from others."""
        return json.dumps(asdict(self), sort_keys=True)


@lru_cache(maxsize=8)
def _base(name: str) -> Base:
    return load_base(name)


@lru_cache(maxsize=8)
def _task(name: str) -> Task:
    return load_task(name)


def writes(trial: Trial) -> bool:
    """Tell whether the model writes its answer; otherwise it has a head for labels."""
    return _base(trial.base).kind == "decoder" and trial.method != "probe"


def prepare(trial: Trial) -> tuple[pl.Trainer, Any, Any]:
    """Return trainer, task module and data module of a trial."""
    base, task, config = _base(trial.base), _task(trial.task), dict(trial.config)
    if not writes(trial) and task.kind == "generation":
        raise ValueError(f"task={task.name!r} has no labels, which base={base.name!r} with method={trial.method!r} needs")
    options: dict[str, Any] = {"dtype": "float32", "learning_rate": trial.lr, **config.get("task", {})}
    pl.seed_everything(trial.seed, verbose=False)
    if writes(trial):
        kind = PromptedLM if trial.method in PROMPTED else CausalLMTask
        module: Any = kind(str(base.folder), max_new_tokens=task.max_new_tokens, **options)
    else:
        module = SequenceClassificationTask(str(base.folder), labels=task.labels, **options)
    targets = config.get("lora", {}).get("target_modules", "all")
    config["lora"] = {
        **config.get("lora", {}),
        "target_modules": base.targets.get(targets, targets) if isinstance(targets, str) else targets,
    }
    callbacks = METHODS[trial.method](module, config)
    form, data = ("chat", InstructionDataModule) if writes(trial) else ("label", ClassificationDataModule)
    splits = ("train", "val") if trial.split == "val" else ("train", "val", "test")
    files: dict[str, Any] = {split: task.file(form, split) for split in splits}  # type: ignore[arg-type]
    if "rows" in config:
        files["train"] = first_rows(files["train"], config["rows"])
    rows: Any = data(
        **files, batch_size=config.get("batch_size", 16), max_length=LENGTH, seed=trial.seed, cache=str(task.folder / "encoded")
    )
    trainer = pl.Trainer(max_steps=trial.steps, max_epochs=-1, devices=1, callbacks=callbacks, limit_val_batches=0, **QUIET)
    return trainer, module, rows


def first_rows(file: str, count: int) -> str:
    """Return a file with the first rows of another, beside it."""
    few = Path(file).with_name(f"{Path(file).stem}-{count}.jsonl")
    if not few.is_file():
        part = few.with_suffix(f".{os.getpid()}")  # other workers write it too
        part.write_text("".join(Path(file).read_text(encoding="utf-8").splitlines(keepends=True)[:count]), encoding="utf-8")
        part.replace(few)
    return str(few)


def run_trial(trial: Trial, most_steps: int | None = None) -> dict[str, Any]:
    """Train and evaluate. A trial that fails has its error in the record, and nothing measured.

    Args:
        trial: What is run.
        most_steps: For a dry run: stop after so many steps. The record is the trial's all the same, and says how many it took.
    """
    key, trial = trial.key, trial if most_steps is None else replace(trial, steps=min(most_steps, trial.steps))
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU; a CPU has none
    began, record = time.perf_counter(), {**asdict(trial), "measures": {}, "key": key, **surroundings()}
    try:
        record |= {**_measured(trial), "error": None}
    except Exception as error:  # a run of hundreds goes on without it
        record |= {"val": None, "test": None, "error": f"{type(error).__name__}: {error}"[:500]}
    if torch.cuda.is_available():  # which others share: a Trainer and its module hold one another
        gc.collect()
        torch.cuda.empty_cache()
    return record | {"seconds": time.perf_counter() - began}


def _measured(trial: Trial) -> dict[str, Any]:
    """Return what a trial's record says beside the trial."""
    began, (trainer, module, data), watch = time.perf_counter(), prepare(trial), _Losses()
    trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    if trial.steps:
        trainer.fit(module, data)
    found: dict[str, Any] = {"loss": watch.mean(), "rate": watch.rate, "fit_seconds": time.perf_counter() - began, "test": None}
    found["trainable"] = sum(p.numel() for p in module.parameters() if p.requires_grad)
    data.batch_size = EVAL_BATCH[trial.base]
    evaluate = pl.Trainer(devices=1, **QUIET, callbacks=trainer.callbacks)  # type: ignore[attr-defined]
    found["val"] = _found(evaluate.validate(module, data, verbose=False)[0])
    if trial.split == "test":
        found["test"] = _found(evaluate.test(module, data, verbose=False)[0])
        if _task(trial.task).kind == "generation":
            found["test"] |= written(evaluate, module, data, _task(trial.task))
    if trial.measures:
        module.to(evaluate.strategy.root_device)  # from which the Trainer took it
        functions = [name.partition(":")[::2] for name in trial.measures]
        results = [getattr(importlib.import_module(place), function)(module) for place, function in functions]
        found["measures"] = {name: value for result in results for name, value in result.items()}
    return found


class _Losses(pl.Callback):
    """The losses of the last steps, and the learning rate at its highest."""

    def __init__(self, last: int = 20) -> None:
        self.losses: list[Any] = []
        self.last, self.rate = last, 0.0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.losses = [*self.losses[1 - self.last :], outputs["loss"].detach()]
        self.rate = max(self.rate, trainer.optimizers[0].param_groups[0]["lr"])

    def mean(self) -> float | None:
        values = [float(loss) for loss in self.losses]
        return _finite(sum(values) / len(values)) if values else None


def _found(metrics: Any) -> dict[str, float | None]:
    return {name.partition("_")[2]: _finite(value) for name, value in metrics.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no other


def written(trainer: pl.Trainer, module: Any, data: Any, task: Task) -> dict[str, float]:
    """Return BLEU and chrF, from 0 to 100, of what the model writes for the test rows, and the share that it writes word for word."""
    from torchmetrics.text import CHRFScore, SacreBLEUScore

    lines = [json.loads(line)["messages"] for line in Path(task.file("chat", "test")).read_text(encoding="utf-8").splitlines()]
    answers = [turns[-1]["content"] for turns in lines]
    pairs = [pair for batch in trainer.predict(module, data) or () for pair in batch]
    texts = [pair["response"].strip() for pair in pairs]
    assert len(texts) == len(answers)  # in the file's order
    bleu, chrf = SacreBLEUScore(), CHRFScore()
    bleu.update(texts, [[answer] for answer in answers])
    chrf.update(texts, [[answer] for answer in answers])
    same = sum(text == answer for text, answer in zip(texts, answers, strict=True)) / len(answers)
    return {"bleu": 100 * float(bleu.compute()), "chrf": 100 * float(chrf.compute()), "exact": same}


@lru_cache(maxsize=1)
def surroundings() -> dict[str, Any]:
    """Return device, versions and commit of this process."""
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    marker = root / "COMMIT"  # of a copy without git
    commit = found.stdout.strip() or (marker.read_text().strip() if marker.is_file() else "unknown")
    versions = {name: version(name) for name in ("torch", "lightning", "transformers", "peft")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {"device": device, "versions": versions, "commit": commit}
