"""``AdaLoRACallback``: find the ranks during training, with ``Trainer(callbacks=[AdaLoRACallback(LoRAConfig(...))])``.

It calls :class:`~lightning_lora.variants.rank_allocation.RankAllocator` at two moments of each step:

- ``on_before_optimizer_step`` adds the regularizer's gradient to the gradients. At that moment they are complete, averaged over
  processes, unscaled and not yet clipped.
- A hook that the optimizer calls right after its step updates the scores and the mask. It runs before anything zeroes the gradients or
  saves a checkpoint. It works in automatic and manual optimization, and leaves out steps that a loss scaler skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_lora.callbacks.lora import LoRACallback
from lightning_lora.config import LoRAConfig, checked_config
from lightning_lora.layers.base import LoRALayer, lora_layers
from lightning_lora.model.merge import unmerge_layers
from lightning_lora.utils.gradient_reducer import hand_over
from lightning_lora.utils.messages import counted
from lightning_lora.utils.sharding import is_sharded
from lightning_lora.utils.torch_private import unscales_itself
from lightning_lora.variants import shrink_adalora
from lightning_lora.variants.rank_allocation import RankAllocator, steps_of


class AdaLoRACallback(LoRACallback):
    """:class:`LoRACallback` with AdaLoRA (arXiv:2303.10512): starts at ``init_rank`` and prunes to ``target_rank`` on average.

    The schedule is as long as the trainer's run. At the end of ``fit``, before a merge, the adapters become plain LoRA of the ranks that
    were found. Under strategies that shard adapters they keep their size. Then load a checkpoint on one process and call
    :func:`~lightning_lora.shrink_adalora`. Checkpoints hold AdaLoRA in its training form. A resumed run is exact to the step.

    Args:
        config: what to adapt; this class sets its ``rank`` and ``variant``.
        target_rank: average rank at the end; the budget is ``target_rank`` times the number of adapted modules.
        init_rank: rank of each module at the start.
        tinit: optimizer steps before pruning begins, or a share of all steps.
        tfinal: optimizer steps at the end in which the ranks stay fixed, or a share of all steps.
        deltaT: optimizer steps from one choice of the ranks to the next.
        beta1: smoothing of the sensitivity.
        beta2: smoothing of the sensitivity's uncertainty.
        orth_reg_weight: γ, weight of the orthogonality regularizer that is added to the loss.
        total_steps: optimizer steps of the schedule; default: the trainer's. Set it for several optimizer steps per batch, for endless
            training, or for a run that continues after the end of its schedule.
        **kwargs: as in :class:`LoRACallback`. ``lora_plus_ratio`` scales B's learning rate here too, as in PEFT. But LoRA+ was derived
            for a B that starts at zero, and here E starts at zero: compare with a ratio of 1.

    Attributes:
        allocator: scores, budget and mask; set when fit starts.
        ranks: module name → rank that was found, 0 if all was pruned; set when fit ends.

    Raises:
        ValueError: an argument is out of range; or, when fit starts, the schedule does not fit the run.

    Examples:
        >>> callback = AdaLoRACallback(init_rank=4, target_rank=2, tinit=0, tfinal=1)
        >>> L.Trainer(max_epochs=1, callbacks=[callback]).fit(MyModule())
        >>> sum(callback.ranks.values()) == 2 * len(callback.ranks)
        True
    """

    def __init__(
        self,
        config: LoRAConfig | None = None,
        *,
        target_rank: int = 8,
        init_rank: int = 12,
        tinit: int | float = 0.1,
        tfinal: int | float = 0.3,
        deltaT: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orth_reg_weight: float = 0.1,
        total_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        config = checked_config(config)
        if config.variant not in ("plain", "adalora"):
            raise ValueError(f"variant={config.variant!r} and AdaLoRACallback exclude each other; leave variant out, or use LoRACallback.")
        if config.rank not in (LoRAConfig().rank, init_rank):
            raise ValueError(f"rank={config.rank} and init_rank={init_rank} differ: leave rank out and give the start rank as init_rank.")
        for name, value in (("target_rank", target_rank), ("deltaT", deltaT), ("total_steps", total_steps)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r}: give a whole number ≥ 1.")
        if target_rank >= init_rank and not config.rank_pattern:
            raise ValueError(f"target_rank={target_rank} is not below init_rank={init_rank}: there would be nothing to prune.")
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 < beta < 1:
                raise ValueError(f"{name}={beta!r}: give a number between 0 and 1, such as 0.85.")
        if not 0 <= orth_reg_weight < float("inf"):
            raise ValueError(f"orth_reg_weight={orth_reg_weight!r}: give a finite number ≥ 0; 0 leaves the regularizer out.")
        for name, steps in (("tinit", tinit), ("tfinal", tfinal)):
            steps_of(name, steps, 1)
        super().__init__(replace(config, rank=init_rank, variant="adalora"), **kwargs)
        self.trained_config = self.config  # after shrinking, `config` describes the plain LoRA that the adapters became
        self.target_rank, self.total_steps = target_rank, total_steps
        self.tinit, self.tfinal, self.deltaT = tinit, tfinal, deltaT
        self.beta1, self.beta2, self.orth_reg_weight = beta1, beta2, orth_reg_weight
        self.allocator: RankAllocator | None = None
        self.ranks: dict[str, int] = {}
        self._saved: dict[str, Any] | None = None
        self._full: list[tuple[LoRALayer, type, dict[str, nn.Parameter], int]] = []  # the layers before they shrank
        self._optimizer: Optimizer | None = None
        self._hook: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adapt as :class:`LoRACallback` does. Restore the full size of adapters before they train again or load a checkpoint."""
        if stage == "fit":
            self._saved = None  # it may come from a checkpoint that was only tested
        super().setup(trainer, pl_module, stage)
        part = self.part
        if self._full and part is not None:

            def before_load(config: LoRAConfig) -> None:
                if config.variant == self.trained_config.variant:
                    self._grow(pl_module)
                    part.config = self.config

            part.before_load = before_load

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan the schedule.

        Raises:
            ValueError: its length is unknown or leaves no steps to prune in; or the adapters are in no optimizer, or in several.
        """
        super().on_fit_start(trainer, pl_module)
        self.trained_config = self.config  # that of the adapter, if the run starts from one
        # Without batches Lightning reads no data and estimates -1 steps.
        total = self.total_steps or (trainer.estimated_stepping_batches if trainer.limit_train_batches else 0)
        if not total:
            raise ValueError(
                f"the trainer will take no optimizer step (max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps},"
                f" limit_train_batches={trainer.limit_train_batches}), so AdaLoRA has no steps to prune in: let it train."
            )
        if not 0 < total < float("inf"):
            raise ValueError(
                f"the trainer does not know how many optimizer steps it will take (max_epochs={trainer.max_epochs},"
                f" max_steps={trainer.max_steps}). AdaLoRA's schedule needs the number: set max_steps or AdaLoRACallback(total_steps=...)."
            )
        total, earlier = int(total), self.allocator
        self.allocator = RankAllocator(
            self._target(pl_module),
            target_rank=self.target_rank,
            total_steps=total,
            tinit=steps_of("tinit", self.tinit, total),
            tfinal=steps_of("tfinal", self.tfinal, total),
            deltaT=self.deltaT,
            beta1=self.beta1,
            beta2=self.beta2,
            orth_reg_weight=self.orth_reg_weight,
        )
        if earlier is not None and self._saved is None and earlier.layers == self.allocator.layers:
            self._saved = earlier.state_dict()  # a second fit of the same module continues the first
        parameters = {id(layer.lora_E) for layer in self.allocator.layers.values()}
        holders = [o for o in trainer.optimizers if parameters & {id(p) for group in o.param_groups for p in group["params"]}]
        if len(holders) != 1:
            raise ValueError(f"{len(holders)} optimizers hold lora_E: AdaLoRA scores all layers after one step, so use one for them all.")
        self._optimizer = holders[0]
        self._hook = self._optimizer.register_step_post_hook(self._after_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the allocator's state from the checkpoint, after everything else is loaded."""
        super().on_train_start(trainer, pl_module)
        assert self.allocator is not None
        if self._saved is not None:
            self.allocator.load_state_dict(self._saved)
            self._saved = None
        elif trainer.global_step > 0:
            raise ValueError(
                "the checkpoint holds no state of AdaLoRACallback, so its schedule cannot be resumed: load its weights and start a new run."
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the regularizer's gradient."""
        if self.allocator is not None and optimizer is self._optimizer:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            still_scaled = scaler is not None and unscales_itself(optimizer)
            self.allocator.regularize(scaler.get_scale() if still_scaled else 1.0)  # type: ignore[union-attr]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the optimizer's hook, and warn if the run ended before the schedule did."""
        super().on_train_end(trainer, pl_module)
        allocator = self.allocator
        assert allocator is not None
        self._hook.remove()
        self._optimizer = None
        if allocator.step < allocator.prunes_until:
            rank_zero_warn(
                f"fit ended after {allocator.step} optimizer steps, but AdaLoRA's schedule prunes until step {allocator.prunes_until}: the"
                f" ranks are those of the last step, not target_rank={self.target_rank} on average."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shrink the adapters to the ranks that were found, then merge as :class:`LoRACallback` does."""
        target = self._target(pl_module)
        layers = [layer for _, layer in lora_layers(target) if layer.low_rank]
        if any(is_sharded(layer.lora_A) for layer in layers):
            rank_zero_info(
                "AdaLoRA: the adapters are sharded and keep their size; load a checkpoint on one process and call shrink_adalora there."
            )
        else:
            full = [(layer, type(layer), layer.lora_parameters(), layer.rank) for layer in layers]
            self.ranks = shrink_adalora(target)
            self._full, self.config = full, layers[0].lora_config
            assert self.part is not None
            self.part.config = self.config  # later checkpoints hold plain LoRA
            rank_zero_info(self._report())
        super().on_fit_end(trainer, pl_module)

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints. It has the module's name, because several callbacks need different keys."""
        return super().state_key if self.module is None else f"{super().state_key}{ {'module': self.module} }"

    def state_dict(self) -> dict[str, Any]:
        """Return step, mask and scores for a checkpoint.

        Raises:
            ValueError: the adapters were shrunk, and no optimizer has state of them.
        """
        if self.allocator is None:
            return {}
        if self.allocator.layers.keys() & self.ranks.keys() and self._shrank(nn.ModuleList(self.allocator.layers.values())):
            raise ValueError(
                "when fit ended AdaLoRA shrank the adapters to the ranks it found, so the optimizer's state is of others and cannot be"
                " saved: use trainer.save_checkpoint(path, weights_only=True) or save_adapter(model, folder). The checkpoints that were"
                " written during fit can be resumed."
            )
        return self.allocator.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until fit starts."""
        self._saved = state_dict or None

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Update scores and mask, as the optimizer's hook.

        Under a loss scaler, fused optimizers unscale the gradients and skip bad steps themselves. ``found_inf`` says if they did.
        """
        bad = getattr(optimizer, "found_inf", None)
        if self.allocator is not None and not (isinstance(bad, torch.Tensor) and bad.item()):
            self.allocator.after_step()

    def _restoring(self, target: nn.Module) -> Callable[[], None]:
        """Return a function that shrinks and merges again what is shrunk and merged now."""
        merge, full, config, shrunk = super()._restoring(target), self._full, self.config, self._shrank(target)

        def restore() -> None:
            if shrunk and not self._full:
                shrink_adalora(target)
            self._full, self.config = full, config
            merge()

        return restore

    def _unmerge(self, target: nn.Module) -> None:
        """Unmerge, and restore the full size of shrunk adapters."""
        super()._unmerge(target)
        self._grow(target)

    def _shrank(self, module: nn.Module) -> bool:
        """True if this is the module that was shrunk. The adapters of another module stay as they are."""
        mine = {id(layer) for _, layer in lora_layers(module)}
        return bool(self._full) and all(id(layer) in mine for layer, *_ in self._full)

    def _grow(self, pl_module: nn.Module) -> None:
        """Revert the shrinking if this is the module that was shrunk."""
        if self._shrank(pl_module):
            unmerge_layers(pl_module)
            for layer, cls, parameters, rank in self._full:
                layer.__class__ = cls
                hand_over(layer.lora_parameters().values(), parameters.values())
                layer._parameters.update(parameters)
                layer.lora_state.spec = replace(layer.spec, config=self.trained_config, rank=rank)
        if self._full:
            self._full, self.config = [], self.trained_config

    def _report(self) -> str:
        found = list(self.ranks.values())
        gone = [name for name, rank in self.ranks.items() if rank == 0]
        lost = f" Pruned completely, kept at rank 1 with B zero: {', '.join(gone)}." if gone else ""
        return (
            f"AdaLoRA: {counted(len(found), 'module')} from rank {self.trained_config.rank} to {sum(found) / len(found):.2f} on average"
            f" ({min(found)} to {max(found)}).{lost}"
        )
