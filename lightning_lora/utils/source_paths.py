"""Read from a function's source which attribute paths it reaches from its parameters, such as ``self.attn.weight``.

Paths are followed through local variables, loops and all branches of conditions. If there is no source, the names in the compiled code
are used instead.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType

Path = tuple[str, ...]  # a parameter, then attributes; "*" stands for any element, "[k" for that of key k, "()" for a call's result
Call = tuple[Path, tuple[tuple[int | str, Path], ...]]  # the callee; position or keyword, and path, of each argument that has a path

_ELEMENTS = {"children", "values", "modules"}  # methods that return the elements
_ASKS_ABOUT = {"callable", "getattr", "hasattr", "id", "isinstance", "len", "setattr", "type"}  # do not use their argument's values
_PRODUCTS = {
    "addmm", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "dot", "einsum", "embedding", "linear", "matmul", "mm", "mv", "tensordot",
}  # fmt: skip
_LIKE = {"empty_like", "full_like", "ones_like", "rand_like", "randn_like", "to", "type_as", "zeros_like"}


@dataclass(frozen=True)
class Scan:
    """What one function reaches from its parameters: paths that it uses (those that it multiplies by, too), calls that it passes paths to,
    and paths that it returns.
    """

    names: tuple[str, ...] = ()  # its parameters
    paths: frozenset[Path] = frozenset()
    calls: tuple[Call, ...] = ()
    returned: frozenset[Path] = frozenset()
    products: frozenset[Path] = frozenset()


@lru_cache(maxsize=4096)
def scan(function: FunctionType) -> Scan:
    """Return what a function reaches from its parameters."""
    try:
        # `getsource(function)` would return the source of the function that this one wraps.
        tree = ast.parse(textwrap.dedent(inspect.getsource(function.__code__))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):  # built at run time, so there is no source
        tree = None
    code = function.__code__
    if function.__name__ == "<lambda>" and tree is not None:
        tree = _lambda(tree, code)
    if isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return _Reader(tree, code.co_freevars).scan()
    names = set(_names(code))
    parameters = code.co_varnames[: code.co_argcount]
    ends = [("weight",), ()] if "weight" in names else [()]
    starts = (*parameters[:1], *code.co_freevars)
    return Scan(parameters, frozenset((first, name, *end) for first in starts for name in names for end in ends))


def _lambda(tree: ast.stmt, code: CodeType) -> ast.FunctionDef | None:
    """Return a lambda of a statement as a function that returns its value; None if it cannot be told from others there."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda) and len(node.args.args) == code.co_argcount]
    if len(found) != 1:
        return None
    made = ast.parse("def f(): return None").body[0]
    assert isinstance(made, ast.FunctionDef)
    made.args, made.body = found[0].args, [ast.Return(found[0].body)]
    return made


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


