"""Check before the callback changes anything. Refuse what would only fail in training or at its end, or warn of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_lora.callbacks.sweep_option import Sweep
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import lora_layers
from lightning_lora.layers.rounding import check_limit
from lightning_lora.model.frozen_parts import asleep
from lightning_lora.model.heads import left_frozen
from lightning_lora.model.targeting import TargetReport
from lightning_lora.optim.groups import check_ratio
from lightning_lora.optim.preconditioning import check_known, check_preconditioner
from lightning_lora.quantization.quantizers import quantizer_of
from lightning_lora.strategies.adapted_part import AdaptedPart
from lightning_lora.strategies.namespaces import twins
from lightning_lora.strategies.savable import check_savable
from lightning_lora.utils.messages import counted
from lightning_lora.utils.names import clean_name


def check_arguments(given: Mapping[str, Any]) -> None:
    """Check the callback's arguments, each alone and against each other.

    Args:
        given: argument → its value, as ``__init__`` got it.

    Raises:
        ValueError: one has a value that is not known.
    """
    for name in ("merge_on_fit_end", "check_base", "check_gradients", "allow_nonfinite", "cuda_graphs", "tune_loop"):
        if given[name] is not None and not isinstance(given[name], bool):  # any text would count as True, "no" too
            raise ValueError(f"{name}={given[name]!r}: give True or False.")
    if given["compile"] not in (None, "layer"):
        raise ValueError(f"compile={given['compile']!r} is not known; it is None or 'layer'.")
    if given["cuda_graphs"] and given["compile"] is None:
        raise ValueError("cuda_graphs=True records compiled blocks: pass compile='layer' with it.")
    for each in listed(given["offload"]):
        if each not in ("activations", "frozen"):
            raise ValueError(f"offload={each!r} is not known; it is None, 'activations', 'frozen' or a list of both.")
        if given["cuda_graphs"]:
            raise ValueError(f"offload={each!r} with cuda_graphs=True: a recorded graph keeps its memory. Leave one of them out.")
    if given["checkpointing"] not in (None, "full", "selective"):
        raise ValueError(f"checkpointing={given['checkpointing']!r} is not known; it is None, 'full' or 'selective'.")
    if given["quantize"] is not None:
        quantizer_of(given["quantize"])
    if given["merge_quantized"] not in (None, "dequantize", "requantize"):
        raise ValueError(f"merge_quantized={given['merge_quantized']!r}: choose 'dequantize' or 'requantize'.")
    check_limit(given["merge_max_lost"], "merge_max_lost")
    if given["merge_max_lost"] is not None and given["merge_on_fit_end"] is False:
        raise ValueError(
            f"merge_max_lost={given['merge_max_lost']!r} limits the merge at the end of fit, and merge_on_fit_end=False has none: leave one"
            " of them out."
        )
    if type(given["init_batches"]) is not int or given["init_batches"] < 1:
        raise ValueError(f"init_batches={given['init_batches']!r}: give a whole number ≥ 1, such as 8.")
    check_ratio(given["lora_plus_ratio"])
    check_known(given["precondition"])
    if given["sweep"] is not None and not isinstance(given["sweep"], Sweep):
        raise ValueError(f"sweep={given['sweep']!r}: give lightning_lora.Trials, such as sweep=Trials([{{'rank': 4}}, {{'rank': 16}}]).")


def listed(offload: str | Sequence[str] | None) -> list[str]:
    """Return what is offloaded as a list."""
    return [offload] if isinstance(offload, str) else list(offload or ())


def check_apart(mine: str | None, others: Sequence[str | None]) -> None:
    """Check that the callbacks of a trainer adapt separate parts.

    Args:
        mine: a callback's ``module``.
        others: ``module`` of the other callbacks.

    Raises:
        ValueError: one part is the same as another, or inside it.
    """
    for other in others:
        short, long = sorted((mine or "", other or ""), key=len)
        if f"{long}.".startswith(f"{short}." if short else ""):
            raise ValueError(
                f"callbacks: one LoRACallback has module={mine!r} and another module={other!r}, and these parts overlap: give"
                " each a separate module, or use one callback with rank_pattern and alpha_pattern."
            )


def check_fit(trainer: Trainer, module: LightningModule, target: nn.Module, part: AdaptedPart | None) -> None:
    """Raise ValueError if adapters are gone, an optimizer lacks a parameter that should train or has none, or no checkpoint can be written.

    Args:
        trainer: before its first step.
        module: the LightningModule.
        target: the adapted part of it.
        part: what was adapted; None if nothing was.
    """
    here = {clean_name(name) for name, _ in lora_layers(target)}
    gone = [name for name in part.layers if name not in here] if part is not None else []
    if gone or not here:
        what = f"replaced {counted(len(gone), 'layer')} after adapting: {', '.join(gone[:4])}" if gone else "built no layers to adapt"
        raise ValueError(
            f"{type(module).__name__} {what}. Build layers in __init__ or configure_model; or in setup, in a module that has none before."
        )
    if part is not None and part.config.variant == "adalora" and not any(hasattr(each, "allocator") for each in trainer.callbacks):  # type: ignore[attr-defined]
        rank_zero_warn("variant='adalora' under LoRACallback prunes no rank: use AdaLoRACallback, unless your module calls RankAllocator.")
    if still := asleep(target):
        rank_zero_warn(
            f"{counted(len(still), 'adapted layer')} will not train: {', '.join(still[:4])}. Their adapters were frozen after LoRACallback"
            " added them, as by requires_grad_(False) or freeze() in setup or configure_optimizers, or by a BaseFinetuning callback. LoRA"
            " freezes the base itself, so leave that out; to leave out these layers, use exclude_modules."
        )
    check_optimizers(trainer.optimizers, module, target)
    check_base_frozen(trainer.optimizers, target)
    check_savable(trainer, module)


def check_optimizers(optimizers: Sequence[Optimizer], module: nn.Module, target: nn.Module) -> None:
    """Check that the optimizers hold what trains, and each of them something.

    Args:
        optimizers: of the trainer.
        module: the LightningModule.
        target: the adapted part of it.

    Raises:
        ValueError: a parameter that should train is in no optimizer, or an optimizer has nothing to train.
    """
    if not any(optimizer.param_groups for optimizer in optimizers):
        return  # configure_optimizers returned None: Lightning warns that it runs without an optimizer
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    trained = {id(p) for p in target.parameters() if p.requires_grad}
    forgotten = [name for name, p in module.named_parameters() if id(p) in trained - held]
    if forgotten:
        left = [clean_name(name) for name, layer in lora_layers(target) if {id(p) for p in layer.parameters()} & (trained - held)]
        on_purpose = f" If these layers are not to train, pass LoRAConfig(exclude_modules={left!r})." if held & trained and left else ""
        raise ValueError(
            f"{counted(len(forgotten), 'parameter', 'that should train are')} in no optimizer:"
            f" {', '.join(forgotten[:4])}. Build the optimizer in configure_optimizers, from self.parameters() or"
            f" get_lora_parameters(self), not in __init__.{on_purpose}"
        )
    for index, optimizer in enumerate(optimizers):
        if not any(group["params"] for group in optimizer.param_groups):
            raise ValueError(
                f"optimizer {index} ({type(optimizer).__name__}) holds no parameter that trains: LoRA froze all of them. Limit LoRA"
                " to a part with LoRACallback(module=...), or list what this optimizer should train in modules_to_save."
            )


def check_base_frozen(optimizers: Sequence[Optimizer], target: nn.Module) -> None:
    """Raise ValueError if an optimizer would train the weight under an adapter. Its merge, its file and its base would no longer agree."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    for name, layer in lora_layers(target):
        if any(id(layer._parameters[own]) in held for own in layer.adapted):
            raise ValueError(
                f"{clean_name(name)!r} has an adapter, and an optimizer got its frozen weight too, as by unfreeze() with add_param_group()"
                " (BaseFinetuning callbacks do that). Keep adapted layers out of what is unfrozen, or train this layer in full without an"
                f" adapter: exclude_modules=[{clean_name(name)!r}]."
            )


