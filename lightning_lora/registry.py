"""The three tables that names and types are looked up in: kinds, variants, inits.

They stand below everything that fills or reads them, so that none of the files that register names another: a layer
kind knows shapes, a variant a formula, an init how to fill tensors, and this file that they exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

KINDS: dict[str, type] = {}  # qualified name of a module type → the LoRALayer subclass that adapts it
KIND_NAMES: dict[str, type] = {}  # name in config.kind_pattern → kind
VARIANTS: dict[str, type] = {}  # config.variant → the mixin that goes before the kind
INITS: dict[str, Callable[[Any], None]] = {}  # config.init → a function that fills a layer's A and B

T = TypeVar("T")
Init = TypeVar("Init", bound=Callable[[Any], None])


def qualified_name(cls: type) -> str:
    """``package.module.Class``: the key that lets an optional library's type be registered without importing it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def register_kind(*names: str | type, name: str | None = None) -> Callable[[type[T]], type[T]]:
    """Class decorator: adapt modules of these types, and of their subclasses, with the decorated class.

    Args:
        names: module types, or their qualified names (``package.module.Class``), so that their library need not be imported.
        name: of the kind, by which ``LoRAConfig.kind_pattern`` chooses it for modules whose type does not tell.


    Raises:
        ValueError: another class adapts that type already.
    """
    keys = [each if isinstance(each, str) else qualified_name(each) for each in names]

    def add(kind: type[T]) -> type[T]:
        _add(KIND_NAMES, "kind", [] if name is None else [name], kind)
        return _add(KINDS, "kind", keys, kind)

    return add


def register_variant(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: ``LoRAConfig(variant=name)`` puts the decorated mixin before the kind in a layer's MRO.

    Args:
        name: what configs call it.

    Raises:
        ValueError: another variant has that name.
    """
    return lambda variant: _add(VARIANTS, "variant", [name], variant)


def register_init(name: str) -> Callable[[T], T]:
    """Function decorator: ``LoRAConfig(init=name)`` starts a layer's A and B with the decorated function, which takes the layer.

    Args:
        name: what configs call it.

    Raises:
        ValueError: another init has that name.
    """
    return lambda init: _add(INITS, "init", [name], init)


def _add(table: dict[str, Any], what: str, names: Sequence[str], entry: T) -> T:
    """File an entry under every name, or under none: one that is taken by something else stays as it is."""
    taken = [name for name in names if table.get(name, entry) is not entry]
    if taken:
        raise ValueError(f"{what} {taken[0]!r} is registered already, as {table[taken[0]]!r}; choose another name.")
    table.update(dict.fromkeys(names, entry))
    return entry


def keeps_start(init: Init) -> Init:
    """Decorator: with this init B·A is not zero at the start, so a layer keeps the start and adds the difference to it."""
    init.keeps_start = True  # type: ignore[attr-defined]
    return init


def has_start(init: str) -> bool:
    """Whether layers with this init keep their start."""
    return getattr(look_up(INITS, "init", init), "keeps_start", False)


def look_up(table: dict[str, T], field: str, name: str) -> T:
    """The entry of a table that the config names.

    Raises:
        ValueError: there is none; the message lists what there is.
    """
    if name not in table:
        raise ValueError(f"{field}={name!r} is not known; there are {', '.join(sorted(table))}.")
    return table[name]


def kind_of(cls: type[nn.Module]) -> type | None:
    """The kind that adapts modules of this class, by the first registered type in its MRO; None for an unsupported one."""
    return next((KINDS[name] for name in map(qualified_name, cls.__mro__) if name in KINDS), None)


def why_refused(module: nn.Module, fqn: str) -> str:
    """The message for a module that no kind adapts: its name, its type, the kinds there are."""
    name = qualified_name(type(module))
    kinds = ", ".join(sorted(kind.rpartition(".")[2] for kind in KINDS))
    return f"{fqn!r} is a {name}, which LoRA cannot adapt: supported are {kinds} and their subclasses."
