"""Decide what a checkpoint holds of a module: everything but what is proved to be the unchanged base.

A frozen parameter is left out only if both hold:

- The base's fingerprint covers it. So a checkpoint without it does not load onto a base where its value differs.
- Each of its bits is as it was when the adapters were added. A digest of the whole tensor is taken then and at each save. Cheaper checks
  miss changes: an EMA that writes through ``.data`` changes no version counter, and a codebook changes a few rows that a sample misses.

Everything else is saved: adapters; parameters that train or have trained since; frozen parameters that changed (a codebook, an EMA,
weights loaded after ``setup``); and frozen parameters outside the adapted submodule, which no fingerprint covers.

Digests are taken in setup, at the start of training and at saves, never in a step. Each reads its tensor once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lora.adapter_io import fingerprint
from lightning_lora.adapter_io.extras import brought_names, note_brought
from lightning_lora.layers.base import PREFIX, lora_layers
from lightning_lora.model.merge import unmerged
from lightning_lora.strategies.digests import Pass, is_merged
from lightning_lora.strategies.flattened import gathered, parameters
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.sharding import from_all_ranks, is_flattened, is_sharded, local_tensor, reshard

COPIES = 64 << 20  # bytes: frozen tensors up to this sum, the smallest first, are copied at the start, so that they can be reset

_STATES: weakref.WeakKeyDictionary[nn.Module, ChangedState] = weakref.WeakKeyDictionary()


class ChangedState:
    """Tracks which parameters of a module a checkpoint has to hold, as long as the module has its adapters.

    A frozen parameter that a fingerprint covers moves from left to right only (``_moved``: those that changed since training began)::

        _pending (on the meta device)  ── settle ──▶  _reference (has a digest)  ── note: trains, or bits differ ──▶  also _saved

    Attributes:
        wrapped: returns the module as its strategy wrapped it. Under FSDP1 parameters can only be read through the wrapper.
        roots: name of each adapted submodule → the sampled digests of its base (:func:`fingerprint.base_digests`).
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.wrapped: Callable[[], nn.Module] = lambda: self.module
        self.roots: dict[str, dict[str, str]] = {}
        self._begun: set[str] = set()
        self._reference: dict[str, str] | None = None  # frozen and covered → digest when adapters were added, or training began
        self._pending: set[str] = set()  # frozen and covered, but on the meta device then
        self._saved: set[str] = set()  # what trained or changed at any time
        self._moved: set[str] = set()  # what changed since training began; only keys of the reference
        self._small: set[str] = set()  # what is copied, so that it can be reset
        self._copies: dict[str, Tensor] = {}
        self._started = False

    @classmethod
    def of(cls, module: nn.Module) -> ChangedState:
        """Return the state of a module; create it at the first call."""
        if module not in _STATES:
            _STATES[module] = cls(module)
        return _STATES[module]

    @property
    def module(self) -> nn.Module:
        """The module."""
        module = self._module()
        assert module is not None
        return module

    # Record what changes.

    def add(self, root: str, new: bool) -> None:
        """Add an adapted submodule. If ``new``, its adapters were added just now, and earlier records of it are dropped."""
        if new:
            self.drop(root)
        self.roots.setdefault(root, {})

    def drop(self, root: str) -> None:
        """Forget an adapted submodule. Forget everything with the last one."""
        self.roots.pop(root, None)
        self._begun.discard(root)
        for names in (self._saved, self._moved, self._small, self._pending):
            names.difference_update({fqn for fqn in names if _is_within(fqn, [root])})
        for values in (self._reference or {}, self._copies):
            for fqn in [fqn for fqn in values if _is_within(fqn, [root])]:
                del values[fqn]
        if not self.roots:
            self._reference, self._started = None, False
            self._saved.clear()

    def begin(self, root: str) -> None:
        """Take the digests of the base. Call it when ``root`` has its adapters and nothing has trained yet. A second call does nothing."""
        if root in self._begun:
            return
        self._begun.add(root)
        self.roots[root] = fingerprint.base_digests(self.module.get_submodule(root))
        self._saved = {fqn for fqn in self._saved if not _is_within(fqn, [root])}  # trained while only other roots had adapters
        self._note(self._reference or {})
        frozen = {fqn: p for fqn, _, _, p in parameters(self.wrapped()) if self._is_covered(fqn, p)}
        self._pending = {fqn for fqn, p in frozen.items() if p.is_meta}
        self._reference = {fqn: (self._reference or {}).get(fqn, "") for fqn in frozen.keys() - self._pending - self._saved}
        left = COPIES
        for fqn in sorted(self._reference, key=lambda fqn: frozen[fqn].nbytes):
            left -= frozen[fqn].nbytes
            if left >= 0 and type(local_tensor(frozen[fqn].detach())) is Tensor:  # a quantized weight does not change
                self._small.add(fqn)
        self.rebase()

    def note(self) -> None:
        """Find what trains or has changed by now; a collective under sharding."""
        if self._reference is not None:
            self._note(self._reference)

    def rebase(self) -> None:
        """Take the digests anew after the strategy cast or sharded tensors, which is no change. Call :meth:`note` before that."""
        here, copies = Pass(), dict[int, tuple[Tensor, Tensor]]()  # by identity: modules may share a parameter
        for fqn, owner, name, p in parameters(self.wrapped()):
            if self._reference is not None and fqn in self._reference and fqn not in self._moved:
                self._reference[fqn] = here.digest(owner, name, p) or self._reference[fqn]
                if fqn in self._small and not is_merged(owner, name):
                    if id(p) not in copies:
                        copies[id(p)] = p, local_tensor(p.detach()).to("cpu", copy=True)
                    self._copies[fqn] = copies[id(p)][1]

    def start(self) -> None:
        """Note that training begins. What was on the meta device has its values by now. Changes from here on can be reset."""
        self.settle()
        if not self._started:
            self.note()
            self.rebase()
            self._started = self._reference is not None

    def settle(self) -> None:
        """Take the digests of what was on the meta device, once it has values."""
        if self._pending and self._reference is not None and not any(p.is_meta for _, _, _, p in parameters(self.wrapped())):
            self._reference |= {fqn: "" for fqn in self._pending - self._saved}
            self._pending = set()
            self.roots = {root: fingerprint.base_digests(self.module.get_submodule(root)) for root in self.roots}
            self.rebase()

    def bring(self) -> None:
        """Mark what training moved of the base, so that an adapter folder of the module holds it too; a collective under sharding."""
        self.note()
        note_brought(self.module, brought_names(self.module) | self._moved)

    # What a checkpoint holds.

    def holds(self, fqn: str) -> bool:
        """Return True if a checkpoint holds this parameter, as far as is known now."""
        base = self._reference is not None and (fqn in self._reference or fqn in self._pending)
        return fqn.rpartition(".")[2].startswith(PREFIX) or fqn in self._saved or not base

    def tensors(self, whole: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return name → what a checkpoint holds of each parameter that it holds; a collective under sharding.

        Args:
            whole: returns what is saved of a tensor.
        """
        for root in self.roots:
            self.begin(root)
        self.settle()
        self.note()
        self._started = True
        names = {clean_name(name): p for name, p in self.module.named_parameters() if self.holds(clean_name(name)) and not is_lazy(p)}
        layers = [(clean_name(name), layer) for name, layer in lora_layers(self.module) if layer.merged]
        if any(f"{fqn}.{name}" in names for fqn, layer in layers for name in layer.adapted):
            with unmerged(self.module):
                return {name: value.clone() for name, value in self._values(names, whole).items()}
        return self._values(names, whole)

    def _values(self, names: dict[str, Any], whole: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        if not is_flattened(self.wrapped()):
            return {name: whole(p.detach()) for name, p in names.items()}
        found = {fqn: p.detach().clone() for fqn, p in gathered(self.wrapped(), names)}
        return {name: found[name] for name in names if name in found}

    def required(self, present: Collection[str]) -> list[str]:
        """Return the names that a checkpoint must have here and lacks.

        Args:
            present: names that it has.
        """
        resettable = set(self._reference or ()) if self._started else set()
        needed = []
        for fqn, p in ((clean_name(name), p) for name, p in self.module.named_parameters()):
            trains = p.requires_grad or fqn.rpartition(".")[2].startswith(PREFIX)
            if fqn not in present and ((trains and fqn not in resettable) or not _is_within(fqn, self.roots)):
                needed.append(fqn)
        return sorted(needed)

    def check_base(self, root: str, present: Collection[str], saved: dict[str, Any], where: str) -> None:
        """Compare the base of an adapted submodule, without what a checkpoint holds, with the base that the checkpoint was trained on.

        Raises:
            ValueError: they differ.
        """
        self.settle()
        module, then = self.module.get_submodule(root), self.identity(root, present)
        if then["fingerprint"] != saved["fingerprint"]:  # both bases may have been loaded after setup: compare present values
            then = fingerprint.identity_of(module, fingerprint.base_digests(module), self._relative(root, present))
        fingerprint.check_base(then, saved, where)

    def identity(self, root: str, present: Collection[str]) -> dict[str, Any]:
        """Return the identity that the base of an adapted submodule had before training, without what a checkpoint holds."""
        module = self.module.get_submodule(root)
        digests = self.roots.get(root) or fingerprint.base_digests(module)
        return fingerprint.identity_of(module, digests, self._relative(root, present))

    def check_reset(self, present: Collection[str], where: str) -> None:
        """Refuse a checkpoint that leaves out a parameter that has changed here and cannot be reset.

        Raises:
            ValueError: there is one. The message names the first.
        """
        self.note()
        lost = sorted(fqn for fqn in self._moved - set(present) if fqn not in self._copies)
        if lost:
            raise ValueError(
                f"{where} was written before {lost[0]!r} changed in training ({len(lost)} such parameters). So it leaves them out"
                " as base, and their earlier values are not kept here: load the checkpoint into a newly made module."
            )

    def reset(self, present: Collection[str]) -> dict[str, Tensor]:
        """Return name → value when training began (this rank's shard) of what changed since and a checkpoint leaves out."""
        return {fqn: self._copies[fqn] for fqn in self._moved - set(present)}

    # Find changes.

    def _note(self, reference: dict[str, str]) -> None:
        reshard(self.module)
        trains, changed, sharded, here = set(), set(), False, Pass()
        for fqn, owner, name, p in parameters(self.wrapped()):
            sharded |= is_sharded(p)
            if p.requires_grad and not name.startswith(PREFIX):
                trains.add(fqn)
            known = fqn in reference and fqn not in self._moved
            if known and here.digest(owner, name, p) not in (None, reference[fqn]) and not self._is_cast(fqn, p):
                changed.add(fqn)
        if sharded:
            changed = set().union(*from_all_ranks(changed))
        self._saved |= trains | changed
        if self._started:
            self._moved |= changed

    def _is_cast(self, fqn: str, p: Tensor) -> bool:
        """Return True if only the dtype changed: some layers cast their bias in the first forward pass."""
        then, now = self._copies.get(fqn), local_tensor(p.detach())
        return then is not None and then.dtype != now.dtype and torch.equal(then.to(now.dtype), now.cpu())

    def _is_covered(self, fqn: str, p: nn.Parameter) -> bool:
        return not (p.requires_grad or is_lazy(p) or fqn.rpartition(".")[2].startswith(PREFIX)) and _is_within(fqn, self.roots)

    def _relative(self, root: str, names: Collection[str]) -> set[str]:
        return {name.removeprefix(f"{root}." if root else "") for name in names}


def _is_within(fqn: str, roots: Collection[str]) -> bool:
    return any(not root or fqn.startswith(f"{root}.") for root in roots)
