"""The plain functions: put adapters into a model, list them, take them out. No Lightning needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, overload

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.adapting import adapt, unadapt
from lightning_lora.layers.base import PREFIX, LoRALayer, lora_layers
from lightning_lora.model.fuse import fuse, unfuse
from lightning_lora.model.guards import guard, unguard
from lightning_lora.model.heads import note_saved
from lightning_lora.model.merge import unmerge_lora
from lightning_lora.model.targeting import TargetReport, find_targets
from lightning_lora.quantization.formats import elements, plain_dtype, prepare
from lightning_lora.registry import INITS, VARIANTS, look_up
from lightning_lora.utils.names import modules_by_name
from lightning_lora.utils.sharding import is_distributed, reshard
from lightning_lora.utils.transformers_conventions import checkpoint_options, gives_gradients

_WAYS = "call unload_lora(model), which drops it, or merge_lora(model) and unload_lora(model, merged='keep'), which keeps its update"
_WAYS_MERGED = "unload_lora(model, merged='keep') leaves the update in the weights, unload_lora(model, merged='drop') takes it out"


class LoRAParameters(Sequence[nn.Parameter]):
    """Parameters in the model's order; ``p in parameters`` compares identity (``==`` on tensors would compare entries)."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = tuple(parameters)
        self._ids = frozenset(map(id, self._parameters))

    def __contains__(self, item: object) -> bool:
        return id(item) in self._ids

    @overload
    def __getitem__(self, index: int) -> nn.Parameter: ...
    @overload
    def __getitem__(self, index: slice) -> LoRAParameters: ...
    def __getitem__(self, index: int | slice) -> nn.Parameter | LoRAParameters:
        found = self._parameters[index]
        return LoRAParameters(found) if isinstance(found, tuple) else found

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def apply_lora(model: nn.Module, config: LoRAConfig | None = None) -> nn.Module:
    """Adapt the modules that the config names, in place, and freeze the rest.

    Applying the same config again changes nothing. After it, what trains is: the adapters, the biases that
    ``config.bias`` names, and the modules trained in full (``config.modules_to_save``).

    Args:
        model: any module; its parameters keep their names, dtypes and devices.
        config: what to adapt; default ``LoRAConfig()``.

    Returns:
        The same ``model``.

    Raises:
        ValueError: the config does not fit the model, or another config is applied, or the adapters are merged; the
            model is as it was before.
    """
    config = config or LoRAConfig()
    if already_applied(model, config):
        return model
    look_up(INITS, "init", config.init)
    look_up(VARIANTS, "variant", config.variant)
    return inject(model, config, find_targets(model, config))


def inject(model: nn.Module, config: LoRAConfig, report: TargetReport) -> nn.Module:
    """Do what a report of :func:`~lightning_lora.model.targeting.find_targets` says; all of it or, on an error, nothing."""
    if is_distributed():
        reshard(model)  # FSDP2 keeps its root gathered after a forward pass: flags set on those copies would not last
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(f"{lazy[0]!r} is lazy and has no shape yet: run one forward pass before applying LoRA.")
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in trained:
            parameter.requires_grad_(False)
        _prepare_quantized(model)
        for target in report.targets:
            try:
                adapt(target.module, target.spec)
            except ValueError as error:
                raise ValueError(f"{target.fqn!r}: {error}.") from error
        report.targets[0].kind.finish({target.fqn: layer for target in report.targets if isinstance(layer := target.module, LoRALayer)})
        fuse(model)
        _train_extras(model, config, report)
        guard(model)
        let_gradients_in(model)
        if is_distributed():
            from lightning_lora.model import parallel

            parallel.adopt(model, lora_layers(model))
    except BaseException:
        unload_lora(model)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        raise
    return model


