"""What a training is watched for: adapters without a gradient, values that are not finite, processes that differ, a base that trains."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_lora.callbacks.copy_check import CopyCheck
from lightning_lora.callbacks.gradient_check import BATCHES, CURE, GradientCheck
from lightning_lora.callbacks.out_of_memory import advise as advise_memory
from lightning_lora.callbacks.refusals import check_base_frozen
from lightning_lora.strategies import FiniteCheck
from lightning_lora.strategies.equal_ranks import check_equal


class Watch:
    """The checks of one training.

    Args:
        trainer: before its first step.
        module: the LightningModule.
        target: the adapted part of it.
        gradients: raise RuntimeError if an adapter gets no gradient.
        finite: raise RuntimeError if what trains turns NaN or infinite.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, target: nn.Module, *, gradients: bool, finite: bool) -> None:
        self.trainer, self.module = trainer, module
        every = trainer.log_every_n_steps or BATCHES  # type: ignore[attr-defined]
        self._gradients = GradientCheck(target) if gradients else None
        self._finite = FiniteCheck(trainer.strategy, module, every) if finite else None
        self.copies = CopyCheck(module)
        self._compare = True
        self._target, self._held = target, self._count()
        self._began = trainer.global_step  # not 0 in a second fit of one Trainer

    def before_batch(self) -> None:
        """Compare the adapters of all processes, once, after the first optimizer step. Look at what optimizers got since the last batch.

        Raises:
            ValueError: one got a weight that has an adapter.
        """
        self.copies.before_batch()
        if (held := self._count()) != self._held:
            self._held = held
            check_base_frozen(self.trainer.optimizers, self._target)
        if self._compare and self.trainer.global_step > 0:
            self._compare = False
            check_equal(self.module)

    def _count(self) -> int:
        return sum(len(group["params"]) for optimizer in self.trainer.optimizers for group in optimizer.param_groups)

    def before_backward(self, loss: Tensor) -> None:
        """Raise RuntimeError if the loss depends on no adapter."""
        if self._gradients is not None and self._gradients.waiting and not loss.requires_grad:
            raise RuntimeError(f"the loss does not depend on any adapter. {CURE}")

    def after_backward(self) -> None:
        """Record which adapters have a gradient."""
        if self._gradients is not None:
            self._gradients.after_backward()

    def after_batch(self) -> None:
        """Count the batch. Raise RuntimeError if it is time for a check, and that fails."""
        for check in (self._gradients, self._finite, self.copies):
            if check is not None:
                check.after_batch()

    def warn_of_no_step(self) -> None:
        """Warn if a whole fit has made no optimizer step: what is merged and saved is the adapter that it began with."""
        mocked = not any(optimizer.param_groups for optimizer in self.trainer.optimizers)  # Lightning counts the steps of none too
        if mocked or self.trainer.global_step == (0 if self.trainer.ckpt_path else self._began):
            rank_zero_warn(
                "fit ended without a step of an optimizer that the Trainer has, so it trained no adapter. Is the training loader empty,"
                " limit_train_batches or max_steps 0, max_epochs reached by an earlier fit of this Trainer, or does configure_optimizers"
                " return None?"
            )

    def finish(self) -> None:
        """Raise RuntimeError if a check fails at the end of training. Mark what training moved, for adapter folders."""
        for check in (self._gradients, self._finite, self.copies):
            if check is not None:
                check.finish()
        self.trainer.strategy._lora_hooks.state.bring()  # type: ignore[attr-defined]


def advise(exception: BaseException, watch: Watch | None) -> None:
    """Append what to do to an exception of a run: if memory is out, and if it may be of a copy without adapters."""
    advise_memory(exception)
    if watch is not None:
        watch.copies.advise(exception)
