"""All private names of Lightning that the package uses: what each is for, and what breaks if Lightning removes it.

Lightning is pinned below 2.7 because of them. If a later version removes one, an error is raised; no result is silently wrong.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.progress import _BaseProgress
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn

from lightning_lora.strategies.namespaces import LIGHTNING, library, loaded, twins


def logged_step(trainer: Any) -> int:
    """Return the step under which Lightning logs now. If its name goes, logging raises."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def saves_shards(strategy: Strategy) -> bool:
    """True if the user asked for checkpoints as folders of shards. If its names go, saving raises."""
    if isinstance(strategy, twins(FSDPStrategy)):
        return strategy._state_dict_type == "sharded"
    return isinstance(strategy, twins(ModelParallelStrategy)) and bool(strategy._save_distributed_checkpoint)


def set_data_parallel_size(strategy: ModelParallelStrategy, processes: int) -> None:
    """Replace ``data_parallel_size="auto"``: Lightning would use the number of nodes. If its names go, ``lora_fsdp2`` raises."""
    if strategy._data_parallel_size == "auto":
        assert isinstance(strategy._tensor_parallel_size, int)
        strategy._data_parallel_size = processes // strategy._tensor_parallel_size


def data_parallel_size(strategy: Strategy, processes: int) -> int:
    """Return how many processes get batches of their own, before the strategy is set up. If its name goes, ``verify`` raises."""
    if not isinstance(strategy, twins(ModelParallelStrategy)):
        return processes
    together = strategy._tensor_parallel_size
    return 1 if together == "auto" else processes // together


def has_trainer(module: LightningModule) -> bool:
    """True if a Trainer runs the module. If its name goes, a task's checkpoint is read without a word on its learning rate."""
    return getattr(module, "_trainer", None) is not None


def compiles_steps(module: Any) -> bool:
    """True if the user gave the Trainer ``torch.compile(module)``. If its name goes, batches of such a module are laid end to end."""
    return getattr(module, "_compiler_ctx", None) is not None


def left_masked(callback: Callback, module: LightningModule) -> list[tuple[nn.Module, str]]:
    """Return the layers and names of parameters that a ``ModelPruning`` leaves multiplied by a mask at each call.

    If its names go, a merge at the end of such a fit is refused only there.
    """
    if not isinstance(callback, twins(ModelPruning)) or getattr(callback, "_make_pruning_permanent", True):
        return []
    chosen, names = getattr(callback, "_parameters_to_prune", ()), getattr(callback, "_parameter_names", ())
    found = callback.sanitize_parameters_to_prune(module, chosen, names)  # as its own setup does, before or after this
    return list(callback.filter_parameters_to_prune(found))


def start_method(strategy: Strategy) -> str | None:
    """Return how a strategy starts copies of this process ("fork", "spawn"); None if it does not.

    If its names go, importing ``lightning_lora`` raises.
    """
    launcher: Any = strategy.launcher
    return str(launcher._start_method) if isinstance(launcher, twins(_MultiProcessingLauncher)) else None


def collective_timeout(strategy: Any) -> float:
    """Return for how many seconds a collective waits, infinity if the strategy does not say. If its name goes, a hang is named later."""
    timeout = getattr(strategy, "_timeout", None)
    return float("inf") if timeout is None else float(timeout.total_seconds())


def handler_before(trainer: Any, number: int) -> Any:
    """Return the user's handler of a signal, which Lightning's has replaced for this run. If its names go, a distributed run raises."""
    return trainer._signal_connector._original_handlers.get(number)


def skip_sigterm_broadcast(trainer: Any) -> Callable[[], None]:
    """Let this run's processes not agree on Lightning's flag of a SIGTERM before each batch. Return a function that undoes this.

    They wait for their GPUs to do it. If its name goes, they do so again.
    """
    loop = trainer.fit_loop.epoch_loop
    if not hasattr(loop, "_broadcast_sigterm_tensor"):
        return _nothing
    loop._broadcast_sigterm_tensor = _nothing
    return functools.partial(delattr, loop, "_broadcast_sigterm_tensor")


def stop_after_batch(trainer: Any) -> None:
    """Let the run stop as after a SIGTERM: when the batch is counted as done.

    An exception from a callback's hook stops earlier: a run that resumes from there, and again from its next checkpoint, skips an epoch.
    If its name goes, trials that are told to stop go on.
    """
    trainer._signal_connector.received_sigterm = True


def _nothing() -> None:
    pass


def resumed_from(trainer: Any) -> Any:
    """Return the checkpoint that the user resumes, None if there is none.

    Lightning's tuners (learning rate, batch size) restore the start from a checkpoint of their own and leave its path in
    ``trainer.ckpt_path``. If its name changes, a run is said to resume that one.
    """
    path = trainer.ckpt_path
    return None if os.path.basename(path or "").startswith((".lr_find_", ".scale_batch_size_")) else path