def recordable(strategy: Strategy) -> bool:
    """Return True if CUDA graphs can be recorded; warn if the device has none.

    Raises:
        ValueError: the strategy never allows it.
    """
    if isinstance(strategy, twins(FSDPStrategy, ModelParallelStrategy)):
        raise ValueError(
            f"cuda_graphs=True with strategy={type(strategy).__name__}: it moves the parameters between uses, but a recorded graph reads"
            " them at fixed addresses. Leave cuda_graphs out."
        )
    device = strategy.root_device
    if device.type != "cuda":
        rank_zero_warn(f"cuda_graphs=True has no effect on {device}: blocks are compiled, nothing is recorded.")
    return device.type == "cuda"


def check_one_device(strategy: Strategy) -> None:
    """Raise ValueError if frozen weights cannot be offloaded under a strategy."""
    if not isinstance(strategy, twins(SingleDeviceStrategy)):
        raise ValueError(
            f"offload='frozen' with strategy={type(strategy).__name__}: it is for one device. Leave it out; strategy='lora_fsdp2' shards"
            " the weights over several."
        )


def check_precondition(target: nn.Module, name: str | None, strategy: Strategy) -> None:
    """Raise ValueError if the gradients of a module's adapters cannot be preconditioned by a method, or under a strategy."""
    if name is None:
        return
    if isinstance(strategy, twins(FSDPStrategy)):
        raise ValueError(
            f"precondition={name!r} needs the matrices A and B, which strategy={type(strategy).__name__} flattens: use"
            " strategy='lora_fsdp2' or 'ddp'."
        )
    check_preconditioner(target, name)


def frozen_parts(target: nn.Module, report: TargetReport, config: LoRAConfig, *, whole: bool) -> str:
    """Return the names of parts that LoRA freezes without an adapter.

    Warn of them, because a new head beside a pretrained part would stay random.

    Args:
        target: the module to adapt.
        report: what the config matches in it.
        config: its ``modules_to_save`` lists the parts that train in full.
        whole: True if the target is the whole LightningModule.
    """
    stays = left_frozen(target, [each.fqn for each in report.targets], report.saved)
    named = ", ".join(stays[:6]) + (" …" if len(stays) > 6 else "")
    if stays and whole and (config.modules_to_save == "auto" or report.saved):
        rank_zero_warn(
            f"LoRA freezes what has no adapter: {named}. New parameters there stay random. To train these parts, limit LoRA to the"
            " pretrained part with LoRACallback(module=...), or list them in modules_to_save. To keep them frozen without this warning,"
            " call requires_grad_(False) on them before, or pass modules_to_save=[]."
        )
    return named


def submodule(pl_module: LightningModule, name: str | None) -> nn.Module:
    """Return the submodule that is adapted; the whole module by default."""
    try:
        return pl_module.get_submodule(name or "")
    except AttributeError as error:
        children = ", ".join(child for child, _ in pl_module.named_children())
        raise ValueError(f"module={name!r} is no submodule of {type(pl_module).__name__}; its children are {children}.") from error