def already_applied(model: nn.Module, config: LoRAConfig, *, merged_too: bool = False) -> bool:
    """Whether the model has exactly this config; False if it has no LoRA. Nothing is changed.

    Args:
        model: any module.
        config: to compare with.
        merged_too: accept a model into which it is merged.

    Raises:
        ValueError: it has another one, or it is merged.
    """
    layers = list(lora_layers(model))
    if not layers:
        return False
    merged = [name for name, layer in layers if layer.merged]
    if merged and not merged_too:
        raise ValueError(
            f"LoRA is merged into {merged[0]!r} and {len(merged) - 1} more; call unmerge_lora(model) or unload_lora: {_WAYS_MERGED}."
        )
    ways = _WAYS_MERGED if merged else _WAYS
    for name, layer in layers:
        different = layer.lora_config.differences(config)
        if different:
            raise ValueError(f"{name!r} has another LoRA config ({'; '.join(different)}); {ways}, before applying a new one.")
    plain = [target.fqn for target in find_targets(model, config).targets if not isinstance(target.module, LoRALayer)]
    if plain:
        here = layers[0][0]
        raise ValueError(f"{here!r} has LoRA with this config, {plain[0]!r}, which it targets too, has not; {ways}, first.")
    return True


def get_lora_parameters(model: nn.Module) -> LoRAParameters:
    """Every adapter parameter, each once (what layers share and never trains is none); membership is by identity."""
    return LoRAParameters([parameter for _, layer in lora_layers(model) for parameter in layer.lora_parameters().values()])


def unload_lora(model: nn.Module, *, merged: Literal["keep", "drop"] | None = None) -> nn.Module:
    """Back to the plain classes. Adapters that are not merged are dropped, and the weights are the base's.

    Parameters stay frozen; ``model.requires_grad_(True)`` is the way to train on. A sharded model is to be given whole, as it was wrapped.

    Args:
        model: any module.
        merged: what becomes of updates that are merged into the weights, which has no default. ``"keep"``: they stay, so the next training
            starts from them. ``"drop"``: they are taken out first, and the base is as it was.

    Returns:
        The same ``model``.

    Raises:
        ValueError: the model is merged and ``merged`` does not say what becomes of the update; it is ``"keep"`` and a layer is not merged;
            it is ``"drop"`` and the way back was not kept; FSDP1 flattened adapters into one parameter with their base. Nothing is changed.
    """
    if merged not in (None, "keep", "drop"):
        raise ValueError(f"merged={merged!r}: choose 'keep' or 'drop'.")
    into = [name for name, layer in lora_layers(model) if layer.merged]
    apart = [name for name, layer in lora_layers(model) if not layer.merged]
    if into and merged is None:
        raise ValueError(f"LoRA is merged into {into[0]!r} and {len(into) - 1} more, so say what becomes of the update: {_WAYS_MERGED}.")
    if apart and merged == "keep":
        raise ValueError(
            f"{apart[0]!r} and {len(apart) - 1} more are not merged, and merged='keep' would drop what they learned: call merge_lora(model)"
            " first, or drop it with unload_lora(model)."
        )
    if merged == "drop":
        unmerge_lora(model)
    if is_distributed():
        from lightning_lora.model import parallel

        parallel.forget(model)
    unfuse(model)
    note_saved(model, ())
    for _, layer in list(lora_layers(model)):
        unadapt(layer)
    unguard(model)
    return model


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Elements that train, and all elements."""
    sizes = {p: elements(module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None}
    return sum(size for p, size in sizes.items() if p.requires_grad), sum(sizes.values())


def _prepare_quantized(model: nn.Module) -> None:
    """Gradients pass through every quantized layer, adapted or not."""
    dtype = plain_dtype(model)
    for name, module in model.named_modules():
        try:
            prepare(module, dtype)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}.") from error


def let_gradients_in(model: nn.Module) -> None:
    """Make the embeddings of Hugging Face models with re-entrant gradient checkpointing give outputs that need a gradient.

    Such checkpoints cut the graph where none of their inputs needs one, and with a frozen embedding none does: the adapters
    inside would get no gradient, without a word.
    """
    for module in model.modules():
        if not hasattr(type(module), "enable_input_require_grads") or gives_gradients(module):
            continue
        if any(options.get("use_reentrant") for options in checkpoint_options(module)):
            module.enable_input_require_grads()  # type: ignore[operator]


def _train_extras(model: nn.Module, config: LoRAConfig, report: TargetReport) -> None:
    modules = modules_by_name(model)
    for fqn in report.saved:
        modules[fqn].requires_grad_(True)
    note_saved(model, report.saved)
    owners = {"none": (), "all": model.modules(), "lora_only": (target.module for target in report.targets)}[config.bias]
    for module in owners:
        for name, parameter in module.named_parameters(recurse=False):
            if "bias" in name and not name.startswith(PREFIX):
                parameter.requires_grad_(True)