def will_resume(trainer: Any) -> Any:
    """Return the checkpoint that the running ``fit``, ``test`` and so on load, None if there is none.

    Lightning tells nobody before it loads it, which under sharding is after the model was wrapped. So the argument of ``Trainer._run`` is
    read. If its names go, a run with an init that reads data raises.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not type(trainer)._run.__code__:
        frame = frame.f_back
    return trainer.ckpt_path if frame is None else frame.f_locals["ckpt_path"]


def see_mixed_imports() -> None:
    """Let Lightning name the package in its refusal of a module of the other one (``pytorch_lightning``), for a user's classes too.

    Lightning looks only at the Python module that defines the class. So it says that a user's LightningModule is none. All that is checked
    here is refused anyway. Without Lightning's private names, making a ``LoRACallback`` raises.
    """
    homes: list[Any] = [*loaded("lightning.pytorch.utilities.model_helpers"), *loaded("lightning.pytorch.utilities.compile")]
    for home in homes:
        if not hasattr(home._check_mixed_imports, "__wrapped__"):
            home._check_mixed_imports = _by_base(home._check_mixed_imports)


def _by_base(check: Callable[[object], None]) -> Callable[[object], None]:
    """Return Lightning's check, applied to the first class of Lightning's that an object's class inherits from."""

    @functools.wraps(check)
    def check_base(instance: object) -> None:
        base = next((cls for cls in type(instance).__mro__ if library(cls) in LIGHTNING), type(instance))
        check(instance if base is type(instance) else object.__new__(base))

    return check_base


def cli_parser(cli: Any, subcommand: str | None) -> Any:
    """Return the parser of a sub-command. If this name or the next goes, the command line raises."""
    return cli._parser(subcommand)


def cli_value(cli: Any, key: str) -> Any:
    """Return a value from the running sub-command's configuration, with its classes instantiated."""
    return cli._get(cli.config_init, key)


def read_train_batches(trainer: Any, number: int) -> list[Any]:
    """Return the first batches of an epoch of training. Lightning makes its loaders anew afterwards. If its names go, such a run raises.

    Raises:
        ValueError: a loader gives its batches once only.
    """
    loop = trainer.fit_loop
    loop.setup_data()
    loaders = loop._combined_loader
    if loaders is None:  # nothing is trained on
        return []
    try:
        for loader in loaders.flattened:
            if any(iter(each) is each for each in (loader, getattr(loader, "dataset", ())) if hasattr(each, "__next__")):
                raise ValueError(
                    f"the train dataloader ({type(loader).__name__}) gives each batch once, so training would miss what an init reads:"
                    " give a loader that can start over, or call apply_lora and initialize_from_data(model, batches) before fit."
                )
        return [batch for batch, _, _ in itertools.islice(loaders, number)]
    finally:
        loaders.reset()
        loop._combined_loader = loop._data_fetcher = None


def prepared_batch(trainer: Any, batch: Any) -> Any:
    """Return a batch as ``training_step`` gets it, on the device. If its name goes, a run with an init that reads data raises."""
    batch = trainer.lightning_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def loader_states_not_loaded(trainer: Any) -> bool:
    """Return True if the checkpoint's positions of training loaders were not loaded. Without it a run that resumes raises."""
    return bool(trainer.fit_loop._combined_loader_states_to_load)


def progress_of(loop: Any) -> dict[str, dict[str, Any]]:
    """Return the counts of a loop and of those in it, by their names in a checkpoint. If its names go, resuming raises."""
    mine = {name: value.state_dict() for name, value in vars(loop).items() if isinstance(value, twins(_BaseProgress))}
    inner = {name: value for name, value in vars(loop).items() if isinstance(value, twins(_Loop))}
    return mine | {f"{name}.{key}": value for name, each in inner.items() for key, value in progress_of(each).items()}


def defer_bar_values(trainer: Any, deferred: Callable[[], bool]) -> Callable[[], None]:
    """Let Lightning not read the progress bar's values after a batch where ``deferred()``. Return a function that undoes this.

    Lightning turns them into numbers after each batch, without a bar too. Whoever asks for them, such as the bar, still gets the last ones.
    If its names go, a fit with ``tune_loop`` raises.
    """
    connector = trainer._logger_connector
    read = connector.on_batch_end

    @functools.wraps(read)
    def on_batch_end() -> None:
        shown = [result.meta for result in trainer._results.values() if result.meta.prog_bar] if deferred() else []
        for meta in shown:
            meta.prog_bar = False
        try:
            read()
        finally:
            for meta in shown:
                meta.prog_bar = True

    connector.on_batch_end = on_batch_end
    return functools.partial(delattr, connector, "on_batch_end")


def take_hyperparameters(module: LightningModule, other: LightningModule) -> None:
    """Give a module the hyperparameters of another, for loggers and checkpoints. If their names go, these lack them."""
    for name in ("_hparams", "_hparams_name", "_hparams_initial", "_log_hyperparams"):
        if name in vars(other):
            setattr(module, name, vars(other)[name])


def take_batch_hooks(module: LightningModule, other: LightningModule) -> None:
    """Let another module's hooks prepare the batches of a module. If the private name goes, a fit of several trials raises."""
    for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "_call_batch_hook"):
        vars(module)[name] = getattr(other, name)


def configured(module: LightningModule) -> tuple[list[Any], list[Any]]:
    """Return the optimizers of a module and the configurations of its schedulers, checked as for a run of its own.

    If its name goes, a fit of several trials raises.
    """
    return _init_optimizers_and_lr_schedulers(module)
