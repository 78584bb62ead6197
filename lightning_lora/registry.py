"""The three tables that names and types are looked up in: kinds, variants, inits.

They stand below everything that fills or reads them, so that none of the files that register names another: a layer
kind knows shapes, a variant a formula, an init how to fill tensors, and this file that they exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

KINDS: dict[str, type] = {}  # qualified name of a module type → the LoRALayer subclass that adapts it
VARIANTS: dict[str, type] = {}  # config.variant → the mixin that goes before the kind
INITS: dict[str, Callable[[Any], None]] = {}  # config.init → a function that fills a layer's A and B

T = TypeVar("T")


def qualified_name(cls: type) -> str:
    """``package.module.Class``: the key that lets an optional library's type be registered without importing it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def register_kind(*names: str | type) -> Callable[[type[T]], type[T]]:
    """Class decorator: adapt modules of these types, and of their subclasses, with the decorated class."""

    def add(kind: type[T]) -> type[T]:
        KINDS.update({name if isinstance(name, str) else qualified_name(name): kind for name in names})
        return kind

    return add


def register(table: dict[str, Any], name: str) -> Callable[[T], T]:
    """Decorator: file the decorated function or class under ``name`` in :data:`VARIANTS` or :data:`INITS`."""

    def add(entry: T) -> T:
        table[name] = entry
        return entry

    return add


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
