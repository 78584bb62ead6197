"""A module with several weights of its own, such as the experts of a mixture: one adapted layer outside, one layer per weight inside.

:meth:`SeveralWeights.by_weight` presents each weight as a layer of its own. There the weight is called ``weight``, and its factors
``lora_A`` and ``lora_B``. So variants, inits, merging and files need no code for modules with more than one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_lora.layers.base import PREFIX, LoRALayer
from lightning_lora.layers.merge_plans import Plan, plan_merge, plan_unmerge
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.layers.state import AdapterState, Quantized
from lightning_lora.quantization.formats import hand_out, take_back


class SeveralWeights(LoRALayer):
    """Base of the kinds with several adapted weights.

    A kind lists the weights in ``adapted``, sets the kind of a single weight in ``weight_kind``, and defines its own ``forward``. The
    adapter's parameters are those of ``weight_kind`` with the weight's name appended: ``lora_A_down_proj``.
    """

    #: The kind of a single weight. A variant's mixin goes before this kind, not before the module's.
    weight_kind: ClassVar[type[LoRALayer]]
    #: ``weight_kind`` with the variant's mixin; set on the adapted class.
    weight_class: ClassVar[type[Any]]

    @classmethod
    def stacks(cls, base: type) -> dict[str, bool]:
        """Return what can be quantized of modules of a class: names of stacks of matrices (E, m, n) → True if a matrix is (in, out)."""
        return {}

    def by_weight(self) -> dict[str, LoRALayer]:
        """Return weight's name → layer, created at each call over the same tensors.

        Replacing such a layer's ``weight`` does not replace the module's.
        """
        return {name: self._alone(self, name) for name in self.adapted}

    @classmethod
    def _alone(cls, module: Any, name: str) -> Any:
        """Return one weight of a module, adapted or not, as a layer. The layer has the module's own attributes too."""
        made: Any = cls.weight_class
        layer = made.__new__(made)
        own = {short: module._parameters[long] for short, long in cls._names(module._parameters, name).items()}
        layer.__dict__.update(module.__dict__, _parameters={"weight": module._parameters[name], **own}, _modules={})
        state = layer.__dict__.pop("lora_state", None)
        if state is not None:
            layer.__dict__["lora_state"] = state.by_weight[name]
        hand_out(module, name, layer)
        return layer

    @classmethod
    def _names(cls, names: Mapping[str, Any], weight: str) -> dict[str, str]:
        """Return name in the single weight's layer → name in the module, for the adapter parameters of one weight."""
        # A name may end with those of several weights: it belongs to the longest.
        longer = [f"_{other}" for other in cls.adapted if len(other) > len(weight)]
        mine = [name for name in names if name.startswith(PREFIX) and name.endswith(f"_{weight}")]
        return {name.removesuffix(f"_{weight}"): name for name in mine if not any([name.endswith(end) for end in longer])}

    # Construction.

    @classmethod
    def adapter_shapes(cls, module: Any, spec: LayerSpec) -> tuple[tuple[int, ...], ...]:  # type: ignore[override]
        """Return the shapes of A and B, one weight after the other."""
        return tuple(shape for name in cls.adapted for shape in cls.weight_class.adapter_shapes(cls._alone(module, name), spec))

    @classmethod
    def parameter_shapes(cls, module: Any, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Return name → shape of every adapter parameter."""
        shapes = {name: cls.weight_class.parameter_shapes(cls._alone(module, name), spec) for name in cls.adapted}
        return {f"{short}_{name}": shape for name, own in shapes.items() for short, shape in own.items()}

    @classmethod
    def pair_sizes(cls, module: Any, spec: LayerSpec) -> tuple[int, int, int]:
        """Return rank, inputs and outputs of one A and B of the weight whose matrices are the smallest."""
        return min((cls.weight_class.pair_sizes(cls._alone(module, name), spec) for name in cls.adapted), key=lambda sizes: min(sizes[1:]))

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        """Raise ValueError, with the weight's name and the reason, if one of the weights cannot be adapted."""
        for name in cls.adapted:
            try:
                cls.weight_class.check(cls._alone(module, name), spec)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    def init_adapter(self, spec: LayerSpec) -> None:
        """Initialize the adapter weight by weight: each layer creates its parameters, and the module registers them."""
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
        """Reset the adapter to its start."""
        for layer in self.by_weight().values():
            layer.reset_lora_parameters()

    def to_peft(self) -> dict[str, Tensor]:
        """Return the parameters under their own names: PEFT has no names for several weights of one module."""
        return dict(self.lora_parameters())

    # Merging.

    @property  # type: ignore[misc]  # without a setter: a merge by hand does not say into which weight
    def merged(self) -> bool:
        """True if the updates are in the weights."""
        return any(state.merge is not None for state in self.lora_state.by_weight.values())

    @property
    def merge_loss(self) -> float | None:
        """The largest share of a weight's update that rounding lost in the merge.

        None if the layer is not merged.
        """
        return max((layer.merge_loss for layer in self.by_weight().values() if layer.merge_loss is not None), default=None)

    def merge_refusal(self, quantized: Quantized | None = None) -> str | None:
        """Return why one of the updates cannot be merged now, with the weight's name; None if all can."""
        reasons = {name: layer.merge_refusal(quantized) for name, layer in self.by_weight().items()}
        return next((f"{name}: {reason}" for name, reason in reasons.items() if reason), None)

    def merge_weights(
        self, *, device: torch.device | str | None = None, reversible: bool = True, quantized: Quantized | None = None
    ) -> None:
        """Merge into all weights, or into none.

        Raises:
            ValueError: :meth:`merge_refusal` returns a reason.
        """
        reason = None if self.merged else self.merge_refusal(quantized)
        if reason:
            raise ValueError(reason)
        layers = {name: layer for name, layer in self.by_weight().items() if layer.lora_state.merge is None}
        plans = {name: plan_merge(layer, device, reversible, quantized) for name, layer in layers.items()}
        self._carry_out(layers, plans, lambda layer: layer.unmerge_weights())

    def unmerge_weights(self) -> None:
        """Restore all base weights bit for bit, or none.

        Raises:
            ValueError: one of them cannot be restored; all stay merged then.
        """
        layers = {name: layer for name, layer in self.by_weight().items() if layer.lora_state.merge is not None}
        plans, states = {}, {layer: layer.lora_state.copy() for layer in layers.values()}
        for name, layer in layers.items():
            try:
                plans[name] = plan_unmerge(layer)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        self._carry_out(layers, plans, lambda layer: layer.merge_again(states[layer]))
        self.retie()

    def _carry_out(self, layers: Mapping[str, LoRALayer], plans: Mapping[str, Plan], undo: Callable[[LoRALayer], None]) -> None:
        """Carry out all plans, or none."""
        done = []
        try:
            for name, plan in plans.items():
                plan()
                self._keep(name, layers[name])
                done.append(name)
        except BaseException:
            for name in done:
                undo(layers[name])
                self._keep(name, layers[name])
            raise

    def _keep(self, name: str, layer: LoRALayer) -> None:
        """Keep what a plan made of one weight, whose layer it changed."""
        self._parameters[name] = layer.weight
        take_back(self, name, layer)

    def merge_again(self, state: AdapterState) -> None:
        """Repeat the merge of each weight after an unmerge."""
        for name, layer in self.by_weight().items():
            layer.merge_again(state.by_weight[name])
            self._keep(name, layer)
        self.untie(state.untying)
