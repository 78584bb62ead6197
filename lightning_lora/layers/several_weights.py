"""A module with several weights of its own, such as the experts of a mixture: one adapted layer outside, one layer per weight inside.

:meth:`SeveralWeights.by_weight` shows each weight as a layer that has this weight alone, as ``weight``, with its factors as ``lora_A``
and ``lora_B``. So variants, inits, merging and files see what they always see, and neither knows that the module has more than one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_lora.layers.base import PREFIX, LoRALayer
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.layers.state import AdapterState, Quantized


class SeveralWeights(LoRALayer):
    """What kinds with several adapted weights share.

    A kind names them in ``adapted``, says in ``weight_kind`` what each is by itself, and has a ``forward`` of its own. The adapter's
    parameters are those of ``weight_kind`` with the weight's name behind: ``lora_A_down_proj``.
    """

    #: The kind of one weight by itself. A variant stands before this one, not before the module's.
    weight_kind: ClassVar[type[LoRALayer]]
    #: ``weight_kind`` with the variant; the adapted class has it.
    weight_class: ClassVar[type[Any]]

    def by_weight(self) -> dict[str, LoRALayer]:
        """Weight's name → layer, made anew over the same tensors: what is put in place of its ``weight`` stays there only."""
        return {name: self._alone(self, name) for name in self.adapted}

    @classmethod
    def _alone(cls, module: Any, name: str) -> Any:
        """One weight of a module, adapted or not, as a layer; the module's own attributes are there too."""
        made: Any = cls.weight_class
        layer = made.__new__(made)
        own = {short: module._parameters[long] for short, long in cls._names(module._parameters, name).items()}
        layer.__dict__.update(module.__dict__, _parameters={"weight": module._parameters[name], **own}, _modules={})
        state = layer.__dict__.pop("lora_state", None)
        if state is not None:
            layer.__dict__["lora_state"] = state.by_weight[name]
        return layer

    @classmethod
    def _names(cls, names: Mapping[str, Any], weight: str) -> dict[str, str]:
        """Name in the weight's own layer → name in the module, of the adapter's parameters of one weight."""
        owners = {long: max((w for w in cls.adapted if long.endswith(f"_{w}")), key=len) for long in names if long.startswith(PREFIX)}
        return {long.removesuffix(f"_{weight}"): long for long, owner in owners.items() if owner == weight}

    # Construction.

    @classmethod
    def adapter_shapes(cls, module: Any, spec: LayerSpec) -> tuple[tuple[int, ...], ...]:  # type: ignore[override]
        """Shapes of A and B, one weight after the other."""
        return tuple(shape for name in cls.adapted for shape in cls.weight_class.adapter_shapes(cls._alone(module, name), spec))

    @classmethod
    def parameter_shapes(cls, module: Any, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Name → shape of every adapter parameter."""
        shapes = {name: cls.weight_class.parameter_shapes(cls._alone(module, name), spec) for name in cls.adapted}
        return {f"{short}_{name}": shape for name, own in shapes.items() for short, shape in own.items()}

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        """Raise ValueError, with the weight's name and the reason, if one of them cannot be adapted."""
        for name in cls.adapted:
            try:
                cls.weight_class.check(cls._alone(module, name), spec)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    def init_adapter(self, spec: LayerSpec) -> None:
        """As every kind, weight by weight: each layer makes its parameters, and the module takes them."""
        layers = self.by_weight()
        for name, layer in layers.items():
            layer.init_adapter(spec)
            for short, parameter in layer.lora_parameters().items():
                self.register_parameter(f"{short}_{name}", parameter)
            self.__dict__["lora_dropout"] = layer.lora_dropout
        self.lora_state = AdapterState(spec, by_weight={name: layer.lora_state for name, layer in layers.items()})
        for parameter in self.base_parameters().values():
            parameter.requires_grad_(False)

    def reset_lora_parameters(self) -> None:
        """Start the adapter anew."""
        for layer in self.by_weight().values():
            layer.reset_lora_parameters()

    def to_peft(self) -> dict[str, Tensor]:
        """The parameters under their own names: PEFT has none for several weights of a module here."""
        return dict(self.lora_parameters())

    # Merging.

    @property
    def merged(self) -> bool:
        """Whether the updates are in the weights."""
        return any(state.merge is not None for state in self.lora_state.by_weight.values())

    @property
    def merge_loss(self) -> float | None:
        """The largest share of a weight's update that rounding lost in the merge; None if the layer is not merged."""
        return max((layer.merge_loss for layer in self.by_weight().values() if layer.merge_loss is not None), default=None)

    def merge_refusal(self, quantized: Quantized | None = None) -> str | None:
        """Why one of the updates cannot be merged now, with the weight's name; None if all can."""
        reasons = {name: layer.merge_refusal(quantized) for name, layer in self.by_weight().items()}
        return next((f"{name}: {reason}" for name, reason in reasons.items() if reason), None)

    def merge_weights(
        self, *, device: torch.device | str | None = None, reversible: bool = True, quantized: Quantized | None = None
    ) -> None:
        """Merge into each weight; all of them or, where :meth:`merge_refusal` has a reason, none."""
        reason = None if self.merged else self.merge_refusal(quantized)
        if reason:
            raise ValueError(reason)
        for name, layer in self.by_weight().items():
            layer.merge_weights(device=device, reversible=reversible, quantized=quantized)
            self._parameters[name] = layer.weight

    def unmerge_weights(self) -> None:
        """Put each base weight back bit for bit; all of them or, on an error, none."""
        before = self.lora_state.copy()
        done: dict[str, LoRALayer] = {}
        for name, layer in self.by_weight().items():
            try:
                layer.unmerge_weights()
            except ValueError as error:
                for earlier, restored in done.items():
                    restored.merge_again(before.by_weight[earlier])
                    self._parameters[earlier] = restored.weight
                raise ValueError(f"{name}: {error}") from error
            self._parameters[name] = layer.weight
            if before.by_weight[name].merge is not None:
                done[name] = layer
        self.retie()

    def merge_again(self, state: AdapterState) -> None:
        """Merge each weight as before an unmerge."""
        for name, layer in self.by_weight().items():
            layer.merge_again(state.by_weight[name])
            self._parameters[name] = layer.weight
        self.untie(state.untied)
