"""What is right for a model with adapters on all that all-linear takes: each acts, merging changes nothing, gradients flow."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, merge_lora
from lightning_lora.layers.base import lora_layers

CONFIG = LoRAConfig(rank=2, target_modules="all-linear", modules_to_save=[])


def faults(model: nn.Module, inputs: dict[str, Tensor], config: LoRAConfig = CONFIG) -> list[str]:
    """What is wrong, in words; the model is adapted by it. In float64 where the model itself can compute so."""
    model, inputs, exact = in_float64(model, inputs)
    base = outputs(model, inputs)
    apply_lora(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in get_lora_parameters(model):
            parameter.normal_(std=0.1, generator=generator)
    found = [f"dead adapter: {name}" for name in dead(model, inputs)]
    found += crash(model, inputs)
    alone = outputs(model.eval(), inputs)  # the step in training moved running statistics
    merge_lora(model)
    together = outputs(model, inputs)
    effect, error = (alone - base).norm(), (alone - together).norm()
    if not error <= (1e-6 if exact else 2e-3) * effect:
        found.append(f"wrong merge: merged differs from unmerged by {float(error / effect):.1e} of the adapters' effect")
    return found


def in_float64(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor], bool]:
    """The model in the widest dtype in which its own forward runs."""
    wide = copy.deepcopy(model).double()
    double = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    try:
        outputs(wide, double)
    except RuntimeError:  # fp32 is written into its forward
        return model, inputs, False
    return wide, double, True


def outputs(model: nn.Module, inputs: dict[str, Tensor], grad: bool = False) -> Tensor:
    """All that the model returns, in one vector."""
    with torch.set_grad_enabled(grad):
        torch.manual_seed(3)  # masks and codebooks are random in some
        return torch.cat([tensor.flatten().double() for tensor in tensors(model(**inputs))])


def tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)


def dead(model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[str]:
    """The adapters that do not act where the weight does: another B changes nothing in the output, another weight does."""
    parts = [(fqn, layer, layer.by_weight()) for fqn, layer in lora_layers(model)]
    layers = {fqn if len(own) == 1 else f"{fqn}.{name}": part for fqn, _, own in parts for name, part in own.items()}
    y = outputs(model, inputs, grad=True)
    gradients = torch.autograd.grad(y.square().sum(), [layer.lora_B for layer in layers.values()], allow_unused=True)
    for (name, layer), gradient in zip(layers.items(), gradients, strict=True):
        if gradient is None or not gradient.any():
            changes = [not torch.equal(changed(model, inputs, tensor), y.detach()) for tensor in (layer.lora_B, layer.weight)]
            if changes == [False, True]:
                yield name


def changed(model: nn.Module, inputs: dict[str, Tensor], tensor: Tensor) -> Tensor:
    """The outputs with one tensor changed."""
    kept = tensor.detach().clone()
    with torch.no_grad():
        tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
        y = outputs(model, inputs)
        tensor.copy_(kept)
    return y


def crash(model: nn.Module, inputs: dict[str, Tensor]) -> list[str]:
    """A step in training mode."""
    try:
        outputs(model.train(), inputs, grad=True).square().sum().backward()
    except RuntimeError as error:
        return [f"crash in training: {str(error).splitlines()[0]}"]
    return []
