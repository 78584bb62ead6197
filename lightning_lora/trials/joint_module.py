"""The LightningModule that takes the place of the user's while one ``fit`` trains several trials.

It does for each trial what Lightning asks of one module.

Each trial has a copy of the user's module over the same base (:mod:`lightning_lora.trials.shared_copy`). The hooks that the user wrote run
once for each trial, on its copy, with its random numbers; what it logs gets its name: ``small/train_loss``. The backward pass of a trial
follows its forward pass, so that only one trial's activations are in memory. Loaders are the user's module's. A batch is prepared once, by
the hooks of the first trial's module.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.strategies.lightning_private import take_batch_hooks, take_hyperparameters
from lightning_lora.strategies.namespaces import twin
from lightning_lora.trials.joint_step import Result
from lightning_lora.trials.live_trial import LiveTrial
from lightning_lora.trials.records import check_one_trained

#: Hooks that run on each live trial's copy with what Lightning passes; those with an optimizer get the trial's.
EACH = (
    *("on_fit_start", "on_fit_end", "on_train_start", "on_train_end", "on_train_epoch_start", "on_train_batch_start"),
    *("on_validation_start", "on_validation_end", "on_validation_epoch_start", "on_validation_epoch_end", "on_after_backward"),
    *("on_validation_batch_start", "on_before_zero_grad", "on_before_optimizer_step"),
)
ENDS = ("on_train_end", "on_fit_end")
#: Hooks that would have to do for all trials what was written for one.
REFUSED = (
    *("backward", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step", "configure_sharded_model"),
    *("on_validation_model_eval", "on_validation_model_train", "on_validation_model_zero_grad"),
)
SAVED = "lightning_lora_trials"  # key of a checkpoint: trial → what its module's own on_save_checkpoint added


class JointModule(LightningModule):
    """See the file's docstring.

    Args:
        original: the user's module.
        trials: those that are trained.
        build: makes the trials' modules. It is called once, when the original has been built.
        configure: what ``configure_optimizers`` does.
        epoch_end: called at the end of each epoch of training, after the user's own hook.
    """

    original: LightningModule

    def __init__(
        self,
        original: LightningModule,
        trials: Sequence[LiveTrial],
        build: Callable[[], None],
        configure: Callable[[], Any],
        epoch_end: Callable[[], None],
    ) -> None:
        super().__init__()
        # Not a child of this module: its parameters are those of the trials.
        vars(self)["original"] = original
        self.all_trials, self.build, self.configure, self.epoch_end, self.built = trials, build, configure, epoch_end, False
        take_hyperparameters(self, original)
        cls, hooks = twin(LightningModule, original), (*EACH, "on_train_batch_end", "on_validation_batch_end")
        written = {name for name in hooks if is_overridden(name, original, cls)}
        for name in EACH:
            if name in written:
                setattr(self, name, partial(self._each, name))
        self._written = written
        if not is_overridden("validation_step", original, cls):  # Lightning asks whether it is overridden
            vars(self)["validation_step"] = MethodType(LightningModule.validation_step, self)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the user's module, such as a tokenizer that a data module asks for. Modules are each trial's own."""
        original = vars(self).get("original")
        value = getattr(original, name, None) if name not in vars(self).get("_modules", {}) else None  # a copy has none at first
        return super().__getattr__(name) if value is None or isinstance(value, (nn.Module, Tensor)) else value

    def __deepcopy__(self, memo: dict[int, Any]) -> JointModule:
        """Return a copy of the modules, as a callback that averages makes one. What belongs to the run is not copied."""
        memo.update((id(each), each) for each in (self.all_trials, self.build, self.configure, self.epoch_end))
        new = memo[id(self)] = type(self).__new__(type(self))
        vars(new).update(copy.deepcopy(self.__getstate__(), memo))
        return new

    @property
    def live(self) -> list[LiveTrial]:
        """The trials that have not stopped."""
        return [trial for trial in self.all_trials if trial.live]

    # Built by the user's hooks.

    def setup(self, stage: str) -> None:
        """Run the user's, then make the trials' modules, unless ``configure_model`` builds what they are copied from."""
        self.original.setup(stage)
        if any(True for _ in self.original.parameters()) and not is_overridden(
            "configure_model", self.original, twin(LightningModule, self.original)
        ):
            self.build_once()

    def configure_model(self) -> None:
        """Likewise."""
        self.original.configure_model()
        self.build_once()

    def build_once(self) -> None:
        """Make the trials' modules, unless they are made."""
        if not self.built:
            self.built = True
            self.build()
            # A trial's module has the run's mode and device, and its buffers are on that: those of the original do not follow.
            take_batch_hooks(self, self.all_trials[0].module)

    def teardown(self, stage: str) -> None:
        """Run the user's."""
        self.original.teardown(stage)

    def configure_optimizers(self) -> Any:
        """Return the joint optimizer and schedulers."""
        return self.configure()

    # A step.

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Return a loss whose backward pass gives each live trial its gradients. They are computed here, a trial at a time."""
        losses = []
        for trial in self.live:
            with trial.drawing(), _unchanged(batch, trial):
                losses += self._train(trial, batch, batch_idx)
        check_one_trained([trial.outcome for trial in self.all_trials])
        self.trainer.should_stop = self.trainer.should_stop or not self.live
        return sum(losses[1:], losses[0]) if losses else None

    def _train(self, trial: LiveTrial, batch: Any, batch_idx: int) -> list[Tensor]:
        trial.stepped, trial.output = True, {}
        output = _call(trial.module.training_step, _fresh(batch), batch_idx)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if loss is None:
            return []
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise RuntimeError(f"{trial.name}: the loss that training_step returned does not depend on the adapter.")
        scaled = loss / self.trainer.accumulate_grad_batches  # what hooks get; Lightning scales the gradients later
        others = {k: v for k, v in output.items() if k != "loss"} if isinstance(output, Mapping) else {}
        trial.output = {"loss": scaled.detach(), **others}
        trial.module.on_before_backward(scaled)
        result = Result(loss.detach(), trial.gradients(loss))
        if not trial.callback.allow_nonfinite and not result.is_finite():
            trial.stop("failed", f"its loss or a gradient is not finite at step {self.trainer.global_step}; try a smaller learning rate")
            return []
        return [result.as_loss(trial.parameters)]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return trial → what it returned."""
        found = {}
        for trial in self.live:
            with trial.drawing(), _unchanged(batch, trial):
                found[trial.name] = _call(trial.module.validation_step, _fresh(batch), batch_idx, dataloader_idx)
        return found

    # The user's hooks.

    def _each(self, hook: str, *args: Any, **kwargs: Any) -> Any:
        """Run a hook on the copy of each live trial, at the end of all that have not failed. Return what the first returned."""
        returned = []
        for trial in self.live if hook not in ENDS else [each for each in self.all_trials if each.outcome.status != "failed"]:
            with trial.drawing():
                mine = [trial.optimizer if isinstance(each, Optimizer) else each for each in args]
                returned.append(getattr(trial.module, hook)(*mine, **kwargs))
        if hook == "on_train_batch_start" and -1 in returned and set(returned) != {-1}:
            raise RuntimeError("on_train_batch_start ends the epoch for some trials only; use the function sweep, where each has its own.")
        return returned[0] if returned else None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Run the user's for each trial with its own outputs."""
        if "on_train_batch_end" in self._written:
            for trial in self.live:
                with trial.drawing():
                    trial.module.on_train_batch_end(trial.output, batch, batch_idx)

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Likewise."""
        if "on_validation_batch_end" in self._written:
            for trial in self.live:
                with trial.drawing():
                    _call(trial.module.on_validation_batch_end, outputs[trial.name], batch, batch_idx, dataloader_idx)

    def on_train_epoch_end(self) -> None:
        """Run the user's for each trial that has trained in this epoch."""
        for trial in self.all_trials:
            if trial.stepped:
                with trial.drawing():
                    trial.module.on_train_epoch_end()
        self.epoch_end()
        for trial in self.all_trials:
            trial.stepped = False

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: int | float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip each trial's gradients by their own norm, as its module does."""
        for trial in self.live:
            trial.module.configure_gradient_clipping(trial.optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what each trial's module adds."""
        checkpoint[SAVED] = {}
        for trial in self.all_trials:
            seen = {key: value for key, value in checkpoint.items() if key != SAVED}
            mine = dict(seen)
            trial.module.on_save_checkpoint(mine)
            if changed := [key for key, value in seen.items() if mine.get(key) is not value]:
                raise RuntimeError(f"{trial.name}: on_save_checkpoint changes {changed[0]!r}, all trials'; use the function sweep.")
            checkpoint[SAVED][trial.name] = {key: value for key, value in mine.items() if key not in seen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Hand each trial's module what it has added."""
        for trial in self.all_trials:
            trial.module.on_load_checkpoint({**checkpoint, **checkpoint.get(SAVED, {}).get(trial.name, {})})

    def adopt(self, trial: LiveTrial, module: LightningModule) -> None:
        """Make a copy of the user's module a trial's."""
        trial.module = module
        self.add_module(trial.key, module)
        module.trainer = trial.view  # type: ignore[assignment]

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            self.log(f"{trial.name}/{name}", value, *args, **kwargs)

        def optimizers(use_pl_optimizer: bool = True) -> Optimizer:
            return trial.optimizer

        def lr_schedulers() -> Any:
            found = [each.scheduler for each in trial.schedulers]
            return found[0] if len(found) == 1 else found or None

        vars(module).update(log=log, optimizers=optimizers, lr_schedulers=lr_schedulers)

    def release(self) -> None:
        """Make the trials' modules plain ones: another Trainer may test them, or predict."""
        for module in self.children():
            for name in ("log", "optimizers", "lr_schedulers"):
                del vars(module)[name]


@contextmanager
def _unchanged(batch: Any, trial: LiveTrial) -> Iterator[None]:
    """Within it, a step must not change its batch in place: the next trial would get the changed one."""
    versions = [(tensor, tensor._version) for tensor in _tensors(batch) if not tensor.is_inference()]
    yield
    if any(tensor._version != version for tensor, version in versions):
        raise RuntimeError(f"{trial.name}: a step changes a tensor of its batch in place, and all trials get it: clone it there.")


def _call(step: Callable[..., Any], *args: Any) -> Any:
    """Call a step with as many arguments as it takes: ``batch_idx`` and ``dataloader_idx`` may be left out."""
    taken = inspect.signature(step).parameters.values()
    if any(each.kind is each.VAR_POSITIONAL for each in taken):
        return step(*args)
    return step(*args[: len([each for each in taken if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)])])


def _fresh(batch: Any) -> Any:
    """Return a batch of new containers and the same tensors: what a step takes out of it, the next trial's step still has."""
    if isinstance(batch, MutableMapping):
        new = copy.copy(batch)
        for key, value in batch.items():
            new[key] = _fresh(value)
        return new
    if isinstance(batch, list) or type(batch) is tuple:
        return type(batch)(_fresh(each) for each in batch)
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for each in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(each)
