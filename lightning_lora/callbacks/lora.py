"""``LoRACallback``: it only calls plain functions in the right hooks. What the strategy does is in :mod:`lightning_lora.strategies`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_lora.callbacks.block_modes import BlockModes
from lightning_lora.callbacks.changed_ranks import config_to_adapt, follow_checkpoints
from lightning_lora.callbacks.companions import add_companions
from lightning_lora.callbacks.data_start import read_data
from lightning_lora.callbacks.dropout import wake_and_log
from lightning_lora.callbacks.late_models import when_built
from lightning_lora.callbacks.late_weights import load_or_defer
from lightning_lora.callbacks.merging import check_callbacks, check_mergeable, merge_and_log
from lightning_lora.callbacks.processes import begin_together
from lightning_lora.callbacks.refusals import check_apart, check_arguments, check_fit, check_precondition, frozen_parts, listed, submodule
from lightning_lora.callbacks.start_report import log_start
from lightning_lora.callbacks.starting import Start, adapted_part, log_beginning, see_others
from lightning_lora.callbacks.sweep_option import Sweep
from lightning_lora.callbacks.watch import Watch, advise
from lightning_lora.config import LoRAConfig, checked_config
from lightning_lora.layers.base import lora_layers
from lightning_lora.layers.state import Quantized
from lightning_lora.model.apply import already_applied, inject, let_gradients_in, unload_lora
from lightning_lora.model.guards import guard
from lightning_lora.model.merge import remerging, unmerge_layers
from lightning_lora.model.modes import restore_flags
from lightning_lora.model.quantize import before_quantizing, quantize_reversibly
from lightning_lora.model.targeting import TargetReport, find_targets
from lightning_lora.model.weights import Weights
from lightning_lora.strategies import AdaptedPart, RollCall, StrategyHooks
from lightning_lora.strategies.equal_ranks import synchronize
from lightning_lora.strategies.namespaces import twins
from lightning_lora.strategies.support import arrange, check_supported, convert_base
from lightning_lora.utils.sharding import is_sharded


class LoRACallback(Callback):
    """Adapts the module in ``setup``, trains and checkpoints the adapter only, merges it in ``on_fit_end``.

    The module's own ``configure_optimizers``, schedulers, manual optimization and checkpoint callbacks work as before.
    Checkpoints leave out only what is proved to be the unchanged base (:mod:`lightning_lora.strategies.changed_state`). A resumed run is
    exact to the step, also after an interruption (:mod:`lightning_lora.callbacks.interruption`). A refused call leaves the module
    unchanged. Several callbacks may adapt separate parts, each with its ``module``.

    Args:
        config: what to adapt; default ``LoRAConfig()``.
        module: name of the submodule to adapt and freeze; default: the whole LightningModule. Other parts then train as before.
        quantize: format to quantize the base to before it is adapted: ``"nf4"`` (QLoRA) or ``"fp8"``, experts too, or one for linears
            alone; see :func:`~lightning_lora.quantize_base`. Heads stay as they are. A base that was loaded quantized does not need it.
        merge_on_fit_end: merge after a completed ``fit``. Checkpoints hold the adapter all the same; loading one or fitting again
            unmerges first. Default: True; with ``quantize``, only if ``merge_quantized`` is given.
        merge_quantized: how to merge into a quantized base, ``"dequantize"`` or ``"requantize"`` (see :func:`~lightning_lora.merge_lora`).
        merge_max_lost: the largest share of an update that rounding may lose in the merge. If a layer loses more, ``fit`` ends in a
            ValueError, unmerged, after the last checkpoint. Default: no limit.
        check_base: refuse to resume from a checkpoint that was trained on another base.
        check_gradients: raise if an adapter got no gradient in 100 training batches, or in all of a shorter training; False if some layers
            are used less often.
        allow_nonfinite: train on when a parameter turns NaN or infinite. Default: training stops, and nothing with such values is saved or
            loaded. What trains is looked at before each save, at the end, and every ``log_every_n_steps`` batches.
        compile: "layer" compiles each repeated block in place until the run ends (:func:`~lightning_lora.compile_layers`). Prediction runs
            uncompiled: generation would compile again for every token.
        cuda_graphs: with ``compile="layer"``, record each compiled block as CUDA graphs, so that a step launches no kernels one by one.
            Use it for batches of one or few sizes, since each size is recorded separately. Sharded models are refused. Manual optimization
            must call ``manual_backward``. Clone the outputs of blocks that you keep across batches.
        offload: "activations" keeps what gradient checkpointing saves in host memory, for long rows; "frozen" the blocks' frozen weights,
            on one device; or both (:func:`~lightning_lora.offload_activations`, :func:`~lightning_lora.offload_frozen`).
        checkpointing: compute the blocks' activations again in the backward pass: "full", all of them; "selective", all but attention's
            results; see :func:`~lightning_lora.checkpoint_layers`. The model's own gradient checkpointing must be off.
        lora_plus_ratio: λ of LoRA+ (arXiv:2402.12354): B's learning rate divided by A's, under any scheduler. The paper suggests 16.
        precondition: "riemannian" (arXiv:2402.02347) or "lora_fa" (the second version of LoRA-FA, with ``variant="lora_fa"``): the
            optimizers get preconditioned gradients; see :func:`~lightning_lora.apply_preconditioner`.
        start_from: an adapter folder or a checkpoint, whose adapter is trained further from step 0, by a new optimizer.
            (``fit(ckpt_path=)`` resumes a run.) Its config counts: leave out what it says, or say the same.
        init_batches: number of training batches, on each process, that an init that computes A and B from data reads before the run.
        weights: where the base of a module on the meta device comes from, once it is sharded; see :func:`~lightning_lora.load_base`.
        sweep: train several adapters side by side over one base, each with its own settings: :class:`~lightning_lora.Trials`.
        tune_loop: let the progress bar read its values twice a second, not in every step (:mod:`lightning_lora.callbacks.shown_values`).

    Attributes:
        report: what the config matched; set by ``setup``. ``print`` it.

    Examples:
        >>> callback = LoRACallback(LoRAConfig(rank=4, target_modules="all-linear"))
        >>> L.Trainer(max_epochs=1, callbacks=[callback]).fit(MyModule())
    """

    def __init__(
        self,
        config: LoRAConfig | None = None,
        *,
        module: str | None = None,
        merge_on_fit_end: bool | None = None,
        check_base: bool = True,
        check_gradients: bool = True,
        allow_nonfinite: bool = False,
        compile: Literal["layer"] | None = None,
        lora_plus_ratio: float = 1.0,
        quantize: str | None = None,
        merge_quantized: Quantized | None = None,
        cuda_graphs: bool = False,
        merge_max_lost: float | None = None,
        start_from: str | Path | None = None,
        offload: Literal["activations", "frozen"] | list[Literal["activations", "frozen"]] | None = None,
        tune_loop: bool = True,
        checkpointing: Literal["full", "selective"] | None = None,
        precondition: Literal["riemannian", "lora_fa"] | None = None,
        init_batches: int = 8,
        weights: str | Path | Weights | None = None,
        sweep: Sweep | None = None,
    ) -> None:
        check_arguments(locals())
        see_others()
        self.config, self.module = checked_config(config), module
        self.start_from = None if start_from is None else str(start_from)
        self._start = None if self.start_from is None else Start(self.start_from)
        self.quantize, self.merge_quantized = quantize, merge_quantized
        self.merge_on_fit_end = quantize is None or merge_quantized is not None if merge_on_fit_end is None else merge_on_fit_end
        self.lora_plus_ratio, self.merge_max_lost, self.tune_loop = lora_plus_ratio, merge_max_lost, tune_loop
        self.precondition, self.init_batches, self.weights, self.sweep = precondition, init_batches, weights, sweep
        self.check_base, self.check_gradients, self.allow_nonfinite = check_base, check_gradients, allow_nonfinite
        self.compile, self.cuda_graphs, self.offload, self.checkpointing = compile, cuda_graphs, offload, checkpointing
        self.report: TargetReport | None = None
        self.began: LoRAConfig | None = None  # the config before ranks changed in a run; None if they did not
        self._modes = BlockModes(compiled=compile is not None, recorded=cuda_graphs, checkpointing=checkpointing, offloaded=listed(offload))
        self.part: AdaptedPart | None = None  # of the last setup
        self._watch: Watch | None = None
        self._roll_call: RollCall | None = None  # of a run on several processes
        self._undo = ExitStack()  # reverts the preparations, until the run has begun

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings and the report. What belongs to a run stays out of copies and pickles: some of it cannot be copied."""
        of_a_run = {"_undo": ExitStack(), "_modes": self._modes.unused()}
        return vars(self) | of_a_run | dict.fromkeys(("_watch", "_roll_call", "part"))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Inject, freeze and report. A model that is built in its ``setup`` or ``configure_model`` is adapted right after that."""
        if self.sweep is not None:
            return self.sweep.begin(self, trainer, pl_module)
        mine = [c for c in add_companions(trainer, temporary=True, tune_loop=self.tune_loop) if isinstance(c, LoRACallback)]
        self._roll_call = begin_together(self.config, vars(self), mine[0] is self, trainer)
        check_supported(trainer)
        check_apart(self.module, [c.module for c in mine if c is not self])
        if any(True for _ in pl_module.parameters()):
            self._adapt(trainer, pl_module).watch_configure_model()
            return
        self._undo.callback(when_built(pl_module, partial(self._adapt, trainer, pl_module)))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ValueError if an optimizer lacks a parameter that should train, or has none, or if no checkpoint can be written."""
        check_fit(trainer, pl_module, self._target(pl_module), self.part)
        let_gradients_in(pl_module)  # gradient checkpointing may have been enabled after the injection
        self._watch = Watch(trainer, pl_module, self._target(pl_module), gradients=self.check_gradients, finite=not self.allow_nonfinite)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the frozen values as the reference for changes. Switch on the adapters' dropout where the base is in evaluation mode."""
        self._begun(pl_module)
        trainer.strategy._lora_hooks.state.start()  # type: ignore[attr-defined]
        log_beginning(trainer, self._target(pl_module), self.start_from)
        wake_and_log(self._target(pl_module))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Raise RuntimeError with the fix if the loss depends on no adapter. torch would only say that it has no gradient."""
        if self._watch is not None:
            self._watch.before_backward(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record which adapters have a gradient."""
        self._modes.after_backward(pl_module)
        if self._watch is not None:
            self._watch.after_backward()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Raise RuntimeError after the first optimizer step if the adapters differ between processes."""
        self._modes.before_batch()
        if self._watch is not None:
            self._watch.before_batch()

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Mark each batch as a step for recorded CUDA graphs."""
        self._modes.before_batch()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the run has begun: from now on the module is not restored."""
        self._begun(pl_module)

    # Other stages begin in the same way. In training, `on_train_batch_start` and `on_train_start` do more.
    on_validation_batch_start = on_test_batch_start
    on_validation_start = on_predict_start = on_test_start

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Raise RuntimeError if an adapter got no gradient in any of enough batches."""
        self._modes.after_batch()
        if self._watch is not None:
            self._watch.after_batch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise RuntimeError if an adapter got no gradient in a whole short training."""
        if self._watch is not None:
            self._watch.finish()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge layer by layer on the training device, unless ``merge_on_fit_end=False``."""
        if self._watch is not None:
            self._watch.warn_of_no_step()
        if not self.merge_on_fit_end:
            return
        self._modes.before_merge()
        merge_and_log(self._target(pl_module), trainer.strategy.root_device, self.merge_quantized, self.merge_max_lost)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Switch off the modes of the blocks."""
        if self._roll_call is not None:
            self._roll_call.close()
        self._modes.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the module if the run was refused before it began. Tear down, because Lightning does not. Advise if memory is out."""
        advise(exception, self._watch)
        if self._roll_call is not None:
            self._roll_call.answer(exception)
        if not any(is_sharded(p) for p in pl_module.parameters()) and not isinstance(trainer.strategy, twins(FSDPStrategy)):
            self._undo.close()
        self._begun(pl_module)
        self.teardown(trainer, pl_module, "")

    def _adapt(self, trainer: Trainer, pl_module: LightningModule) -> StrategyHooks:
        """Check everything, then change the module. Revert the changes if one of them fails."""
        target, fitting = self._target(pl_module), trainer.state.fn == TrainerFn.FITTING
        self.config = config = config_to_adapt(self, trainer, target)
        there = already_applied(target, self.config, merged_too=True)
        report = find_targets(target, before_quantizing(self.config) if self.quantize and not there else self.config)
        if self.merge_on_fit_end and fitting:
            check_mergeable(target, report, trainer.strategy, self.quantize, self.merge_quantized)
        if fitting:
            check_callbacks(pl_module, report, trainer.callbacks, self.merge_on_fit_end)  # type: ignore[attr-defined]
        self._begun(pl_module)
        with ExitStack() as undo:
            undo.callback(self._restoring(target))  # tests load checkpoints too, which unmerges
            if fitting:
                self._unmerge(target)
            undo.callback(self._modes.end)
            self._modes.begin(target, trainer)
            if not there:
                undo.callback(restore_flags, [(p, p.requires_grad) for p in pl_module.parameters()])
                replaced = convert_base(trainer, pl_module) or self.quantize is not None
                if self.quantize is not None:
                    saved, device = self.config.modules_to_save, trainer.strategy.root_device
                    undo.callback(quantize_reversibly(target, self.quantize, modules_to_save=saved, device=device, lora=self.config))
                same = self.config is config and not replaced  # AdaLoRA's config is another after a fit that shrank it
                self.report = report = report if same else find_targets(target, self.config)
                stays = frozen_parts(target, report, self.config, whole=self.module is None)
                undo.callback(unload_lora, inject(target, self.config, report))
                undo.callback(guard(pl_module))  # a model around `module` loses the adapters in a file as well
            load = load_or_defer(self, trainer, pl_module)
            if not there:
                synchronize(pl_module)
                log_start(report, pl_module, stays, fitting and bool(trainer.checkpoint_callbacks))
            if self._start is not None:
                self._start.load(target, undo, self.check_base, self.allow_nonfinite)
            check_precondition(target, self.precondition, trainer.strategy)
            self._modes.begin_adapted(target, trainer)
            undo.callback(arrange(trainer.strategy, pl_module))
            self.part = follow_checkpoints(self, adapted_part(self, target), target)
            self.part.before_setup, self.part.after_setup = partial(read_data, self, trainer, pl_module), load
            hooks = StrategyHooks.of(trainer.strategy, pl_module)
            undo.callback(hooks.drop, self.part.root, forget=not there)
            hooks.add(self.part, training=fitting, new=not there)
            for _, layer in lora_layers(target):
                layer.lora_base_again = True
            self._undo = undo.pop_all()
        return hooks

    def _restoring(self, target: nn.Module) -> Callable[[], None]:
        """Return a function that merges again what is merged now and is not merged then."""
        return remerging(target)

    def _unmerge(self, target: nn.Module) -> None:
        unmerge_layers(target)

    def _begun(self, pl_module: LightningModule) -> None:
        """Drop the undo record: once a run has begun, the module is not restored to its state before the run."""
        self._undo.pop_all()
        for _, layer in lora_layers(pl_module):
            layer.__dict__.pop("lora_base_again", None)

    def _target(self, pl_module: LightningModule) -> nn.Module:
        return submodule(pl_module, self.module)
