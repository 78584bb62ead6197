"""Several adapters on one base, by name: ``load_adapters``. For inference; one base is in memory.

Each layer that any of the adapters has becomes a plain LoRA layer. The adapters' factors wait beside it, padded to one rank and with their
scaling multiplied into B. To switch is to copy them into the layer's own parameters: shapes stay, so nothing is compiled again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapter_io.fitting import checked_adapter
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import LoRALayer, lora_layers
from lightning_lora.model.apply import inject, unload_lora
from lightning_lora.model.modes import restore_flags
from lightning_lora.model.targeting import find_targets
from lightning_lora.utils.messages import counted
from lightning_lora.utils.names import adapter_root, clean_name
from lightning_lora.utils.patterns import exactly
from lightning_lora.utils.sharding import local_shard, local_tensor

Pair = tuple[Tensor, Tensor]  # A and scaling · B


def load_adapters(model: nn.Module, adapters: Mapping[str, str | Path], *, check_base: bool = True) -> AdapterSet:
    """Put several adapters on one base, and make the first of them active.

    Args:
        model: a base model without LoRA, or a LightningModule around one. Its adapters' parameters do not train.
        adapters: name → a folder (ours or PEFT's) or a checkpoint of :class:`~lightning_lora.LoRACallback`.
        check_base: refuse adapters that were trained on another base.

    Raises:
        ValueError: the model has LoRA, or an adapter cannot be read, does not fit, or is more than B·A on each layer (DoRA, modules trained
            in full). The model is unchanged then.

    Examples:
        >>> adapters = load_adapters(model, {"legal": "runs/legal/adapter", "polite": "runs/polite/adapter"})
        >>> with adapters.rows(["legal", None]):  # an adapter for each row of the batch; None: the base alone
        ...     logits = model(**batch).logits
    """
    if not isinstance(adapters, Mapping) or not adapters:
        raise ValueError(
            f'adapters={adapters!r}: give a dict with at least one name and folder, such as {{"legal": "runs/legal/adapter"}}.'
        )
    _, root = adapter_root(model)
    if there := next((name for name, _ in lora_layers(root)), None):
        raise ValueError(f"{there!r} has LoRA already; call unload_lora(model), and name that adapter's folder too.")
    read = {name: _read(root, path, check_base) for name, path in adapters.items()}
    ranks: dict[str, int] = {}
    for pairs in read.values():
        for fqn, (A, _) in pairs.items():
            ranks[fqn] = max(ranks.get(fqn, 0), A.shape[0])
    exact = {exactly(fqn): rank for fqn, rank in ranks.items()}
    alphas = {name: float(rank) for name, rank in exact.items()}  # scaling 1
    config = LoRAConfig(target_modules=list(exact), rank_pattern=exact, alpha_pattern=alphas, modules_to_save=[])
    found = AdapterSet(root, check_base)
    with ExitStack() as undo:
        undo.callback(restore_flags, [(parameter, parameter.requires_grad) for parameter in root.parameters()])
        inject(root, config, find_targets(root, config))
        undo.callback(unload_lora, root)
        for _, layer in lora_layers(root):
            for parameter in layer.lora_parameters().values():
                parameter.requires_grad_(False)
        for name, pairs in read.items():
            found.pairs[name] = found.fitted(name, pairs)
        found.use(next(iter(adapters)))
        undo.pop_all()
    return found


class AdapterSet:
    """The adapters that :func:`load_adapters` put on a model.

    The choice is on the model's layers, so all threads that run the model see it.

    Attributes:
        active: name of the active adapter; None: the base alone.
        pairs: name → layer → its factors.

    Examples:
        >>> adapters = load_adapters(model, {"legal": "runs/legal/adapter", "polite": "runs/polite/adapter"})
        >>> type(adapters).__name__, adapters.active
        ('AdapterSet', 'legal')
        >>> adapters.use("polite")
        >>> adapters.add("terse", "runs/terse/adapter")
        >>> adapters.remove("legal")
        >>> adapters.use(None)  # the base alone
    """

    def __init__(self, root: nn.Module, check_base: bool) -> None:
        self.root, self.check_base = root, check_base
        self.active: str | None = None
        self.pairs: dict[str, dict[str, Pair]] = {}

    def __repr__(self) -> str:
        return f"AdapterSet({', '.join(map(repr, self.names))}; active: {self.active!r})"

    @property
    def names(self) -> list[str]:
        """The adapters' names."""
        return list(self.pairs)

    def use(self, name: str | None) -> None:
        """Make an adapter active; with None the base computes alone.

        Raises:
            ValueError: there is none of that name, or the model is merged.
        """
        self._check(name)
        with torch.no_grad():
            for fqn, layer in self._layers():
                pair = self.pairs[name].get(fqn) if name is not None else None
                layer.lora_state.base_alone = name is None
                for k, factor in enumerate((layer.lora_A, layer.lora_B)):
                    if pair is None:
                        local_tensor(factor).zero_()
                    else:
                        local_tensor(factor).copy_(local_shard(pair[k], factor))
        self.active = name

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Make an adapter active within the ``with`` block."""
        before = self.active
        self.use(name)
        try:
            yield
        finally:
            self.use(before)

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Give each row of a batch its own adapter within the ``with`` block; None: the base alone.

        Each layer computes the base's product once for all rows, and the update of each adapter for its rows. Compiled blocks are compiled
        once more.

        Args:
            names: one for each row, in order. Where a model multiplies rows, as beam search does, name each of the resulting rows.

        Raises:
            ValueError: there is no adapter of a name, or the model is merged; in a forward pass, that a layer's input has another number
                of rows, as behind a router of experts.
        """
        if isinstance(names, str):
            raise ValueError(f"rows({names!r}): give a list with a name for each row, such as [{names!r}, None].")
        for name in names:
            self._check(name)
        before = {layer: layer.__dict__.get("forward") for _, layer in self._layers()}  # of rows around these
        layers = list(self._layers())
        index = {name: torch.tensor([k for k, each in enumerate(names) if each == name]) for name in names if name is not None}
        try:
            for fqn, layer in layers:
                mine = [(self.pairs[name][fqn], rows) for name, rows in index.items() if fqn in self.pairs[name]]
                layer.__dict__["forward"] = partial(_by_rows, layer, fqn, len(names), mine)
            yield
        finally:
            for layer, forward in before.items():
                layer.__dict__.pop("forward", None)
                if forward is not None:
                    layer.__dict__["forward"] = forward

    def add(self, name: str, path: str | Path) -> None:
        """Load one more adapter, or replace the one of that name.

        Raises:
            ValueError: it cannot be read, does not fit the model, or has a layer or a rank that this model was not made for.
        """
        self.pairs[name] = self.fitted(name, _read(self.root, path, self.check_base))
        if name == self.active:
            self.use(name)

    def remove(self, name: str) -> None:
        """Forget an adapter. If it is active, the base computes alone from then on.

        Raises:
            ValueError: there is none of that name.
        """
        self._check(name)
        if name == self.active:
            self.use(None)
        del self.pairs[name]

    def fitted(self, name: str, pairs: dict[str, Pair]) -> dict[str, Pair]:
        """Return pairs on their layers' devices and padded to their ranks."""
        layers, found = dict(self._layers()), {}
        for fqn, (A, B) in pairs.items():
            layer = layers.get(fqn)
            if layer is None or A.shape[0] > layer.rank:
                room = "no adapter" if layer is None else f"room for rank {layer.rank}"
                raise ValueError(f"{name!r} has rank {A.shape[0]} on {fqn!r}, where this model has {room}; make a new set with it.")
            missing, like = layer.rank - A.shape[0], layer.lora_A
            A, B = A.to(like.device, like.dtype), B.to(like.device, like.dtype)
            A = torch.cat([A, A.new_zeros(missing, *A.shape[1:])])
            found[fqn] = A, torch.cat([B, B.new_zeros(B.shape[0], missing, *B.shape[2:])], 1)
        return found

    def _layers(self) -> Iterator[tuple[str, LoRALayer]]:
        return ((clean_name(name), layer) for name, layer in lora_layers(self.root))

    def _check(self, name: str | None) -> None:
        if name is not None and name not in self.pairs:
            raise ValueError(f"{name!r} is no adapter of this model; there are {', '.join(self.pairs)}.")
        if not any(True for _ in self._layers()):
            raise ValueError("LoRA was taken out of this model (unload_lora): call load_adapters(model, folders) again.")
        merged = next((fqn for fqn, layer in self._layers() if layer.merged), None)
        if merged is not None:
            raise ValueError(f"{merged!r} is merged; call unmerge_lora(model) first.")


def _read(root: nn.Module, path: str | Path, check_base: bool) -> dict[str, Pair]:
    """Return layer → A and scaling · B of an adapter, checked against the model."""
    adapter, report, tensors, brought = checked_adapter(root, path, check_base=check_base, allow_nonfinite=False)
    adapter.check_intact(str(path))
    names = {f"{clean_name(target.fqn)}.{part}" for target in report.targets for part in ("lora_A", "lora_B")}
    if others := sorted((tensors.keys() - names) | brought | adapter.extra_state.keys() | adapter.outside.keys()):
        raise ValueError(
            f"{path}: {others[0]!r} is more than a low-rank pair (DoRA, VeRA, experts, token rows, modules trained in full), and named"
            " adapters are pairs only: load it alone, with load_adapter."
        )
    pairs = {}
    for target in report.targets:
        A, B = (tensors[f"{clean_name(target.fqn)}.{part}"] for part in ("lora_A", "lora_B"))
        if target.spec.slices is not None:
            B = target.spec.slices.placed(B)  # a pair on the whole fused projection
        if A.shape[0] != B.shape[1]:
            raise ValueError(f"{path}: {target.fqn!r} is a grouped convolution, whose rank cannot be padded; load it alone.")
        pairs[clean_name(target.fqn)] = A, B.to(torch.promote_types(B.dtype, torch.float32)) * target.spec.scaling
    return pairs


def _by_rows(layer: Any, fqn: str, count: int, mine: list[tuple[Pair, Tensor]], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute a layer whose rows have adapters of their own."""
    y: Tensor = layer.base_forward(x, *args, **kwargs)
    if layer.disabled:
        return y
    if x.shape[0] != count:
        raise ValueError(
            f"{fqn!r} got {counted(x.shape[0], 'row')}, and rows([...]) named {count}; name one for each row that the layer sees."
        )
    for pair, rows in mine:
        rows = rows.to(x.device)
        layer.__dict__["update_factors"] = lambda pair=pair: pair
        try:
            update = layer.lora_update(y[rows], x[rows])
        finally:
            del layer.__dict__["update_factors"]
        y = y.index_copy(0, rows, update)
    return y
