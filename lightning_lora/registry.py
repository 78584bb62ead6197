"""Registries of kinds, variants and inits, which names and types are looked up in.

This file is below every file that registers or looks up an entry, so the registering files never name each other. A kind knows shapes, a
variant knows a formula, and an init fills tensors. Only this file knows that all three exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

KINDS: dict[str, type] = {}  # qualified name of a module type → the LoRALayer subclass that adapts it
KIND_NAMES: dict[str, type] = {}  # name in config.kind_pattern → kind
KIND_RULES: list[tuple[Callable[[type], bool], type]] = []  # rule for a module type that has no entry in KINDS, and its kind
VARIANTS: dict[str, type] = {}  # config.variant → the mixin that goes before the kind
INITS: dict[str, Callable[[Any], None]] = {}  # config.init → the function that fills a layer's A and B
_NAMES: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()  # class → what qualified_names returns; asked ten times a module
MOST_ITERATIONS = 1000  # the largest n of an init such as pissa_niter_[n]

T = TypeVar("T")
Init = TypeVar("Init", bound=Callable[[Any], None])
InitCheck = Callable[[Any, Any, tuple[int, ...], tuple[int, ...]], None]


def qualified_name(cls: type) -> str:
    """Return ``package.module.Class``. With this key an optional library's type is registered without importing the library."""
    return f"{cls.__module__}.{cls.__qualname__}"


def qualified_names(cls: type) -> tuple[str, ...]:
    """Return the qualified names of a class and its bases in the order of its MRO: what the registries are searched for."""
    names = _NAMES.get(cls)
    if names is None:
        names = _NAMES[cls] = tuple(map(qualified_name, cls.__mro__))
    return names


def register_kind(*names: str | type, name: str | None = None, match: Callable[[type], bool] | None = None) -> Callable[[type[T]], type[T]]:
    """Class decorator: adapt modules of these types, and of their subclasses, with the decorated class.

    Args:
        names: module types, or their qualified names (``package.module.Class``), which need no import of their library.
        name: name of the kind. ``LoRAConfig.kind_pattern`` chooses the kind by it for modules whose type is not enough.
        match: returns True for a type that the kind adapts too, if no kind names it: for types that cannot be listed.

    Raises:
        ValueError: another class already adapts one of the types, or has the name.

    Examples:
        >>> class Projection(torch.nn.Module):  # a layer of your own: y = x·Wᵀ
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.randn(8, 16))
        ...     def forward(self, x):
        ...         return x @ self.weight.T
        >>> @register_kind(Projection)
        ... class LoRAProjection(LoRALayer):
        ...     @classmethod
        ...     def adapter_shapes(cls, module, spec):
        ...         return (spec.rank, 16), (8, spec.rank)
        ...     def lora_update(self, y, x):
        ...         return y + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)
        >>> layers = apply_lora(torch.nn.Sequential(Projection()), LoRAConfig(target_modules=["0"]))
    """
    keys = [each if isinstance(each, str) else qualified_name(each) for each in names]

    def add(kind: type[T]) -> type[T]:
        own_names = [] if name is None else [name]
        _check_free(KIND_NAMES, "kind", own_names, kind)
        if match is not None:
            KIND_RULES.append((match, kind))
        _add(KINDS, "kind", keys, kind)
        return _add(KIND_NAMES, "kind", own_names, kind)

    return add


