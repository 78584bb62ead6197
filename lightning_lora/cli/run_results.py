"""Leave the results of a completed ``fit`` in its folder: adapter, loss picture. Say where they are and what to type next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_lora.adapter_io.export_adapter import is_loaded_by
from lightning_lora.adapter_io.save_load import save_adapter
from lightning_lora.callbacks import LoRACallback
from lightning_lora.cli.console import print_pairs
from lightning_lora.cli.loss_picture import can_draw, draw_loss
from lightning_lora.cli.run_folder import BeganConfig, free
from lightning_lora.cli.task_file import write_task
from lightning_lora.layers.base import lora_layers
from lightning_lora.registry import belongs_to_packed_base
from lightning_lora.storage.room import check_room
from lightning_lora.strategies.savable import least_bytes
from lightning_lora.utils.sharding import is_flattened, is_sharded, on_first_rank

# The logger of a run that names none.
LOGGER: dict[str, Any] = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "lora"}}
# Class of model → the commands that answer with it.
ANSWERING: dict[str, tuple[list[str], ...]] = {
    "AutoModelForCausalLM": (["generate", "Hello"], ["chat"]),
    "AutoModelForSeq2SeqLM": (["generate", "Hello"],),
}


class RunResults(Callback):
    """Save the adapter when ``fit`` has completed, as after its last step. Checkpoints hold the adapters of other steps.

    It comes after `LoRACallback` in the trainer, because AdaLoRA shrinks its adapters at the end. An adapter of an earlier run in the
    same folder is kept: the new one's name then gets a number, as Lightning does with checkpoints.

    Attributes:
        adapters: The folders that were written.
    """

    def __init__(self) -> None:
        self.adapters: list[Path] = []
        self._folder = Path()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ValueError on every rank if the adapter could not be written at the end."""
        self._folder = run_folder(trainer)
        on_first_rank(lambda: check_room(self._folder, least_bytes(pl_module, []), "the run's folder"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a sharded adapter while it is on its devices, where it can be gathered."""
        if is_flattened(pl_module) or any(is_sharded(p) for p in pl_module.parameters()):
            self._save(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save any other adapter, after AdaLoRA has shrunk it."""
        if not self.adapters:
            self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the adapter of each `LoRACallback`. Every rank takes part, and the first one writes."""
        callbacks = [callback for callback in trainer.callbacks if isinstance(callback, LoRACallback)]  # type: ignore[attr-defined]
        for callback in callbacks:
            name = "adapter" if len(callbacks) == 1 else f"adapter-{callback.module}"
            folder = trainer.strategy.broadcast(free(self._folder / name))
            save_adapter(pl_module.get_submodule(callback.module or ""), folder)
            on_first_rank(partial(write_task, folder, pl_module))
            self.adapters.append(folder)

    def report(self, trainer: Trainer, module: LightningModule, data: Any) -> dict[str, Any]:
        """Return where the results are, the last metrics, and commands to type next. Draw the loss picture."""
        sources = getattr(data, "sources", {})
        folder = self._folder
        csv = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        for logger in csv:
            logger.save()
        metrics = folder / "metrics.csv"
        saved = [path for saver in trainer.checkpoint_callbacks if (path := str(getattr(saver, "best_model_path", "")))]
        config = next((folder / each.config_filename for each in trainer.callbacks if isinstance(each, BeganConfig)), folder)  # type: ignore[attr-defined]
        return {
            "folder": str(folder),
            "adapter": [str(adapter) for adapter in self.adapters],
            "checkpoints": saved,
            "metrics": str(metrics) if metrics.is_file() else None,
            "loss_picture": draw_loss(metrics, folder / "loss.png") if metrics.is_file() else None,
            "config": str(config) if config.is_file() else None,
            "last": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "next": next_commands(module, sources, [*map(str, self.adapters), *saved], str(config) if config.is_file() else None, saved),
        }


def print_report(report: dict[str, Any]) -> None:
    """Print a report for people."""
    print()
    places = {name: _words(report[name]) for name in ("adapter", "checkpoints", "metrics", "loss_picture", "config") if report[name]}
    if report["metrics"] and not can_draw():
        places["loss_picture"] = "none: pip install 'lightning-lora[plot]'"
    print_pairs(places)
    if report["last"]:
        print()
        print_pairs(report["last"])
    if report["next"]:
        print("\nnext:")
        for command in report["next"]:
            print(f"  {command}")


def log_under_root(trainer: Namespace) -> None:
    """Let the default logger write under ``trainer.default_root_dir`` if that is given, and not under ``runs``."""
    logger, usual = trainer.get("logger"), LOGGER["init_args"]
    if trainer.default_root_dir is None or not isinstance(logger, Namespace) or logger.class_path != LOGGER["class_path"]:
        return
    if all(logger.init_args.get(name) == value for name, value in usual.items()):
        logger.init_args.save_dir = str(trainer.default_root_dir)


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of a run: its logger's, or the trainer's root. Every rank has to call it."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def next_commands(
    module: LightningModule, sources: Mapping[str, Any], tuned: list[str], config: str | None, checkpoints: list[str]
) -> list[str]:
    """Return commands that can be typed as they are. They are those of the package's tasks.

    Args:
        module: The task.
        sources: Split → its rows, where the data module says so.
        tuned: Adapter folders and checkpoints; the first one is used.
        config: The run's config.
        checkpoints: Checkpoints of the run.
    """
    commands = []
    model, gguf_file = module.hparams.get("model"), module.hparams.get("gguf_file")
    answering = ANSWERING.get(getattr(module, "auto_class", ""), ())
    layers = [layer for _, layer in lora_layers(module)]
    packed = any(belongs_to_packed_base(layer.lora_config.init) for layer in layers)  # no server has these weights
    if isinstance(model, str) and tuned:
        gguf, folder = ["--gguf_file", gguf_file] if gguf_file else [], os.path.dirname(config or tuned[0])
        commands += [[name, model, *prompt, "--adapter", tuned[0], *gguf] for name, *prompt in answering]
        if not any(layer.never_merges(layer) for layer in layers):
            commands.append(["merge", model, tuned[0], os.path.join(folder, "merged"), *gguf])
        if os.path.isdir(tuned[0]) and not packed:
            server = "vllm" if answering and is_loaded_by("vllm", tuned[0]) else "peft"
            commands.append(["export", tuned[0], os.path.join(folder, server), "--for", server])
    if config is not None and checkpoints:
        run = ["--config", config, "--ckpt_path", checkpoints[0]]
        commands += [[name, *run] for name, split in (("test", "test"), ("validate", "val")) if sources.get(split) is not None][:1]
        if not answering and isinstance(sources.get("train"), str):
            commands.append(["predict", *run, "--data.predict", sources["train"]])
    return [shlex.join(["lightning-lora", *words]) for words in commands]


def _words(value: Any) -> str:
    return "  ".join(value) if isinstance(value, list) else str(value)
