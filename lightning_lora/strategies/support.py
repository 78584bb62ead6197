"""Refuse strategies and plugins that LoRA does not support, and prepare a strategy before it wraps the module."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, Precision, TransformerEnginePrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from lightning_lora.model import parallel
from lightning_lora.quantization.formats import format_of
from lightning_lora.strategies.lightning_private import start_method
from lightning_lora.strategies.namespaces import LIGHTNING, check_namespace, library, twins
from lightning_lora.strategies.strategy_hooks import REPLACED
from lightning_lora.utils.gradient_reducer import GradientReducer
from lightning_lora.utils.torch_private_parallel import ddp_ignores

_SUPPORTED = (SingleDeviceStrategy, DDPStrategy, FSDPStrategy, ModelParallelStrategy)


def check_supported(trainer: Trainer) -> None:
    """Refuse combinations that would silently go wrong.

    Raises:
        ValueError: the strategy is not supported, or is a subclass that overrides saving or loading; or it trains in copies of this
            process, so that the trained adapters would be lost; or a precision plugin or a callback conflicts with LoRA; or
            ``FSDPStrategy`` has ``use_orig_params=False``; or as :func:`~lightning_lora.strategies.namespaces.check_namespace`.
    """
    strategy, callbacks = trainer.strategy, trainer.callbacks  # type: ignore[attr-defined]
    check_namespace(trainer, callbacks)
    name = type(strategy).__name__
    if not isinstance(strategy, twins(*_SUPPORTED)) or isinstance(strategy, twins(DeepSpeedStrategy)):  # DeepSpeed's is a DDPStrategy
        known = ", ".join(cls.__name__ for cls in _SUPPORTED)
        raise ValueError(f"strategy={name} is not supported under LoRACallback; there are {known}. For sharding use strategy='lora_fsdp2'.")
    _check_not_overridden(strategy)
    start = start_method(strategy)
    if start is not None:
        raise ValueError(
            f"strategy={name} with start method {start!r} trains in copies of this process, and the trained adapters would be lost:"
            " use strategy='ddp' from a script."
        )
    precision = trainer.precision_plugin
    if isinstance(precision, twins(TransformerEnginePrecision)):
        raise ValueError(
            f"plugins: {type(precision).__name__} replaces every linear layer after LoRA was injected, and so removes the adapters: convert"
            " the model before it goes into the LightningModule, and leave the plugin out."
        )
    averages = twins(WeightAveraging, StochasticWeightAveraging)
    averaging = next((callback for callback in callbacks if isinstance(callback, averages)), None)
    if averaging is not None:
        raise ValueError(
            f"callbacks: {type(averaging).__name__} copies the whole model: before LoRACallback in the list it averages a model without"
            ' adapters, after it, it puts base weights into adapter checkpoints. Leave it out; "Averages of adapters" in docs/callback.md'
            " has a callback of a few lines that averages what trains."
        )
    if isinstance(strategy, twins(FSDPStrategy)) and not strategy.kwargs.get("use_orig_params", True):
        raise ValueError("FSDPStrategy(use_orig_params=False) hides the parameters that LoRA trains: leave use_orig_params out.")


def _check_not_overridden(strategy: Strategy) -> None:
    """Raise ValueError if a user's subclass overrides a method that the hooks replace: it would never be called."""
    for name in REPLACED:
        owner = next(cls for cls in type(strategy).__mro__ if name in vars(cls))
        if library(owner) not in LIGHTNING | {"lightning_lora"}:
            raise ValueError(
                f"strategy={type(strategy).__name__}: {owner.__module__}.{owner.__name__} overrides {name}, which LoRACallback replaces, so"
                f" that it would never be called. Remove {name}; to change checkpoints, use the module's on_save_checkpoint or a"
                " CheckpointIO plugin."
            )


def convert_base(trainer: Trainer, module: LightningModule) -> bool:
    """Let ``BitsandbytesPrecision`` replace the linears now, before LoRA is applied. Return True if it is the run's precision.

    Lightning calls the plugin after ``setup``, when it would replace adapted layers too. It skips a module that is converted already.
    """
    converts = isinstance(trainer.precision_plugin, twins(BitsandbytesPrecision))
    if converts:
        trainer.precision_plugin.convert_module(module)
    return converts


