"""The two short runs of ``verify``: one process on the global batches, and the chosen strategy on the same batches, shared among its ranks.

The first run verifies the model on its first batch before it trains. Both take two steps in evaluation mode, since ranks draw other masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.adapter_io.verify import run_checks
from lightning_lora.callbacks import LoRACallback
from lightning_lora.callbacks.data_start import TrainingStep, as_before
from lightning_lora.cli.messages import one_line
from lightning_lora.cli.run_results import RunResults
from lightning_lora.cli.waiting_fit import WaitingFit
from lightning_lora.layers.base import lora_layers
from lightning_lora.model.verify_checks import Check
from lightning_lora.strategies.lightning_private import data_parallel_size

STEPS = 2
BATCHES, START, ONE, MANY = "batches.pt", "start.ckpt", "one.ckpt", "many.ckpt"  # files in the folder that the processes share


class ShortRun(WaitingFit):
    """``fit`` for two steps, without loggers, checkpoints and validation.

    Args:
        words: the options of ``fit``.
        folder: where the runs leave what they share.
    """

    result = MANY

    @override
    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        config = self.config["fit"]
        if config.full_finetuning:
            raise ValueError("full_finetuning=true trains no adapter to verify; leave it out")
        if config.seed_everything is False:
            seed_everything(1)  # both runs draw the same start
        self.save_config_callback = None
        trainer, callbacks = config.trainer, config.trainer.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        trainer.callbacks = [each for each in callbacks if "LoRACallback" in each.class_path]
        for lora in (config.lora, *(each.init_args for each in trainer.callbacks)):
            lora.compile, lora.cuda_graphs, lora.merge_on_fit_end, lora.check_gradients = None, False, False, False
        trainer.logger, trainer.enable_checkpointing, trainer.enable_progress_bar = False, False, False
        trainer.max_steps, trainer.max_epochs, trainer.max_time, trainer.min_epochs = STEPS, -1, None, None
        trainer.limit_train_batches, trainer.limit_val_batches, trainer.num_sanity_val_steps = 1.0, 0, 0
        trainer.fast_dev_run, trainer.overfit_batches, trainer.default_root_dir = False, 0.0, str(self.folder)

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        trainer = super()._instantiate_trainer(config, [*callbacks, *self.recorders()])
        left = [each for each in trainer.callbacks if not isinstance(each, RunResults)]  # type: ignore[attr-defined]
        trainer.callbacks = [_SameStart(), *left]  # type: ignore[attr-defined]
        return trainer

    def recorders(self) -> list[Callback]:
        """Return what the run notes."""
        return [_Result(self.folder / self.result)]

    def start(self) -> None:
        """Train."""
        source = self.datamodule or self.model
        original = source.train_dataloader
        source.train_dataloader = lambda: Batches(self.batches(original()))
        self._run("fit", self.arguments)

    def batches(self, loader: Any) -> list[Any]:
        """Return this rank's share of the batches."""
        everything = torch.load(self.folder / BATCHES, weights_only=False)  # our own file, in a folder that only this user reads
        strategy: Any = self.trainer.strategy
        place = strategy.distributed_sampler_kwargs  # ranks that split layers among them get the same batches
        share: list[Any] = everything[place["rank"] :: place["num_replicas"]]
        return share


class OneProcess(ShortRun):
    """The run in one process. It knows the other's trainer, or why there is none.

    Attributes:
        checks: what was verified on the first batch.
        unavailable: why the strategy cannot run here; empty if it can.
        alone: the chosen strategy is one process on one device.
    """

    result = ONE

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        self.unavailable, self.alone, self.meshed, self.processes = "", False, False, 1
        accumulated = config["accumulate_grad_batches"]
        try:
            chosen = super()._instantiate_trainer({**config, "callbacks": []}, [])  # no list that the next call adds to
            self.alone = isinstance(chosen.strategy, SingleDeviceStrategy)
            self.meshed = isinstance(chosen.strategy, ModelParallelStrategy)
            self.processes = data_parallel_size(chosen.strategy, chosen.world_size)
            if chosen.num_nodes > 1:
                self.unavailable = (
                    f"trainer.num_nodes={chosen.num_nodes}: verify starts processes on one machine only; verify with num_nodes=1"
                )
        except (ValueError, RuntimeError, MisconfigurationException) as error:
            self.unavailable = f"{one_line(error)}; the other rows hold for one process"
        if self.unavailable:
            self.processes = 1
        one = {"strategy": "auto", "devices": 1, "num_nodes": 1, "accumulate_grad_batches": accumulated * self.processes}
        if self.unavailable:
            one["accelerator"] = "auto"
        self.needed = STEPS * accumulated * self.processes
        return super()._instantiate_trainer({**config, **one}, callbacks)

    @override
    def recorders(self) -> list[Callback]:
        self.checks = Checks(self)
        return [self.checks, *super().recorders()]

    @override
    def start(self) -> None:
        if self.meshed and is_overridden("configure_model", self.model):
            self.model.configure_model = without_mesh(self.model)
        super().start()

    @override
    def batches(self, loader: Any) -> list[Any]:
        """Return as many batches as two steps of all processes take; from the first again if there are fewer."""
        if isinstance(loader, (Mapping, list, tuple)):
            loader = (item[0] for item in CombinedLoader(loader, "max_size_cycle"))
        first = list(islice(iter(loader), self.needed))
        if not first:
            raise ValueError("the training data has no batch to verify with")
        found = [deepcopy(batch) for batch in islice(chain.from_iterable(repeat(first)), self.needed)]  # a step may change its batch
        self.checks.batches = found
        if not self.alone and not self.unavailable:
            torch.save(found, self.folder / BATCHES)
        return found


