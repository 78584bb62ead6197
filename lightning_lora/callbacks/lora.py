"""``LoRACallback``: LoRA for any LightningModule, from ``Trainer(callbacks=[LoRACallback(LoRAConfig(...))])``.

It is thin: it calls the plain functions at the right hooks and leaves the strategy to :mod:`lightning_lora.strategies`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lora.callbacks.gradient_check import CURE, GradientCheck
from lightning_lora.callbacks.interruption import handle_interruptions
from lightning_lora.callbacks.refusals import check_apart, check_mergeable, frozen_parts, recordable
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import lora_layers
from lightning_lora.layers.state import Quantized
from lightning_lora.model.apply import already_applied, inject, let_gradients_in, trainable_parameters, unload_lora
from lightning_lora.model.compile import begin_step, compile_layers, keep_gradients, uncompile_layers
from lightning_lora.model.merge import merge_lora, merge_report, unmerge_for_now
from lightning_lora.model.quantize import quantize_base
from lightning_lora.model.targeting import TargetReport, find_targets
from lightning_lora.optim.groups import check_ratio
from lightning_lora.quantization.formats import quantizer_of
from lightning_lora.strategies import AdaptedPart, StrategyHooks, arrange, check_equal, check_supported, convert_base, synchronize
from lightning_lora.utils.names import adapter_root
from lightning_lora.utils.sharding import is_sharded


class LoRACallback(Callback):
    """Adapts the module in ``setup``, trains and checkpoints the adapter only, merges it in ``on_fit_end``.

    The module's own ``configure_optimizers``, schedulers, manual optimization and checkpoint callbacks work as before.
    Checkpoints hold everything but what is proved to be the unchanged base (:mod:`lightning_lora.strategies.changed_state`); resuming from
    one is step-exact, and so is an interrupted run (:mod:`lightning_lora.callbacks.interruption`). A call that is refused leaves the module
    as it was. Several of these callbacks, each with its ``module``, count side by side.

    Args:
        config: what to adapt; default ``LoRAConfig()``.
        module: name of the submodule to adapt and freeze, for a LightningModule with other parts that train as before;
            default: all of it.
        quantize: pack the base's linears, all but heads, before the adapters come, e.g. ``"nf4"``: QLoRA in one line. The formats
            are those of :func:`~lightning_lora.quantize_base`. A base that comes quantized needs none of it.
        merge_on_fit_end: merge after a completed ``fit``. Checkpoints stay adapters, and loading one (``test(ckpt_path=
            "best")``) or fitting again unmerges first. Default: yes, but with ``quantize`` only where ``merge_quantized`` says how.
        merge_quantized: how to merge into a quantized base, ``"dequantize"`` or ``"requantize"`` (see :func:`~lightning_lora.merge_lora`).
        check_base: refuse to resume from a checkpoint that was trained on another base.
        check_gradients: raise after 100 training batches, or at the end of fewer, if an adapter got no gradient in any. Switch it off
            for models that use parts of themselves less often than that.
        compile: "layer" compiles each of the model's repeated blocks in place, see
            :func:`~lightning_lora.model.compile.compile_layers`, until the run is over; prediction, which would compile anew for
            every token that it generates, runs as written.
        cuda_graphs: with ``compile="layer"``, record each compiled block as CUDA graphs, which takes the launching of kernels off the
            step: for batches of one size or few (each is recorded for itself), not for sharded models. In manual optimization gradients
            have to come by ``manual_backward``; what blocks give out has to be cloned if it is kept over batches.
        lora_plus_ratio: λ of LoRA+ (arXiv:2402.12354), how many times A's learning rate B gets, under any scheduler; the paper suggests 16.

    Attributes:
        report: what was matched, once ``setup`` has run; ``print`` it.
    """

    def __init__(
        self,
        config: LoRAConfig | None = None,
        *,
        module: str | None = None,
        merge_on_fit_end: bool | None = None,
        check_base: bool = True,
        check_gradients: bool = True,
        compile: Literal["layer"] | None = None,
        lora_plus_ratio: float = 1.0,
        quantize: str | None = None,
        merge_quantized: Quantized | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        if compile not in (None, "layer"):
            raise ValueError(f"compile={compile!r} is not known; it is None or 'layer'.")
        if cuda_graphs and compile is None:
            raise ValueError("cuda_graphs=True records compiled blocks: pass compile='layer' with it.")
        check_ratio(lora_plus_ratio)
        self.config = config or LoRAConfig()
        self.module = module
        if quantize is not None:
            quantizer_of(quantize)
        if merge_quantized not in (None, "dequantize", "requantize"):
            raise ValueError(f"merge_quantized={merge_quantized!r}: choose 'dequantize' or 'requantize'.")
        self.quantize, self.merge_quantized = quantize, merge_quantized
        self.merge_on_fit_end = quantize is None or merge_quantized is not None if merge_on_fit_end is None else merge_on_fit_end
        self.lora_plus_ratio = lora_plus_ratio
        self.check_base = check_base
        self.check_gradients = check_gradients
        self.compile, self.cuda_graphs = compile, cuda_graphs
        self._recorded = False
        self.report: TargetReport | None = None
        self._compiled: nn.Module | None = None
        self.part: AdaptedPart | None = None  # of the last setup
        self._gradients: GradientCheck | None = None
        self._compare = False
        self._undo = ExitStack()  # what takes the preparations back, until the run has begun

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Inject, freeze and explain; for a model built in ``configure_model``, right after that ran."""
        check_supported(trainer)
        others = handle_interruptions(trainer)
        check_apart(self.module, [c.module for c in others if isinstance(c, LoRACallback) and c is not self])
        if any(True for _ in pl_module.parameters()):
            self._adapt(trainer, pl_module).watch_configure_model()
            return
        original = pl_module.configure_model

        @functools.wraps(original)  # Lightning follows __wrapped__ to see that the user overrode the hook
        def configure_model() -> None:
            original()
            pl_module.__dict__.pop("configure_model", None)  # the hook has done its work; the module is the user's own again
            self._adapt(trainer, pl_module)

        pl_module.configure_model = configure_model  # type: ignore[method-assign]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ValueError if something that should train is in no optimizer."""
        held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        trained = {id(p) for p in self._target(pl_module).parameters() if p.requires_grad}
        forgotten = [name for name, p in pl_module.named_parameters() if id(p) in trained - held]
        if forgotten:
            raise ValueError(
                f"{len(forgotten)} parameters that should train are in no optimizer: {', '.join(forgotten[:4])}. Build the optimizer in"
                " configure_optimizers, from self.parameters() or get_lora_parameters(self), not in __init__."
            )
        for index, optimizer in enumerate(trainer.optimizers):
            if not any(group["params"] for group in optimizer.param_groups):
                raise ValueError(
                    f"optimizer {index} ({type(optimizer).__name__}) holds no parameter that trains: LoRA froze all of its own. Limit LoRA"
                    " to a part with LoRACallback(module=...), or name what it trains in modules_to_save."
                )
        let_gradients_in(pl_module)  # checkpointing may have been switched on after the adapters came
        self._gradients, self._compare = GradientCheck(self._target(pl_module)) if self.check_gradients else None, True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is frozen and stands here is what "changed" is measured by; adapters drop out though their base is in evaluation mode."""
        self._begun(pl_module)
        trainer.strategy._lora_hooks.state.start()  # type: ignore[attr-defined]
        asleep = [(name, layer) for name, layer in lora_layers(self._target(pl_module)) if layer.lora_dropout.p > 0 and not layer.training]
        for _, layer in asleep:
            layer.training = True  # not `train()`, which would wake what is inside
            layer.lora_dropout.train()
        if asleep:
            rank_zero_info(
                f"{asleep[0][0]} and {len(asleep) - 1} more adapted layers were in evaluation mode (as from_pretrained leaves a model), in"
                " which their adapters' dropout would do nothing: they are in training mode now, the rest of the model is as it was."
            )

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Raise RuntimeError, with the cure, where torch would only say that the loss has no gradient."""
        if self._gradients is not None and self._gradients.waiting and not loss.requires_grad:
            raise RuntimeError(f"the loss does not depend on any adapter. {CURE}")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note which adapters have a gradient."""
        if self._recorded:
            keep_gradients(pl_module.parameters())
        if self._gradients is not None:
            self._gradients.after_backward()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Raise RuntimeError after the first optimizer step if it left different adapters on different processes."""
        self._begin_step()
        if self._compare and trainer.global_step > 0:
            self._compare = False
            check_equal(pl_module)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Each batch is a step for recorded graphs."""
        self._begin_step()

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Each batch is a step for recorded graphs."""
        self._begin_step()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run has begun."""
        self._begun(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run has begun."""
        self._begun(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run has begun."""
        self._begun(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Raise RuntimeError, after enough batches, if an adapter got no gradient in any."""
        if self._gradients is not None:
            self._gradients.after_batch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise RuntimeError if an adapter got no gradient in all of a short training."""
        if self._gradients is not None:
            self._gradients.finish()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge layer by layer on the training device; a no-op with ``merge_on_fit_end=False``."""
        if not self.merge_on_fit_end:
            return
        target = self._target(pl_module)
        merge_lora(target, device=trainer.strategy.root_device, quantized=self.merge_quantized)
        lost = merge_report(target)
        worst = max(lost, key=lambda name: lost[name])
        rank_zero_info(f"LoRA merged into {len(lost)} modules; rounding lost at most {lost[worst]:.2%} of an update ({worst}).")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let compiled blocks run as written again."""
        if self._compiled is not None:
            uncompile_layers(self._compiled)
            self._compiled, self._recorded = None, False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning tears nothing down then. A run that was refused before it began leaves the module as it was."""
        if not any(is_sharded(p) for p in pl_module.parameters()) and not isinstance(trainer.strategy, FSDPStrategy):
            self._undo.close()
        self._begun(pl_module)
        self.teardown(trainer, pl_module, "")

    def _adapt(self, trainer: Trainer, pl_module: LightningModule) -> StrategyHooks:
        """Check everything, then change the module; if that fails, take it back."""
        target, fitting = self._target(pl_module), trainer.state.fn == TrainerFn.FITTING
        there = already_applied(target, self.config, merged_too=True)
        report = find_targets(target, self.config)  # a config that does not fit is refused before anything is packed
        if self.merge_on_fit_end and fitting:
            check_mergeable(target, report, trainer.strategy, self.quantize, self.merge_quantized)
        recorded = self.cuda_graphs and trainer.state.fn != TrainerFn.PREDICTING and recordable(trainer.strategy)
        self._begun(pl_module)
        with ExitStack() as undo:
            if fitting:
                undo.callback(self._unmerge(target))
            if self.compile and trainer.state.fn != TrainerFn.PREDICTING:
                compile_layers(target, cuda_graphs=recorded)
                undo.callback(self.teardown, trainer, pl_module, "")
                self._compiled, self._recorded = target, recorded
            if not there:
                undo.callback(_unfreeze, [(p, p.requires_grad) for p in pl_module.parameters()])
                convert_base(trainer, pl_module)
                if self.quantize is not None:
                    device, saved = trainer.strategy.root_device, self.config.modules_to_save
                    quantize_base(target, self.quantize, modules_to_save=saved, device=device)
                self.report = report = find_targets(target, self.config)
                stays = frozen_parts(target, report, self.config, whole=self.module is None)
                inject(target, self.config, report)
                undo.callback(unload_lora, target)
                synchronize(pl_module)
                trainable, total = trainable_parameters(pl_module)
                rest = f"\nfrozen, without an adapter: {stays}" if stays else ""
                rank_zero_info(f"{report}{rest}\ntrainable {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
            arrange(trainer.strategy, pl_module)
            root = ".".join(filter(None, (self.module, adapter_root(target)[0])))
            self.part = AdaptedPart(root, self.config, self.check_base, self.lora_plus_ratio)
            hooks = StrategyHooks.of(trainer.strategy, pl_module)
            undo.callback(hooks.drop, root, forget=not there)
            hooks.add(self.part, training=fitting, new=not there)
            for _, layer in lora_layers(target):
                layer.lora_base_again = True
            self._undo = undo.pop_all()
        return hooks

    def _unmerge(self, target: nn.Module) -> Callable[[], None]:
        """Make the module ready to be trained on; what is returned takes that back."""
        return unmerge_for_now(target)

    def _begun(self, pl_module: LightningModule) -> None:
        """There is no way back to how the module was before the run."""
        self._undo.pop_all()
        for _, layer in lora_layers(pl_module):
            layer.__dict__.pop("lora_base_again", None)

    def _begin_step(self) -> None:
        if self._recorded:
            begin_step()

    def _target(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.module or "")
        except AttributeError as error:
            children = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(
                f"module={self.module!r} is no submodule of {type(pl_module).__name__}; its children are {children}."
            ) from error


def _unfreeze(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        if not is_lazy(parameter):
            parameter.requires_grad_(flag)
