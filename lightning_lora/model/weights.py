"""Give a model on the meta device memory and weights, one weight at a time.

A model that fits neither a device nor the host's memory once per process is built on the meta device. It is quantized, adapted and sharded
there, where that costs nothing. Then each process gets memory for its own pieces (:func:`materialize`). The weights come one by one
(:func:`load_base`): each is read or made in full, quantized if its layer is, and only this process's piece is kept. So the peak is the
pieces and one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lightning_lora.layers.base import PREFIX, LoRALayer, lora_layers
from lightning_lora.model.noted_state import note_state
from lightning_lora.model.weight_folder import WeightFolder
from lightning_lora.quantization.formats import format_of
from lightning_lora.quantization.loading import awaits_weight, load_packed
from lightning_lora.utils.names import clean_name, join, persistent_buffers
from lightning_lora.utils.sharding import local_shard, local_tensor
from lightning_lora.utils.transformers_conventions import initializer_of
from lightning_lora.utils.transformers_experts import stored_experts

Weights = Callable[[str], Tensor]
"""Name of a base weight → the full tensor, on any device. It raises KeyError for names that it does not have."""

_EMPTY = "_buffers_without_values"  # of a module: names of the buffers to which `materialize` gave memory and nothing else


def on_meta(model: nn.Module) -> bool:
    """True if a parameter or a buffer is on the meta device."""
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@torch.no_grad()
def materialize(model: nn.Module, device: torch.device) -> list[str]:
    """Give what is on the meta device memory, and the values that a new model has. What has values keeps them; what is tied stays tied.

    Args:
        model: sharded by FSDP2 or tensor parallelism, or not at all.
        device: of the memory.

    Returns:
        Names of modules whose tensors have no values yet: quantized ones, and those without ``reset_parameters`` that transformers does
        not initialize.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                places.setdefault(id(parameter), []).append((module, name))
    initializers = initializer_of(model)
    empty = []

    def memory(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor

    for name, module in model.named_modules():
        own = (*module._parameters.values(), *module._buffers.values())
        if not any(tensor is not None and tensor.is_meta for tensor in own):
            continue
        packed = format_of(module) is not None
        buffers = {key for key, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
        module._apply(memory, recurse=False)
        if packed:
            empty.append(name)
            if isinstance(module, LoRALayer):
                module.reset_lora_parameters()
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()
        elif (initialize := initializers.get(module)) is not None:
            initialize(module)
        else:
            empty.append(name)
            module.__dict__[_EMPTY] = buffers
    for (first, first_name), *others in places.values():
        for module, name in others:
            module._parameters[name] = first._parameters[first_name]
    return empty


@torch.no_grad()
def load_base(model: nn.Module, weights: Weights | str | Path, *, device: torch.device | str | None = None) -> nn.Module:
    """Load the base's weights one by one, onto whatever the model is by now: adapted, sharded, quantized on the meta device.

    Every process reads or makes each weight in full and keeps its piece, so nothing is sent between them.

    Args:
        model: any module. What is still on the meta device gets memory first.
        weights: a folder of safetensors files as ``save_pretrained`` writes it; or a function that returns the full tensor of a name, and
            raises KeyError for a buffer that it lacks. Names are those of ``model.state_dict()`` before it was adapted or quantized. A
            function is called twice if the model has values already: all weights are checked before the first is replaced.
        device: where weights are quantized, and get memory; default: the device of the first parameter that has one, or the CPU.

    Returns:
        The same ``model``.

    Raises:
        ValueError: a weight is missing, of another shape or stored quantized; a buffer gets no values; or a layer is merged, or has a
            quantized weight already. Nothing is changed then: what was on the meta device is there again.
            (Memory that runs out midway leaves what had values partly loaded.)

    Examples:
        >>> model.save_pretrained("base")
        >>> with torch.device("meta"):
        ...     large = type(model)(model.config)
        >>> large = apply_lora(quantize_base(large, "fp8"), LoRAConfig(rank=4))
        >>> next(load_base(large, "base").parameters()).device
        device(type='cpu')
    """
    read = weights if callable(weights) else WeightFolder(weights)
    _check_takes_weights(model)
    real = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), torch.device("cpu"))
    device = real if device is None else torch.device(device)
    if isinstance(read, WeightFolder):
        _check_all(read.header, model)
    elif any(not module._parameters[name].is_meta for _, module, name in _base_parameters(model)):  # type: ignore[union-attr]
        _check_all(read, model)
    back = _way_back(model)
    try:
        _load(read, model, device)
    except BaseException:
        back()
        raise
    return model


