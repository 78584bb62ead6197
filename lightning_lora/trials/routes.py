"""One forward pass for the rows of several trials, through the model of one of them.

A frozen layer computes all rows at once. An adapted layer computes its base's product for all rows, then each trial's update for that
trial's rows, by that trial's own layer: rank, scaling and dropout are its own. Plain updates of as many rows each are stacked. A layer that
trains in full, a variant whose output is more than base plus update, and a dropout of the base are computed by each trial's own module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.shared_input import SharedInputGroup
from lightning_lora.trials.layout import Layout
from lightning_lora.trials.turns import Turn

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Routes:
    """The layers that the trials do not have in common.

    Args:
        modules: a model of each trial, over one base. The first one computes.
        turns: the trials.

    Raises:
        ValueError: the models differ in more than adapters, or the model itself has parameters that train.
    """

    def __init__(self, modules: Sequence[nn.Module], turns: Sequence[Turn]) -> None:
        self.modules, self.turns = list(modules), list(turns)
        named = [dict(module.named_modules()) for module in modules]
        if any(names.keys() != named[0].keys() for names in named):
            raise ValueError("the trials' models have different modules")
        self._routed: list[tuple[nn.Module, Any]] = []
        above: str | None = None
        for name, module in named[0].items():
            if above is not None and name.startswith(f"{above}."):
                continue  # the trials' own modules compute it
            own = [names[name] for names in named]
            alone = any(map(_is_own, own))
            if alone and not name:
                raise ValueError(f"{type(module).__name__} itself has parameters that train, and its forward is not one of a layer")
            if alone and any(True for _ in module.children()):
                self._routed.append((module, partial(self._own, own)))
                above = name
                continue
            if not all(map(_is_own, own)):
                _check_shared(name, [each for each in own if not _is_own(each)])
            if alone or any(isinstance(each, LoRALayer) for each in own):
                self._routed.append((module, partial(self._adapted, own)))
        self._layout = Layout([])
        self._before: dict[SharedInputGroup, tuple[Tensor, Any]] = {}  # group → its input, and the random numbers before its mask

    @contextmanager
    def through(self, layout: Layout) -> Iterator[None]:
        """Within, the first model computes the rows of all trials, laid out so."""
        self._layout = layout
        with ExitStack() as undo:
            undo.callback(self._before.clear)
            for module, forward in self._routed:
                module.__dict__["forward"] = partial(forward, module)
                undo.callback(module.__dict__.pop, "forward", None)
            yield

    def _own(self, own: list[nn.Module], module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute each trial's rows by its own module, children included."""
        parts = zip(own, self.turns, self._layout.split(x), strict=True)
        return self._layout.join([_alone(each, turn, part, *args, **kwargs) for each, turn, part in parts], x)

    def _adapted(self, own: list[nn.Module], module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the base for all rows, and each trial's update for its rows."""
        inputs = self._layout.split(x)
        shares = next((each for each in own if not _is_own(each)), None)
        bases: list[Tensor] = inputs
        if shares is not None:
            base: Any = shares.base_forward if isinstance(shares, LoRALayer) else partial(type(shares).forward, shares)
            y: Tensor = base(x, *args, **kwargs)
            if self._layout.is_even() and all(map(_stacks, own)):
                return _stacked(own, y, x)
            bases = self._layout.split(y)
        outputs = []
        for layer, turn, part, out in zip(own, self.turns, inputs, bases, strict=True):
            if _is_own(layer):
                out = _alone(layer, turn, part, *args, **kwargs)
            elif isinstance(layer, LoRALayer):
                out = out.clone() if out.ndim == 2 else out  # the update may be added in place
                with self._drawing(layer, turn, part, x) if layer.dropout_now() else nullcontext():
                    out = layer.lora_output(layer.lora_update(out, part))
            outputs.append(out)
        return self._layout.join(outputs, x)

    @contextmanager
    def _drawing(self, layer: LoRALayer, turn: Turn, part: Tensor, x: Tensor) -> Iterator[None]:
        """Let a layer draw its mask. Layers that share an input share a mask, so all of them draw from the same state."""
        group: SharedInputGroup | None = getattr(layer, "shared_input", None)
        if group is not None and group.takes(part):
            held = self._before.get(group)
            if held is not None and held[0] is x:
                turn.random_numbers = held[1]
            self._before[group] = (x, turn.random_numbers)
        with turn.drawing():
            yield


def _stacks(layer: nn.Module) -> bool:
    """Return True if a layer's update can be one of a stack: plain low-rank products of a linear, without a mask, or no update."""
    if not isinstance(layer, LoRALayer):
        return not _is_own(layer)
    return isinstance(layer, LoRALinear) and layer.plain_update and not layer.dropout_now() and not _is_own(layer)


def _stacked(layers: Sequence[nn.Module], y: Tensor, x: Tensor) -> Tensor:
    """Return y plus the update of each trial for its rows, as two products of stacked matrices. Lower ranks are padded with zeros.

    A graphics processor then launches a few kernels a layer, whatever the number of trials.
    """
    pairs = [layer.update_factors() if isinstance(layer, LoRALinear) else None for layer in layers]
    rank, like = max(A.shape[0] for A, _ in filter(None, pairs)), next(filter(None, pairs))[0]
    nothing = like.new_zeros(rank, x.shape[-1]), like.new_zeros(y.shape[-1], rank)
    padded = [nothing if pair is None else _padded(*pair, rank) for pair in pairs]
    A, B = (torch.stack(factors).to(y.dtype) for factors in zip(*padded, strict=True))  # (k, r, in), (k, out, r)
    scales = [layer.scaling if isinstance(layer, LoRALinear) else 0.0 for layer in layers]
    same = len(set(scales)) == 1
    A = A * (scales[0] if same else torch.tensor(scales, dtype=A.dtype).to(A.device, non_blocking=True)[:, None, None])
    k = len(layers)
    with torch.autocast(y.device.type, enabled=False):
        t = torch.bmm(x.to(y.dtype).reshape(k, -1, x.shape[-1]), A.mT)  # (k, n, r)
        return torch.baddbmm(y.reshape(k, -1, y.shape[-1]), t, B.mT).view(y.shape)


def _padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - A.shape[0]
    return (F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))) if missing else (A, B)


def _alone(module: nn.Module, turn: Turn, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute a trial's rows by its own module, with its random numbers."""
    with turn.drawing():
        y: Tensor = type(module).forward(module, x, *args, **kwargs)
    return y


def _is_own(module: nn.Module) -> bool:
    """Return True if each trial's own module has to compute its rows."""
    if not isinstance(module, LoRALayer):
        draws = isinstance(module, DROPOUTS) and module.training and module.p > 0
        return draws or any(p.requires_grad for p in module.parameters(recurse=False))
    plain = type(module).lora_output is LoRALayer.lora_output and not module.has_output_scale
    return not plain or bool(module.children_too) or any(p.requires_grad for p in module.base_parameters().values())


def _check_shared(name: str, own: list[nn.Module]) -> None:
    """Raise ValueError if a module's base parameters are not one and the same in all trials."""
    bases = [dict(each.base_parameters() if isinstance(each, LoRALayer) else each._parameters) for each in own]
    for key, parameter in bases[0].items():
        if any(base.get(key) is not parameter for base in bases):
            raise ValueError(f"{name}.{key} differs between the trials' bases")