def register_variant(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: ``LoRAConfig(variant=name)`` puts the decorated mixin before the kind in a layer's MRO.

    Args:
        name: the variant's name in configs.

    Raises:
        ValueError: another variant has that name.

    Examples:
        >>> @register_variant("only_b")
        ... class OnlyB(LoRALayer):
        ...     def init_adapter(self, spec):
        ...         super().init_adapter(spec)
        ...         self.lora_A.requires_grad_(False)
        >>> model = apply_lora(model, LoRAConfig(variant="only_b"))
    """
    return lambda variant: _add(VARIANTS, "variant", [name], variant)


def register_init(
    name: str,
    *,
    check: InitCheck | None = None,
    options: Mapping[str, Any] | None = None,
    data: type | None = None,
) -> Callable[[Init], Init]:
    """Function decorator: ``LoRAConfig(init=name)`` initializes a layer's A and B with the decorated function, which takes the layer.

    Args:
        name: the init's name in configs. One that ends in ``_[n]`` stands for that name with any whole number up to `MOST_ITERATIONS`.
        check: takes a module, its ``LayerSpec`` and the shapes of A (r, …) and B (out, r, …). It raises ValueError with the reason if the
            init does not suit the module. It runs before the model is changed, so the init itself must not refuse a layer.
        options: name → :class:`~lightning_lora.layers.spec.Option` that ``LoRAConfig.init_options`` may have.
        data: for an init that reads data, the :class:`~lightning_lora.inits.statistics.Statistics` that it gathers of each layer. The
            decorated function fills a layer that has not seen data yet.

    Raises:
        ValueError: another init has that name.

    Examples:
        >>> @register_init("ones")
        ... def ones(layer):
        ...     torch.nn.init.ones_(layer.lora_A)
        ...     torch.nn.init.zeros_(layer.lora_B)
        >>> model = apply_lora(model, LoRAConfig(init="ones"))
    """

    def add(init: Init) -> Init:
        _add(INITS, "init", [name], init)
        for what, value in (("check", check), ("options", options), ("data", data)):
            if value is not None:
                setattr(init, what, value)
        return init

    return add


def _add(table: dict[str, Any], what: str, names: Sequence[str], entry: T) -> T:
    """Register an entry under all names, or under none if another entry has one of them."""
    _check_free(table, what, names, entry)
    table.update(dict.fromkeys(names, entry))
    return entry


def _check_free(table: dict[str, Any], what: str, names: Sequence[str], entry: object) -> None:
    taken = [name for name in names if table.get(name, entry) is not entry]
    if taken:
        raise ValueError(f"{what} {taken[0]!r} is registered already, as {table[taken[0]]!r}; choose another name.")


def keeps_start(init: Init) -> Init:
    """Decorator for an init with B·A ≠ 0 at the start. The layer keeps the start and adds the difference to it."""
    init.keeps_start = True  # type: ignore[attr-defined]
    return init


def freezes(factor: str) -> Callable[[Init], Init]:
    """Decorator for an init whose values of one factor stay: ``lora_A`` or ``lora_B`` does not train."""

    def mark(init: Init) -> Init:
        init.frozen = factor  # type: ignore[attr-defined]
        return init

    return mark


def for_packed_base(init: Init) -> Init:
    """Decorator for an init that makes up for what quantizing lost: its adapter belongs to the quantized weights, bit for bit."""
    init.for_packed_base = True  # type: ignore[attr-defined]
    return init


def init_of(name: str) -> Callable[[Any], None]:
    """Return the init that ``LoRAConfig.init`` names.

    Raises:
        ValueError: there is none of that name, or its number is too large.
    """
    family, _, number = name.rpartition("_")
    if number.isdecimal() and f"{family}_[n]" in INITS:
        if len(number.lstrip("0")) > 4 or int(number) > MOST_ITERATIONS:  # Python refuses to read thousands of digits
            raise ValueError(f"init={name[:40]!r}: n is above {MOST_ITERATIONS:,}; give fewer iterations, such as {family}_16.")
        return INITS[f"{family}_[n]"]
    return look_up({key: init for key, init in INITS.items() if key != name or number != "[n]"}, "init", name)


def frozen_factor(init: str) -> str | None:
    """Return the factor that an init freezes, None if both train."""
    return getattr(init_of(init), "frozen", None)


def has_start(init: str) -> bool:
    """True if layers with this init keep their start."""
    return getattr(init_of(init), "keeps_start", False)


def belongs_to_packed_base(init: str) -> bool:
    """True if an adapter with this init belongs to the quantized weights that it was made for."""
    return getattr(init_of(init), "for_packed_base", False)


def data_of(init: str) -> Any:
    """Return the class of what an init gathers of the data, None if it reads none."""
    return getattr(init_of(init), "data", None)


def init_check(init: str) -> InitCheck | None:
    """Return the check that an init was registered with, None if it has none."""
    return getattr(init_of(init), "check", None)


def look_up(table: dict[str, T], field: str, name: str) -> T:
    """Return the entry of a registry that a config field names.

    Args:
        table: the registry.
        field: name of the config field, for the message.
        name: the field's value.

    Raises:
        ValueError: no entry has that name. The message lists the names.
    """
    if name not in table:
        there = sorted(key for key, entry in table.items() if getattr(entry, "low_rank", True))  # rows of tokens have a field of their own
        raise ValueError(f"{field}={name!r} is not known; there are {', '.join(there)}.")
    return table[name]


def kind_of(cls: type[nn.Module]) -> type | None:
    """Return the kind for modules of this class: the first registered type in its MRO decides, then the rules. None if unsupported."""
    named = (KINDS[name] for name in qualified_names(cls) if name in KINDS)
    return next(named, None) or next((kind for match, kind in KIND_RULES if match(cls)), None)


def why_refused(module: nn.Module, fqn: str) -> str:
    """Return the message for a module that no kind adapts: its name, its type, and the known kinds."""
    name = qualified_name(type(module))
    kinds = ", ".join(sorted(kind.rpartition(".")[2] for kind in KINDS))
    return f"{fqn!r} is a {name}, which LoRA cannot adapt: supported are {kinds} and their subclasses. Exclude it."