def _load(read: Weights, model: nn.Module, device: torch.device) -> None:
    materialize(model, device)
    for prefix, module in model.named_modules():
        for name in module.__dict__.get(_EMPTY, set()) & module._non_persistent_buffers_set:
            full = clean_name(join(prefix, name))
            raise ValueError(
                f"{full!r} is no part of a state dict, and {type(module).__name__} has no reset_parameters() that computes it: define one,"
                " or build that buffer outside of torch.device('meta')."
            )
    for names, module, name in _base_parameters(model):
        _put(read, names, module, name, device)
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                full = clean_name(join(prefix, name))
                found = _first(read, [full])
                if found is not None:
                    _check_shape(full, found, tuple(buffer.shape))
                    local_tensor(buffer).copy_(local_shard(found, buffer))
                elif name in module.__dict__.get(_EMPTY, ()):
                    raise ValueError(f"weights has no {full!r}, which {type(module).__name__} needs.")
        module.__dict__.pop(_EMPTY, None)
    for _, layer in lora_layers(model):
        layer.base_was_loaded(set())
    if next(lora_layers(model), None) is not None:
        note_state(model)


def _check_takes_weights(model: nn.Module) -> None:
    """Raise ValueError for a layer whose weight is not the plain one of the base, or is no longer."""
    for name, layer in lora_layers(model):
        if layer.merged:
            raise ValueError(f"{name!r} is merged; call unmerge_lora(model) first.")
    for name, module in model.named_modules():
        if format_of(module) is not None and not awaits_weight(module):
            raise ValueError(f"{name!r} ({type(module).__name__}) is quantized already, and takes no plain weight.")


def _base_parameters(model: nn.Module) -> Iterable[tuple[list[str], nn.Module, str]]:
    """Yield each parameter of the base once: all its names, and its first place. Adapters are left out."""
    found: dict[int, tuple[list[str], nn.Module, str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None and not name.startswith(PREFIX):
                names, *_ = found.setdefault(id(parameter), ([], module, name))
                names.append(clean_name(join(prefix, name)))
    return found.values()


def _check_all(read: Weights, model: nn.Module) -> None:
    """Check every weight that would be loaded, before anything is changed."""
    for names, module, name in _base_parameters(model):
        _value(read, names, module, name)
    for full, buffer in persistent_buffers(model).items():
        found = _first(read, [full])
        if found is not None:
            _check_shape(full, found, tuple(buffer.shape))


def _way_back(model: nn.Module) -> Callable[[], None]:
    """Return a function that gives every module the parameters, buffers and attributes that it has now. Their values are not kept."""
    kept = [(m, m.__class__, dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in model.modules() if "_parameters" in vars(m)]

    def back() -> None:
        for module, cls, own, parameters, buffers in kept:
            module.__class__ = cls
            for place, values in ((module.__dict__, own), (own["_parameters"], parameters), (own["_buffers"], buffers)):
                place.clear()
                place.update(values)

    return back


def _put(read: Weights, names: list[str], module: Any, name: str, device: torch.device) -> None:
    """Load one parameter."""
    value = _value(read, names, module, name)
    if name == "weight" and format_of(module) is not None:
        load_packed(module, value, device)
    else:
        parameter = module._parameters[name]
        local_tensor(parameter).copy_(local_shard(value, parameter))


def _value(read: Weights, names: list[str], module: Any, name: str) -> Tensor:
    """Return what one parameter gets, checked against it."""
    try:
        value = _first(read, names)
    except SafetensorError as error:
        raise ValueError(f"{names[0]!r} cannot be read: {error}.") from error
    if value is None:
        raise ValueError(f"weights has no {names[0]!r}, which {type(module).__name__} needs.{_stacked(module, name)}")
    parameter = module._parameters[name]
    packed = name == "weight" and format_of(module) is not None
    shape = (module.out_features, module.in_features) if packed else tuple(parameter.shape)
    _check_shape(names[0], value, shape)
    codes = not value.is_floating_point() or value.element_size() == 1
    if codes and (packed or value.dtype != parameter.dtype):
        raise ValueError(f"{names[0]!r} is stored as {value.dtype}, without its scales: give weights in 16 or 32 bits.")
    return value


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name!r} has shape {tuple(value.shape)} in weights, here {shape}.")


def _stacked(module: nn.Module, name: str) -> str:
    """Return what to do about a missing stack of experts: ``save_pretrained`` writes each expert's matrices by themselves."""
    if stored_experts(type(module)) is None:
        return ""
    return " Save the model with save_pretrained(folder, save_original_format=False), or give a function that stacks the experts' matrices."


def _first(read: Weights, names: Iterable[str]) -> Tensor | None:
    """Return the tensor of the first name that there is."""
    for name in names:
        try:
            return read(name)
        except KeyError:
            continue
    return None
