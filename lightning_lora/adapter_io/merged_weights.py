"""Compute the weights of a model as a merge leaves them, each when it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.base import PREFIX, LoRALayer
from lightning_lora.model.ties import tied_weights
from lightning_lora.quantization.formats import QUANTIZED_FORMATS, dequantized, format_of, single, unknown_storage
from lightning_lora.utils.deferred import DeferredTensor
from lightning_lora.utils.names import clean_name, join
from lightning_lora.utils.sharding import flattened, full_tensor, gathered, gathered_parameters
from lightning_lora.utils.transformers_conventions import forget_placement, forget_quantizer, quantizing_library

# A merge dequantizes their formats. "fp8" is what transformers calls its own.
LIBRARIES = {"fp8", *(name.partition(".")[0] for name in QUANTIZED_FORMATS)}


class MergedWeights:
    """Reads the parameters of a model in full, merged and dequantized.

    Attributes:
        ask: number of a weight → its value on the CPU. Under sharding it makes all ranks compute that weight; the default computes it here.
    """

    def __init__(self, root: nn.Module) -> None:
        """Look at every parameter once. Under sharding every rank has to create one.

        Args:
            root: the model; it does not change.

        Raises:
            ValueError: a weight cannot be merged or dequantized; the message names it.
        """
        self.ask: Callable[[int], Tensor] = self.read
        self._units = flattened(root)
        self._places: list[tuple[nn.Module, str]] = []  # number → module and name of its parameter
        self._parameters: dict[tuple[nn.Module, str], nn.Parameter] = {}
        self._last: tuple[int, Tensor] | None = None  # pieces of one weight are read one after the other
        shared: dict[int, nn.Parameter] = {}
        apart = tied_weights(root)
        self._packed = any(format_of(module) is not None for module in root.modules())
        for module_name, module, name, parameter in gathered_parameters(root):
            if name.startswith(PREFIX):
                continue
            fqn = join(module_name, name)
            reason = self._refusal(module, name, parameter)
            if reason is not None:
                raise ValueError(f"{clean_name(fqn).removesuffix('.weight')!r} cannot be exported: {reason}.")
            if fqn in apart or id(parameter) not in shared:
                deferred = self._defer(module, name, fqn)
                if fqn not in apart:
                    shared[id(parameter)] = deferred
                self._parameters[module, name] = deferred
            else:
                self._parameters[module, name] = shared[id(parameter)]

    def deferred(self, module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """Return the parameter of a plain copy of the model, as :func:`~lightning_lora.model.plain_copy.plain_copy` asks for it."""
        return self._parameters[module, name]

    def make_plain(self, originals: dict[nn.Module, nn.Module]) -> None:
        """Remove from a plain copy of the model what says how its weights were stored.

        Args:
            originals: module of the copy → module of the model.
        """
        for copy, module in originals.items():
            how = format_of(module)
            if how is not None:
                for name in how.attributes:
                    copy.__dict__.pop(name, None)
                    copy._parameters.pop(name, None)
                copy.__class__ = how.unpacked_class(copy) or copy.__class__
            if hasattr(type(copy), "save_pretrained"):  # others have no configs of their own in a copy
                forget_placement(copy)
                if self._packed or quantizing_library(copy) in LIBRARIES:
                    forget_quantizer(copy)

    @torch.no_grad()
    def read(self, number: int) -> Tensor:
        """Compute a weight, on the CPU. Under sharding every rank has to call it."""
        if self._last is None or self._last[0] != number:
            self._last = None
            module, name = self._places[number]
            unit = self._units.get(module)
            with gathered(unit):
                value = _merged(module, name).cpu().contiguous()
                self._last = number, value if unit is None else value.clone()  # FSDP1 frees what it gathered
        return self._last[1]

    def _refusal(self, module: nn.Module, name: str, parameter: nn.Parameter) -> str | None:
        layer, stored, packing = _layer(module, name), unknown_storage(module, name), format_of(module)
        if packing is not None and not packing.packed(module):  # what its tensors hold is not known
            return packing.refusal(module)
        if parameter.is_meta:
            return f"{name} is on the meta device: load the model, without offloading"
        if stored is not None:
            of_a_class = "." in stored.removeprefix("torch.")  # no dtype: a tensor subclass may hold anything
            if of_a_class or (self._packed and parameter.element_size() == 1):
                return f"{name} is stored as {stored}, a format that is not known here"
        return layer.merge_refusal("dequantize") if isinstance(layer, LoRALayer) and not layer.merged else None

    def _defer(self, module: nn.Module, name: str, fqn: str) -> nn.Parameter:
        number = len(self._places)
        self._places.append((module, name))
        layer = _layer(module, name)
        try:
            like = module._parameters[name] if layer is None or format_of(layer) is None else dequantized(layer)
        except ValueError as error:
            raise ValueError(f"{clean_name(fqn).removesuffix('.weight')!r} cannot be exported: {error}.") from error
        assert like is not None
        meta = torch.empty(like.shape, dtype=like.dtype, device="meta")
        return nn.Parameter(DeferredTensor(meta, lambda: self.ask(number)), requires_grad=False)


def _layer(module: nn.Module, name: str) -> Any:
    """Return the layer that has the parameter as its ``weight``; None for a parameter that is no weight."""
    return module.by_weight().get(name) if isinstance(module, LoRALayer) else single(module, name)


def _merged(module: nn.Module, name: str) -> Tensor:
    layer = _layer(module, name)
    if isinstance(layer, LoRALayer) and not layer.merged:
        return layer.merged_weight()[0]
    if layer is not None and format_of(layer) is not None:
        return dequantized(layer)
    if isinstance(module, LoRALayer) and not module.merged and (value := module.merged_beside(name)) is not None:
        return value
    parameter = module._parameters[name]
    assert parameter is not None
    return full_tensor(parameter.detach())
