"""Find weights that a forward reads without calling the layer that owns them.

``F.linear(x, self.qkv.weight)`` never calls ``qkv``: an adapter on it does nothing, and merging that adapter changes the model.
The forward's source is read, not run. What the forward reaches from ``self`` is followed into children, the methods of ``self``, the base
class's method and functions that get a module. Steps of a LightningModule and hooks may read a weight to log it or to add it to the loss:
there only products count.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from lightning_lora.utils.source_paths import Path, scan

# Attributes and methods of a weight that do not read its values.
_METADATA = {
    "data_ptr", "device", "dim", "dtype", "element_size", "get_device", "grad", "is_contiguous", "is_cuda", "is_floating_point", "is_meta",
    "itemsize", "layout", "names", "nbytes", "ndim", "nelement", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "numel",
    "requires_grad", "requires_grad_", "shape", "size", "stride",
}  # fmt: skip


_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
_WRAPPERS = ("torch.nn.parallel.", "torch.distributed.")  # read every weight, and change none that a layer computes with
_ALL = {"parameters", "named_parameters", "state_dict"}  # methods that return the weights of a layer, or of all layers in a module
_WEIGHTS = ("weight", "in_proj_weight")  # names of the parameters that layers multiply by; the second is nn.MultiheadAttention's


def weight_reads(model: nn.Module, ignored: Container[Any] = ()) -> dict[nn.Module, str]:
    """Return module whose ``weight`` another module's forward, a step or a hook reads → the function that reads it: ``Attention.forward``.

    A read in any branch counts, whether the branch is taken now or not. Reading only a weight's dtype, shape or device does not count.

    Args:
        model: any module.
        ignored: methods that are not followed.
    """
    found: dict[nn.Module, str] = {}
    own = ((module, name, parameter) for module in model.modules() for name, parameter in module._parameters.items())
    weights = {id(parameter): module for module, name, parameter in own if name in _WEIGHTS and parameter is not None}
    for parent in model.modules():
        if _holds_modules(parent) and not type(parent).__module__.startswith(_WRAPPERS):
            _Visit(parent, found, ignored, weights).method(parent, "forward", {})
            for step in (step for step in _STEPS if hasattr(type(parent), step)):
                _Visit(parent, found, ignored, weights, products_only=True).method(parent, step, {})
        for hook in (*parent._forward_pre_hooks.values(), *parent._forward_hooks.values()):
            if isinstance(hook, FunctionType) and hook.__module__.partition(".")[0] != "torch":
                _Visit(None, found, ignored, weights, products_only=True).function(hook, {0: [parent]})
    return found


@dataclass
class _Visit:
    """Follows one parent's forward, step or hook, with the modules that its names stand for."""

    parent: nn.Module | None
    found: dict[nn.Module, str]
    ignored: Container[Any] = ()
    weights: dict[int, nn.Module] = field(default_factory=dict)  # id of a parameter → the layer whose weight it is
    products_only: bool = False
    seen: dict[Any, list[Any]] = field(default_factory=dict)  # function, and the modules of its parameters → the modules that it returns

    def method(self, owner: nn.Module, name: str, bound: dict[int | str, list[Any]], after: type | None = None) -> list[Any]:
        """Follow a method of a module. Return the modules that it returns."""
        if name in ("forward", "__call__") and owner is not self.parent:  # the child itself is called, so nothing bypasses it
            return []
        found, cls = _method(type(owner), name, after)
        shifted = {key + 1 if isinstance(key, int) else key: value for key, value in bound.items()}
        returned = [self.function(function, {0: [owner], **shifted}, cls) for function in _wrapped(found) if function not in self.ignored]
        return [each for objects in returned for each in objects]

    def function(self, function: FunctionType, bound: dict[int | str, list[Any]], cls: type | None = None) -> list[Any]:
        """Follow a function. Return the modules that it returns. ``bound`` has its module arguments by position or keyword."""
        source = scan(function)
        start = {
            source.names[key] if isinstance(key, int) else key: v
            for key, v in bound.items()
            if isinstance(key, str) or key < len(source.names)
        } | {name: [each] for name, each in _around(function) if isinstance(each, nn.Module)}
        state = (function, tuple((name, tuple(map(id, objects))) for name, objects in sorted(start.items())))
        where = f"{cls.__name__}.{function.__name__}" if cls is not None else function.__name__
        if state not in self.seen:
            self.seen[state] = []  # ends a recursion
            for path in source.products if self.products_only else source.paths:
                self.follow(path, start, where, cls)
            for callee, arguments in source.calls:
                taken = {key: self.follow(path, start, None, cls) for key, path in arguments}
                self.call(function, callee, {key: objects for key, objects in taken.items() if objects}, start, cls, where)
            returned = [self.follow(path, start, None if self.products_only else where, cls) for path in source.returned]
            self.seen[state] = [each for objects in returned for each in objects]
        return self.seen[state]

    def call(self, caller: FunctionType, callee: Path, taken: dict[int | str, list[Any]], start: Any, cls: type | None, where: str) -> None:
        """Follow a call whose arguments are modules. ``nn.Linear.forward(self.layer, x)`` reads a weight, past the layer's own forward."""
        if not taken:
            return
        if callee[0] == "super()" and self.parent is not None:
            self.method(self.parent, callee[-1], taken, cls)
        elif callee[0] in start:
            for owner in self.follow(callee[:-1], start, None, cls) if len(callee) > 1 else ():
                self.method(owner, callee[-1], taken)
        else:
            function: Any = _outside(caller, callee[0])
            for name in callee[1:]:
                function = getattr(function, name, None)
            for each in _wrapped(function):
                if each.__module__.partition(".")[0] != "torch":
                    self.function(each, taken)
                elif callee[-1] == "forward":
                    for layer in taken.get(0, []):
                        self.record(layer if "weight" in layer._parameters else None, where, ())

    def follow(self, path: Path, start: dict[str, list[Any]], where: str | None, cls: type | None) -> list[Any]:
        """Return the modules that a path leads to. If ``where`` names the function that reads them, record the weights on the path."""
        super_of = cls if path[0] == "super()" else None
        objects = start.get(path[0], []) if super_of is None else [self.parent]
        if not objects:  # most paths start from no module
            return []
        for index, name in enumerate(path[1:], 1):
            rest, following = path[index + 1 :], []
            if name.startswith("["):
                tables = [owner._modules if isinstance(owner, nn.Module) else owner for owner in objects]
                following = [table[name[1:]] for table in tables if isinstance(table, dict) and table.get(name[1:]) is not None]
                objects, name = [] if following else objects, "*"
            for owner in objects:
                if isinstance(owner, nn.Module):  # first, because most are, and asking for a Parameter takes long
                    if name in owner._parameters:
                        self.record(owner if name in _WEIGHTS else self.weights.get(id(owner._parameters[name])), where, rest)
                    elif name in _ALL and "weight" in owner._parameters and rest:  # the method alone reads nothing
                        self.record(owner, where, [each for each in rest if each not in ("()", "*")])
                    elif name in _ALL and len(rest) > 1 and rest[1].startswith("["):
                        named = dict(owner.named_parameters(remove_duplicate=False))
                        self.record(self.weights.get(id(named.get(rest[1][1:]))), where, rest[2:])
                    else:
                        following += self.attribute(owner, name, super_of, bool(rest))
                elif isinstance(owner, tuple):
                    following += self.method(*owner) if name == "()" else []
                elif isinstance(owner, nn.Parameter):
                    self.record(self.weights.get(id(owner)), where, path[index:])
                elif name == "*":
                    following += owner.values() if isinstance(owner, dict) else owner if isinstance(owner, list) else ()
            objects = following
        for each in objects:
            if not isinstance(each, nn.Module) and isinstance(each, nn.Parameter):
                self.record(self.weights.get(id(each)), where, ())
        return [each for each in objects if isinstance(each, nn.Module)]

    def record(self, layer: nn.Module | None, where: str | None, rest: Sequence[str]) -> None:
        """Record that a function reads a layer's weight, unless the rest of the path asks for a dtype, a shape or the like."""
        if layer is not None and where is not None and layer is not self.parent and not (rest and rest[0] in _METADATA):
            self.found.setdefault(layer, where)

    def attribute(self, owner: nn.Module, name: str, after: type | None, used: bool) -> list[Any]:
        """Return a child, the children, a list of modules, what a property returns, or a method as (module, name, no arguments, after)."""
        if name == "*":
            return [child for child in owner._modules.values() if child is not None]
        if name in owner._modules:
            return [] if owner._modules[name] is None else [owner._modules[name]]
        kept = owner.__dict__.get(name)
        if kept is not None and isinstance(kept, (nn.Module, nn.Parameter, list, tuple, dict)):
            return [list(kept) if isinstance(kept, tuple) else kept]
        if isinstance(kept, FunctionType) and not name.startswith("_") and name != "forward":
            return self.function(kept, {}, type(owner))
        if isinstance(kept, MethodType) and isinstance(kept.__self__, nn.Module):
            return self.method(kept.__self__, kept.__name__, {})
        static = next((vars(base)[name] for base in type(owner).__mro__ if name in vars(base)), None)
        if isinstance(static, property):
            return [each for getter in _wrapped(static.fget) for each in self.function(getter, {0: [owner]}, type(owner))]
        if name.startswith("__"):
            return []
        if not used:  # passed on, or called without module arguments
            self.method(owner, name, {}, after)
        return [(owner, name, {}, after)]


def _holds_modules(parent: nn.Module) -> bool:
    """Return whether a module has children, or others that are not registered as such."""
    kept = [each for value in vars(parent).values() for each in (value if isinstance(value, (list, tuple)) else (value,))]
    return bool(parent._modules) or any(isinstance(each, nn.Module) for each in kept)


def _method(cls: type, name: str, after: type | None) -> tuple[Any, type | None]:
    """Return a method, and the class that defines it. If ``after`` is a class, search behind it, as its ``super()`` does."""
    mro = cls.__mro__[cls.__mro__.index(after) + 1 :] if after in cls.__mro__ else cls.__mro__
    return next(((vars(base)[name], base) for base in mro if name in vars(base) and base is not nn.Module), (None, None))


def _wrapped(function: Any) -> Iterator[FunctionType]:
    """Yield a function and the functions that it wraps."""
    while function is not None:
        if isinstance(function, FunctionType):
            yield function
        function = getattr(function, "__wrapped__", None)


def _outside(function: FunctionType, name: str) -> Any:
    """Return the value of a name that a function does not assign, from the function around it or from its module."""
    return dict(_around(function)).get(name, function.__globals__.get(name))


def _around(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield name and value of what a function reads of the function around it."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            yield name, cell.cell_contents