class _Reader:
    """Reads the paths from one function's syntax tree. A variable stands for all values that are ever assigned to it."""

    def __init__(self, tree: ast.FunctionDef | ast.AsyncFunctionDef, around: tuple[str, ...] = ()) -> None:
        self.tree = tree
        self.names = [each.arg for each in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)]
        self.known: dict[str, set[Path]] = {name: {(name,)} for name in (*self.names, *around)}
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}

    def scan(self) -> Scan:
        body = [node for statement in self.tree.body for node in ast.walk(statement)]
        for _ in range(2):  # twice, because in a loop a name may be used above the line that assigns it
            for node in body:
                self.assign(node)
        paths = {path for node in body if self.is_used(node) for path in self.paths(node) if len(path) > 1}
        calls = [call for node in body if isinstance(node, ast.Call) for call in self.calls(node)]
        returned = {path for node in body if isinstance(node, ast.Return) and node.value for path in self.paths(node.value)}
        factors = [part for node in body if _multiplies(node) for part in ast.walk(node)]
        products = {path for part in factors for path in self.paths(part) if len(path) > 1}
        return Scan(tuple(self.names), frozenset(paths), tuple(calls), frozenset(returned), frozenset(products))

    def assign(self, node: ast.AST) -> None:
        match node:
            case ast.Assign(targets, value):
                for target in targets:
                    self.bind(target, value)
            case ast.AnnAssign(ast.Name() as target, _, ast.expr() as value) | ast.NamedExpr(target, value):
                self.bind(target, value)
            case ast.For(target, iterable) | ast.comprehension(target, iterable):
                self.bind_elements(target, iterable)

    def bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            paths = {path for path in self.paths(value) if len(path) < 8}  # the limit ends x = x.next in a loop
            self.known.setdefault(target.id, set()).update(paths)
        elif isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, (ast.Tuple, ast.List)) and len(target.elts) == len(value.elts):
            for each, part in zip(target.elts, value.elts, strict=True):
                self.bind(each, part)

    def bind_elements(self, target: ast.expr, iterable: ast.expr) -> None:
        match iterable, target:
            case ast.Call(ast.Name("enumerate"), [of, *_]), ast.Tuple([_, element]):
                self.bind_elements(element, of)
            case ast.Call(ast.Name("zip"), of), ast.Tuple(elements):
                for each, element in zip(of, elements, strict=False):
                    self.bind_elements(element, each)
            case ast.Call(ast.Attribute(of, "items" | "named_children"), []), ast.Tuple([_, element]):
                self.bind_elements(element, of)
            case ((ast.Tuple(parts) | ast.List(parts)), _):
                for part in parts:
                    self.bind(target, part)
            case _, ast.Name(name):
                paths = {(*path, "*") for path in self.paths(iterable) if len(path) < 8}  # whole first: `for x in x` adds to what it reads
                self.known.setdefault(name, set()).update(paths)

    def paths(self, node: ast.AST) -> set[Path]:
        """Return the paths that an expression may stand for."""
        match node:
            case ast.Name(name):
                return self.known.get(name, set())
            case ast.Attribute(ast.Call(ast.Name("super")), name):
                return {("super()", name)}
            case ast.Attribute(value, name):
                return {(*path, name) for path in self.paths(value)}
            case ast.Call(ast.Name("getattr"), [value, ast.Constant(str(name)), *_]):
                return {(*path, name) for path in self.paths(value)}
            case ast.Call(ast.Attribute(value, name), []) if name in _ELEMENTS:
                return self.paths(value)
            case ast.Call(ast.Attribute(value, "get_parameter" | "get_submodule"), [ast.Constant(str(name))]):
                return {(*path, *name.split(".")) for path in self.paths(value)}
            case ast.Subscript(ast.Attribute(value, "_parameters" | "_modules"), ast.Constant(str(name))):
                return {(*path, name) for path in self.paths(value)}
            case ast.Call(ast.Name("list" | "tuple" | "reversed" | "iter" | "dict"), [value]) | ast.Subscript(value, ast.Slice()):
                return self.paths(value)
            case ast.Call(ast.Name("next"), [value, *_]):
                return {(*path, "*") for path in self.paths(value)}
            case ast.Subscript(value, ast.Constant(str(name))):
                return {(*path, f"[{name}") for path in self.paths(value)}
            case ast.Subscript(value, _) | ast.Call(ast.Name("getattr"), [value, _, *_]):
                return {(*path, "*") for path in self.paths(value)}
            case ast.Call(function, _):
                return {(*path, "()") for path in self.paths(function)}
            case ast.IfExp(_, first, second):
                return self.paths(first) | self.paths(second)
            case ast.BoolOp(_, values):
                return set().union(*map(self.paths, values))
            case ast.NamedExpr(_, value):
                return self.paths(value)
        return set()

    def is_used(self, node: ast.AST) -> bool:
        """Return True if a path ends at this node and its value is used, not just inspected or assigned to a name."""
        if not isinstance(node, (ast.Name, ast.Attribute, ast.Subscript, ast.Call)) or isinstance(
            getattr(node, "ctx", None), (ast.Store, ast.Del)
        ):
            return False
        if _asks_type(node) or _asks_type(self.parents.get(node)) or self.is_passed_on(node):
            return False
        match self.parents.get(node):
            case ast.Attribute() | ast.Subscript(value=_) as outer if getattr(outer, "value", None) is node:
                return False
            case ast.Call(ast.Name(name), arguments) if name in _ASKS_ABOUT and node in arguments:
                return False
            case ast.Call(ast.Attribute(_, name), arguments) if name in _LIKE and node in arguments:
                return False
            case ast.Call(function) if function is node and isinstance(node, (ast.Name, ast.Attribute)):
                return True
            case ast.Compare(_, [ast.Is() | ast.IsNot()]):
                return False
            case ast.Assign([ast.Name()], _) | ast.NamedExpr():
                return False
        return True

    def is_passed_on(self, node: ast.AST) -> bool:
        """Return True for ``parameters()`` of a module where only single elements of it are used."""
        match node, self.parents.get(node):
            case ast.Call(ast.Attribute(_, "parameters")), ast.Call(ast.Name("next" | "iter" | "list" | "tuple")):
                return True
            case ast.Call(ast.Attribute(_, "parameters")), ast.For(_, iterable) | ast.comprehension(_, iterable):
                return iterable is node
            case ast.Call(ast.Name("iter" | "list" | "tuple"), [inner]), ast.Call(ast.Name("next")):
                return self.is_passed_on(inner)
        return False

    def calls(self, node: ast.Call) -> Iterator[Call]:
        """Yield what a call passes paths to: one entry per function that may be called."""
        keys: list[tuple[int | str, ast.expr]] = [*enumerate(node.args), *((word.arg, word.value) for word in node.keywords if word.arg)]
        arguments = tuple((key, path) for key, value in keys for path in self.paths(value))
        if arguments:
            outside = _dotted(node.func)
            callees = self.paths(node.func) or ({outside} if outside and not hasattr(builtins, outside[0]) else set())
            yield from ((callee, arguments) for callee in callees)


def _asks_type(node: ast.AST | None) -> bool:
    """Return True for ``x.type()``, which returns the type's name; ``x.type(dtype)`` casts the values."""
    match node:
        case ast.Call(ast.Attribute(_, "type"), [], []):
            return True
    return False


def _multiplies(node: ast.AST) -> bool:
    """Return True for ``a @ b`` and calls such as ``F.linear(x, w)``."""
    match node:
        case ast.BinOp(_, ast.MatMult()) | ast.Call(ast.Name("linear" | "matmul" | "einsum")):
            return True
        case ast.Call(ast.Attribute(_, name), [_, *_]):
            return name in _PRODUCTS
    return False


def _dotted(node: ast.AST) -> Path | None:
    """Return ``("a", "b")`` for ``a.b``; None for an expression that is no dotted name."""
    match node:
        case ast.Name(name):
            return (name,)
        case ast.Attribute(value, name):
            start = _dotted(value)
            return None if start is None else (*start, name)
    return None
