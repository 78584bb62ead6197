"""``LoRACallback``: LoRA for any LightningModule, from ``Trainer(callbacks=[LoRACallback(LoRAConfig(...))])``.

It is thin: it calls the plain functions at the right hooks and leaves the strategy to :mod:`lightning_lora.strategies`.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import lora_layers
from lightning_lora.layers.state import Quantized
from lightning_lora.model.apply import already_applied, inject, let_gradients_in, trainable_parameters
from lightning_lora.model.compile import begin_step, compile_layers, keep_gradients, uncompile_layers
from lightning_lora.model.heads import left_frozen
from lightning_lora.model.merge import merge_lora, merge_report, tied_weights, unmerge_lora
from lightning_lora.model.quantize import quantize_base
from lightning_lora.model.targeting import TargetReport, find_targets
from lightning_lora.optim.groups import check_ratio
from lightning_lora.quantization.formats import format_of, quantizer_of
from lightning_lora.strategies import StrategyHooks, arrange, check_equal, check_supported, convert_base, synchronize
from lightning_lora.utils.names import adapter_root

_CURE = (
    "Either the forward pass does not go through these layers (target others), or re-entrant gradient checkpointing cut the graph (pass"
    " use_reentrant=False, or call model.enable_input_require_grads()). If they are used only now and then, pass"
    " LoRACallback(check_gradients=False)."
)


class LoRACallback(Callback):
    """Adapts the module in ``setup``, trains and checkpoints the adapter only, merges it in ``on_fit_end``.

    The module's own ``configure_optimizers``, schedulers, manual optimization and checkpoint callbacks work as before.
    Checkpoints hold what trains and the buffers that moved (BatchNorm); resuming from one is step-exact.

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
        check_gradients: raise after the first training batch if an adapter got no gradient in it. Switch it off for models
            that use parts of themselves only now and then.
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
        self._hooks: StrategyHooks | None = None  # of the last setup
        self._waiting: dict[str, nn.Parameter] = {}
        self._backward_ran = self._compare = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Inject, freeze and explain; for a model built in ``configure_model``, right after that ran."""
        check_supported(trainer)
        if stage == "fit":
            unmerge_lora(pl_module)
        if any(True for _ in pl_module.parameters()):
            self._adapt(trainer, pl_module)
            return
        original = pl_module.configure_model

        @functools.wraps(original)  # Lightning follows __wrapped__ to see that the user overrode the hook
        def configure_model() -> None:
            original()
            del pl_module.configure_model  # the hook has done its work; the module is the user's own again
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
        adapters = {f"{name}.{part}": p for name, layer in lora_layers(pl_module) for part, p in layer.lora_parameters().items()}
        self._waiting = {name: p for name, p in adapters.items() if p.requires_grad}
        self._backward_ran, self._compare = False, True

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Raise RuntimeError, with the cure, where torch would only say that the loss has no gradient."""
        if self._waiting and not loss.requires_grad:
            raise RuntimeError(f"the loss does not depend on any adapter. {_CURE}")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note which adapters have a gradient."""
        if self._recorded:
            keep_gradients(pl_module.parameters())
        if self._waiting:
            self._backward_ran = True
            self._waiting = {name: p for name, p in self._waiting.items() if p.grad is None}

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

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Raise RuntimeError after the first batch with a backward pass if an adapter got no gradient in it."""
        if not self._backward_ran or not self._waiting:
            return
        without, self._waiting = list(self._waiting), {}
        if self.check_gradients:
            named = ", ".join(without[:4])
            raise RuntimeError(f"{len(without)} adapter parameters got no gradient in the first batch: {named}. {_CURE}")

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
        """Lightning tears nothing down then."""
        self.teardown(trainer, pl_module, "")

    def _adapt(self, trainer: Trainer, pl_module: LightningModule) -> None:
        target = self._target(pl_module)
        if self.compile and trainer.state.fn != TrainerFn.PREDICTING:
            self._recorded = self.cuda_graphs and self._recordable(trainer)
            compile_layers(target, cuda_graphs=self._recorded)
            self._compiled = target
        if not any(layer.merged for _, layer in lora_layers(target)) and not already_applied(target, self.config):
            convert_base(trainer, pl_module)
            if self.quantize is not None:
                find_targets(target, self.config)  # a config that does not fit is refused before anything is packed
                device, saved = trainer.strategy.root_device, self.config.modules_to_save
                quantize_base(target, self.quantize, modules_to_save=saved, device=device)
            self.report = report = find_targets(target, self.config)
            stays = self._what_stays(target, report)
            inject(target, self.config, report)
            synchronize(pl_module)
            trainable, total = trainable_parameters(pl_module)
            rest = f"\nfrozen, without an adapter: {stays}" if stays else ""
            rank_zero_info(f"{report}{rest}\ntrainable {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
        if self.merge_on_fit_end and trainer.state.fn == TrainerFn.FITTING:
            self._check_mergeable(target, isinstance(trainer.strategy, ModelParallelStrategy))
        arrange(trainer.strategy, pl_module)
        root = ".".join(filter(None, (self.module, adapter_root(target)[0])))
        self._hooks = StrategyHooks(trainer.strategy, pl_module, root, self.config, self.check_base, self.lora_plus_ratio)
        self._hooks.install()

    def _what_stays(self, target: nn.Module, report: TargetReport) -> str:
        """What LoRA freezes of a LightningModule's own parts, with a warning: a head beside a pretrained part would stay random."""
        stays = left_frozen(target, [each.fqn for each in report.targets], report.saved)
        named = ", ".join(stays[:6]) + (" …" if len(stays) > 6 else "")
        if stays and self.module is None and (self.config.modules_to_save == "auto" or report.saved):
            rank_zero_warn(
                f"LoRA freezes {named}, which have no adapter: what is new there stays random. To train it, limit LoRA to the pretrained"
                " part with LoRACallback(module=...), or name it in modules_to_save. If it is to stay as it is, say so with"
                " requires_grad_(False) before, or with modules_to_save=[]."
            )
        return named

    def _begin_step(self) -> None:
        if self._recorded:
            begin_step()

    def _recordable(self, trainer: Trainer) -> bool:
        """Whether CUDA graphs, which were asked for, can be had."""
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
            raise ValueError(
                f"cuda_graphs=True with strategy={type(trainer.strategy).__name__}: it moves the parameters between uses, and a recorded"
                " graph reads them where they were. Leave cuda_graphs out."
            )
        device = trainer.strategy.root_device
        if device.type != "cuda":
            rank_zero_warn(f"cuda_graphs=True has no effect on {device}: blocks are compiled, nothing is recorded.")
        return device.type == "cuda"

    def _check_mergeable(self, target: nn.Module, sharded: bool) -> None:
        """Say at the start what would stop the merge at the end."""
        tied = [(name, f"tied to {', '.join(others)}, and merging would change that too") for name, others in tied_weights(target).items()]
        parts = [(f"{name}.{weight}", part) for name, layer in lora_layers(target) for weight, part in layer.by_weight().items()]
        how = "quantized and will be sharded" if sharded else "quantized"
        packed = [
            (name, f"{how} ({part.weight.dtype})")
            for name, part in parts
            if not part.weight.is_floating_point() or format_of(part) is not None
            if self.merge_quantized is None or format_of(part) is None or sharded
        ]
        for name, reason in (tied + packed)[:1]:
            raise ValueError(
                f"{name} is {reason}: it cannot be merged at the end of fit. Pass LoRACallback(merge_on_fit_end=False);"
                " merge_lora(model, untie=True) merges tied weights when you want it, LoRACallback(merge_quantized='dequantize') or"
                " 'requantize' says how to merge into a quantized base."
            )

    def _target(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.module or "")
        except AttributeError as error:
            children = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(
                f"module={self.module!r} is no submodule of {type(pl_module).__name__}; its children are {children}."
            ) from error
