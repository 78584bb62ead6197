"""Copy a model's modules without adapters and without wrappers, over parameters that the caller chooses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_lora.layers.adapting import shallow_copy, unadapt
from lightning_lora.layers.base import LoRALayer
from lightning_lora.utils.torch_private import COMPILED_CHILD, WRAPPED_CHILDREN
from lightning_lora.utils.torch_private_parallel import fsdp2_original

Choose = Callable[[nn.Module, str, nn.Parameter], nn.Parameter]
CONFIGS = ("config", "generation_config")  # what ``save_pretrained`` writes to
GUARDED = ("resize_token_embeddings", "save_pretrained")  # methods of the class that an adapted instance hides


def _the_same(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    return parameter


def plain_copy(model: nn.Module, choose: Choose = _the_same) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """Copy the modules of a model, not its tensors. Buffers and everything else are shared, except the configs of Hugging Face models.

    Args:
        model: adapted or not, merged or not; it does not change.
        choose: gets a module of ``model``, a parameter's name and the parameter; returns the parameter of the copy. The same parameter
            must be returned for names that stay tied.

    Returns:
        The copy, and module of the copy → module of ``model``.
    """
    copies: dict[nn.Module, nn.Module] = {}
    memo: dict[int, Any] = {}

    def copied(module: nn.Module) -> nn.Module:
        module = _unwrapped(module)
        if module not in copies:
            new: nn.Module = shallow_copy(module)
            copies[module] = new
            if isinstance(new, LoRALayer):
                unadapt(new)
            new.__class__ = fsdp2_original(type(new))
            if hasattr(type(new), "save_pretrained"):
                for name in GUARDED:
                    new.__dict__.pop(name, None)
                new.__dict__.update({name: copy.deepcopy(new.__dict__[name], memo) for name in CONFIGS if name in new.__dict__})
            for name, parameter in new._parameters.items():
                new._parameters[name] = None if parameter is None else choose(module, name, parameter)
            for name, child in new._modules.items():
                new._modules[name] = None if child is None else copied(child)
        return copies[module]

    root = copied(model)
    return root, {new: module for module, new in copies.items()}


def _unwrapped(module: nn.Module) -> nn.Module:
    inner = next((child for name in (COMPILED_CHILD, *WRAPPED_CHILDREN) if (child := module._modules.get(name)) is not None), None)
    return module if inner is None else _unwrapped(inner)