def without_mesh(module: LightningModule) -> Callable[[], None]:
    """Return a module's ``configure_model`` whose error says that one process has no device mesh."""
    configure = module.configure_model

    def configure_model() -> None:
        try:
            configure()
        except (TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{type(module).__name__}.configure_model fails in the one process that verify compares with, where self.device_mesh is"
                f" None and nothing is split ({one_line(error)}); begin it with 'if self.device_mesh is None: return'"
            ) from error

    return configure_model


class Batches:
    """A loader of given batches."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _SameStart(Callback):
    """Seed right before the adapters are drawn: what came before may have drawn more numbers in one of the runs."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        seed_everything(1, verbose=False)


class _Result(Callback):
    """Switch to evaluation mode before each batch, and save a checkpoint at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        pl_module.eval()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)


class Checks(Callback):
    """Verify the model on the first batch, before the first step. Save the start."""

    def __init__(self, run: OneProcess) -> None:
        self.run, self.rows, self.batches = run, list[Check](), list[Any]()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill ``rows``."""
        if not pl_module.automatic_optimization:
            why = (
                "training_step optimizes by itself (automatic_optimization=False), so it cannot be repeated; call verify_lora on the model"
            )
            self.rows = [Check("the model's own checks", "not run", advice=why)]
        else:
            fresh = not any(getattr(callback, "start_from", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
            step = TrainingStep(trainer, pl_module, self.batches)
            first = self.batches[0]
            target = _adapted(trainer, pl_module)
            with as_before(trainer, pl_module):
                with torch.no_grad():
                    step(pl_module, first)  # some modules look at their first batch only
                self.rows = run_checks(
                    target,
                    lambda _: _outputs(pl_module, target, step, first),
                    lambda _: _loss(pl_module, step(pl_module, first)),
                    fresh=fresh and not self.run.arguments.get("ckpt_path"),
                )
        trainer.save_checkpoint(self.run.folder / START)


def _adapted(trainer: Trainer, module: LightningModule) -> nn.Module:
    """Return what the only callback adapts; the whole module for several."""
    mine = [callback for callback in trainer.callbacks if isinstance(callback, LoRACallback)]  # type: ignore[attr-defined]
    return module.get_submodule(mine[0].module) if len(mine) == 1 and mine[0].module else module


def _outputs(module: LightningModule, target: nn.Module, step: TrainingStep, batch: Any) -> dict[str, Any]:
    """Return what a training step returns, and the outputs of the outermost modules with adapters that it calls."""
    inside, depth, hooks = dict[str, Any](), [0], []

    def enter(*args: Any) -> None:
        depth[0] += 1

    def leave(name: str, output: Any) -> None:
        depth[0] -= 1
        if depth[0] == 0:
            inside[f"{name}#{len(inside)}"] = output

    for name, child in module.named_modules():
        if child is not module and any(True for _ in lora_layers(child)):
            hooks.append(child.register_forward_pre_hook(enter))
            hooks.append(child.register_forward_hook(lambda _, args, output, n=name: leave(n, output), always_call=True))
    try:
        return {"training_step": step(module, batch), **inside}
    finally:
        for hook in hooks:
            hook.remove()


def _loss(module: LightningModule, result: Any) -> Tensor:
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor):
        raise ValueError(f"{type(module).__name__}.training_step returned no loss on the first batch ({type(result).__name__})")
    return loss
