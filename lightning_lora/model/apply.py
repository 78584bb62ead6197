"""Apply LoRA to a whole model, list its adapter parameters, and remove it again. Lightning is not needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, overload

from torch import nn

from lightning_lora.config import LoRAConfig, checked_config
from lightning_lora.layers.adapting import adapt, unadapt
from lightning_lora.layers.base import PREFIX, LoRALayer, lora_layers
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.model.fast_paths import keep_off, put_back
from lightning_lora.model.frozen_parts import begin_as_originals
from lightning_lora.model.fuse import fuse, unfuse
from lightning_lora.model.guards import guard, unguard
from lightning_lora.model.heads import note_saved, saved_modules
from lightning_lora.model.merge import unmerge_layers
from lightning_lora.model.noted_state import forget_state, note_state
from lightning_lora.model.targeting import TargetReport, find_targets
from lightning_lora.quantization.content import forget_origin
from lightning_lora.quantization.formats import elements, plain_dtype, prepare, restore, why_not_prepared
from lightning_lora.registry import data_of, has_start
from lightning_lora.utils.names import clean_name, modules_by_name, parameters_by_name
from lightning_lora.utils.sharding import is_distributed, reshard
from lightning_lora.utils.transformers_conventions import checkpoint_options, gives_gradients

_HOW = ("dropout", "bias", "scaling", "variant", "variant_options", "kind_options")
_WAYS = "call unload_lora(model) to drop it, or merge_lora(model) and unload_lora(model, merged='keep') to keep its update"
_WAYS_MERGED = "unload_lora(model, merged='keep') leaves the update in the weights, unload_lora(model, merged='drop') removes it"


class LoRAParameters(Sequence[nn.Parameter]):
    """Hold parameters in the model's order. ``p in parameters`` compares by identity, because ``==`` compares entries of tensors."""

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

    Applying the same config again changes nothing. Afterwards three groups train: the adapters, the biases that
    ``config.bias`` names, and what is trained in full (``config.modules_to_save``).

    Args:
        model: any module. Its parameters keep their names, dtypes and devices.
        config: which modules to adapt, and how. Default: ``LoRAConfig()``.

    Returns:
        The same ``model``.

    Raises:
        ValueError: the config does not fit the model, another config is applied, or the adapters are merged. The
            model is unchanged then.

    Examples:
        >>> model = apply_lora(model, LoRAConfig(rank=4, target_modules="all-linear"))
        >>> {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
        True
    """
    config = checked_config(config)
    if already_applied(model, config):
        return model
    return inject(model, config, find_targets(model, config))


def inject(model: nn.Module, config: LoRAConfig, report: TargetReport) -> nn.Module:
    """Adapt the targets of a report of :func:`~lightning_lora.model.targeting.find_targets`. On an error, undo everything."""
    if is_distributed():
        reshard(model)  # after a forward pass FSDP2 keeps its root gathered: flags set on these copies would be lost
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        prepare_quantized(model)
        for target in (*report.targets, *report.rows):
            try:
                adapt(target.module, target.spec)
            except ValueError as error:
                raise ValueError(f"{target.fqn!r}: {error}.") from error
        for kind, part in ((report.targets[0].kind, report.targets), *((target.kind, report.rows) for target in report.rows[-1:])):
            kind.finish({target.fqn: layer for target in part if isinstance(layer := target.module, LoRALayer)})
        fuse(model)
        keep_off(model)
        _train_extras(model, config, report)
        begin_as_originals(model, report.copies)
        guard(model)
        note_state(model)
        if is_distributed():
            from lightning_lora.model import parallel

            parallel.adopt(model, lora_layers(model))
        let_gradients_in(model)  # last, because it is not undone
    except BaseException:
        unload_lora(model)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        raise
    return model


def already_applied(model: nn.Module, config: LoRAConfig, *, merged_too: bool = False) -> bool:
    """Return True if LoRA is applied with this config or one that means the same here, False if the model has no LoRA. Change nothing.

    An adapter that was loaded from a file names its layers as the file does, in the file's order.

    Args:
        model: any module.
        config: the config to compare with.
        merged_too: accept a model whose adapters are merged.

    Raises:
        ValueError: the model has another config, or its adapters are merged.
    """
    layers = list(lora_layers(model))
    if not layers:
        return False
    config = as_data_decided(config, layers[0][1].lora_config)
    merged = [name for name, layer in layers if layer.merged]
    if merged and not merged_too:
        raise ValueError(
            f"LoRA is merged into {merged[0]!r} and {len(merged) - 1} more; call unmerge_lora(model) or unload_lora: {_WAYS_MERGED}."
        )
    ways = _WAYS_MERGED if merged else _WAYS
    low_rank = [(name, layer) for name, layer in layers if layer.low_rank]  # a formula means nothing to the others
    different = {name: words for name, layer in low_rank if (words := layer.lora_config.differences(config))}
    if different and not (all(map(partial(_alike, config), low_rank)) and _same_layers(model, config, layers)):
        name, words = next(iter(different.items()))
        raise ValueError(f"{name!r} has another LoRA config ({'; '.join(words)}); {ways}, before applying a new one.")
    report = find_targets(model, config)
    plain = [target.fqn for target in (*report.targets, *report.rows) if not isinstance(target.module, LoRALayer)]
    if plain:
        raise ValueError(f"{layers[0][0]!r} has LoRA with this config, but {plain[0]!r}, also a target, has no adapter; {ways}, first.")
    return True


def as_data_decided(config: LoRAConfig, there: LoRAConfig) -> LoRAConfig:
    """Return a config with the ranks that data gave the layers, if its init takes ranks from data and the layers have that init."""
    kind = data_of(config.init)
    if kind is None or there.init != config.init or not kind.decides_ranks(config):
        return config
    return replace(config, **{name: getattr(there, name) for name in ("rank_pattern", "alpha_pattern", "exclude_modules")})


def _alike(config: LoRAConfig, layer: tuple[str, LoRALayer]) -> bool:
    """Return whether a layer computes and trains as a config says. Which layers the config names is not compared.

    Its init is compared only if the layer keeps its start: otherwise the init has no effect any more.
    """
    own = layer[1].lora_config
    start = {each.init if has_start(each.init) else None for each in (own, config)}
    return len(start) == 1 and all(getattr(own, name) == getattr(config, name) for name in _HOW)


def _same_layers(model: nn.Module, config: LoRAConfig, layers: Sequence[tuple[str, LoRALayer]]) -> bool:
    """Return whether a config names the layers that the model has, with their ranks and alphas, and the modules trained in full."""
    report = find_targets(model, config)

    def key(spec: LayerSpec) -> tuple[Any, ...]:
        return spec.rank, spec.alpha, spec.kind, spec.slices, spec.rows

    here = {clean_name(name): key(layer.spec) for name, layer in layers}
    there = {target.fqn: key(target.spec) for target in (*report.targets, *report.rows)}
    own = next(layer.lora_config for _, layer in layers if layer.low_rank)
    return here == there and set(report.saved) == set(saved_modules(model, own))


def get_lora_parameters(model: nn.Module) -> LoRAParameters:
    """Return every adapter parameter once; frozen tensors that layers share (VeRA) are left out. ``p in`` compares identities.

    What ``modules_to_save`` and ``bias`` train is not in it. For an optimizer use
    :func:`~lightning_lora.lora_param_groups`, which has all that trains.

    Examples:
        >>> parameters = get_lora_parameters(apply_lora(model))
        >>> model.lm_head.weight in parameters
        False
    """
    return LoRAParameters([parameter for _, layer in lora_layers(model) for parameter in layer.lora_parameters().values()])


def unload_lora(model: nn.Module, *, merged: Literal["keep", "drop"] | None = None) -> nn.Module:
    """Restore the plain classes. Drop adapters that are not merged; the weights are then the base weights.

    Parameters stay frozen. Call ``model.requires_grad_(True)`` to train them. Pass a sharded model whole, as it was wrapped.

    Args:
        model: any module.
        merged: what to do with updates that are merged into the weights. A merged model has no default. ``"keep"``: leave them in, so
            that the next training starts from them. ``"drop"``: remove them first, which restores the base.

    Returns:
        The same ``model``.

    Raises:
        ValueError: the model is merged and ``merged`` is None; ``merged`` is ``"keep"`` and a layer is not merged; ``merged`` is
            ``"drop"`` and the merge was not reversible; FSDP1 flattened adapters into one parameter with their base. Nothing is changed.

    Examples:
        >>> model = unload_lora(merge_lora(load_adapter(model, "runs/legal/adapter")), merged="keep")
        >>> type(model.model.layers[0].self_attn.q_proj)
        <class 'torch.nn.modules.linear.Linear'>
    """
    if merged not in (None, "keep", "drop"):
        raise ValueError(f"merged={merged!r}: choose 'keep' or 'drop'.")
    into = [name for name, layer in lora_layers(model) if layer.merged]
    apart = [name for name, layer in lora_layers(model) if not layer.merged]
    if into and merged is None:
        raise ValueError(f"LoRA is merged into {into[0]!r} and {len(into) - 1} more, so say what to do with the update: {_WAYS_MERGED}.")
    if apart and merged == "keep":
        raise ValueError(
            f"{apart[0]!r} and {len(apart) - 1} more are not merged, and merged='keep' would lose their updates: call merge_lora(model)"
            " first, or drop the updates with unload_lora(model)."
        )
    if is_distributed():
        from lightning_lora.model import parallel

        parallel.lists_without_adapters(model)  # raises before anything is changed
        if merged == "drop":
            unmerge_layers(model)
        parallel.forget(model)
    elif merged == "drop":
        unmerge_layers(model)
    unfuse(model)
    note_saved(model, ())
    forget_state(model)
    layers = [layer for _, layer in lora_layers(model)]
    for layer in [layer for layer in layers if layer.merged]:  # before any is taken out: tied layers ask one another
        forget_origin(layer)
    for layer in layers:
        unadapt(layer)
    for module in model.modules():
        restore(module)
    put_back(model)
    unguard(model)
    return model


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of trainable elements and of all elements."""
    sizes = {p: elements(module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None}
    return sum(size for p, size in sizes.items() if p.requires_grad), sum(sizes.values())


def prepare_quantized(model: nn.Module) -> None:
    """Let gradients pass through every quantized layer, adapted or not."""
    dtype = plain_dtype(model)
    for name, module in model.named_modules():
        reason = why_not_prepared(module)
        if reason:
            raise ValueError(f"{name!r}: {reason}.")
    for module in model.modules():
        prepare(module, dtype)


def let_gradients_in(model: nn.Module) -> None:
    """Make embeddings of Hugging Face models with re-entrant gradient checkpointing return outputs that need a gradient.

    A re-entrant checkpoint cuts the graph if no input needs a gradient. With a frozen embedding no input does. The adapters
    inside would silently get no gradient.
    """
    for module in model.modules():
        if not hasattr(type(module), "enable_input_require_grads") or gives_gradients(module):
            continue
        if any(options.get("use_reentrant") for options in checkpoint_options(module)):
            module.enable_input_require_grads()  # type: ignore[operator]


def _train_extras(model: nn.Module, config: LoRAConfig, report: TargetReport) -> None:
    parts: dict[str, nn.Module | nn.Parameter] = {**parameters_by_name(model), **modules_by_name(model)}
    for fqn in report.saved:
        parts[fqn].requires_grad_(True)
    note_saved(model, report.saved)
    owners = {"none": (), "all": model.modules(), "lora_only": (target.module for target in report.targets)}[config.bias]
    for module in owners:
        for name, parameter in module.named_parameters(recurse=False):
            if "bias" in name and not name.startswith(PREFIX):
                parameter.requires_grad_(True)