def arrange(strategy: Strategy, module: LightningModule) -> Callable[[], None]:
    """Prepare a strategy for a module that was just adapted and is not wrapped yet. Return a function that restores its settings.

    FSDP1 flattens a block with its adapters into one parameter, which needs gradient memory for the frozen base too. So FSDP1 is told to
    ignore trainable parameters. They are replicated on every rank, and one collective per step averages their gradients.

    Raises:
        ValueError: the strategy cannot handle a quantized weight; or ``FSDPStrategy`` has ``ignored_modules``, or a module on the meta
            device.
    """
    _check_packed(strategy, module)
    undo = ExitStack()
    if isinstance(strategy, twins(FSDPStrategy)) and not any(isinstance(child, FullyShardedDataParallel) for child in module.modules()):
        _ignore_trained(strategy, module, undo)  # wrapped by the user, `parallel.adopt` placed the adapters when LoRA was applied
    if isinstance(strategy, twins(FSDPStrategy, ModelParallelStrategy)):
        # Lightning refuses to clip by norm under FSDP, and torch cannot do it if only some layers are tensor-parallel.
        plugin = strategy.precision_plugin
        if "clip_grad_by_norm" not in vars(plugin):
            undo.callback(vars(plugin).pop, "clip_grad_by_norm", None)
        plugin.clip_grad_by_norm = functools.partial(_clip, plugin)  # type: ignore[method-assign]
    return undo.close


def _ignore_trained(strategy: FSDPStrategy, module: LightningModule, undo: ExitStack) -> None:
    if strategy.kwargs.get("ignored_modules"):
        raise ValueError(
            "FSDPStrategy(ignored_modules=...): LoRA passes parameters to ignore itself; give yours as ignored_states=[parameters]."
        )
    trained = parallel.replicated_parameters(module)
    if any(parameter.is_meta for parameter in trained):
        raise ValueError("FSDPStrategy with a module on the meta device would leave the adapters there: use strategy='lora_fsdp2'.")
    for parameter in trained:
        parameter.data = parameter.data.to(strategy.root_device)  # FSDP moves only the parameters that it manages
    mine: list[Any] = list(strategy.kwargs.get("ignored_states") or [])
    undo.callback(strategy.kwargs.__setitem__, "ignored_states", mine)
    strategy.kwargs["ignored_states"] = mine + [p for p in trained if not any(p is other for other in mine)]
    GradientReducer(trained, [None])  # None: all processes


def _check_packed(strategy: Strategy, module: LightningModule) -> None:
    """Raise ValueError for quantized weights that a strategy cannot handle. Tell DDP to ignore them, since they never change."""
    packed = {name: packing for name, child in module.named_modules() if (packing := format_of(child)) is not None}
    if not packed:
        return
    if isinstance(strategy, twins(FSDPStrategy)):
        raise ValueError(
            f"strategy={type(strategy).__name__} flattens a block into one parameter, and {next(iter(packed))!r} is quantized: use"
            " strategy='lora_fsdp2'."
        )
    whole = [name for name, packing in packed.items() if not packing.shards]
    if isinstance(strategy, twins(ModelParallelStrategy)) and whole:
        raise ValueError(
            f"strategy={type(strategy).__name__} cannot shard {whole[0]!r} ({type(module.get_submodule(whole[0])).__name__}), whose 8-bit"
            " weight cannot be split: use quantize='nf4', 'torchao-nf4' or 'fp8', or strategy='ddp'."
        )
    if isinstance(strategy, twins(DDPStrategy)):
        names = [f"{name}.{weight}" for name, packing in packed.items() for weight in packing.packed(module.get_submodule(name))]
        ddp_ignores(module, names)


def _clip(precision: Precision, optimizer: Optimizer, clip_val: int | float) -> None:
    if clip_val > 0:
        parallel.clip_grad_norm(precision.main_params(optimizer), clip_val)


__all__ = ["arrange", "check_supported", "convert_base"]
