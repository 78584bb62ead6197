"""What a module's forward does, read from its code without running it: which children read one variable, and the gated MLP's form."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def calls_together(cls: type[nn.Module]) -> list[list[str]]:
    """Which children a module's forward calls on one variable, in one block of statements that does not assign it in between.

    Read from the source of ``cls.forward``, so that nothing has to be tried out; no source, no answer. ``self.q_proj(x)`` and
    ``self.k_proj(x)`` are such calls. Cross-attention's ``self.k_proj(memory)`` is not, nor is a call that an ``if`` may leave out.
    """
    if cls not in _TOGETHER:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
        except (OSError, TypeError, SyntaxError):  # built at run time, or not written in Python
            tree = ast.Module([], [])
        _TOGETHER[cls] = [family for family in _families(tree) if len(family) > 1]
    return _TOGETHER[cls]


_TOGETHER: dict[type[nn.Module], list[list[str]]] = {}


def _families(tree: ast.Module) -> Iterator[list[str]]:
    calls = [call for call in map(_child_call, ast.walk(tree)) if call is not None]
    once = {name for name, _ in calls if [other for other, _ in calls].count(name) == 1}
    for body in _blocks(tree.body[0]) if tree.body else ():
        families: dict[str, list[str]] = {}  # variable → children called on it so far
        for statement in body:
            parts = list(ast.walk(statement))
            # A statement with blocks of its own, or with an expression that decides what runs, may leave its calls out.
            if isinstance(statement, _SIMPLE) and not any(isinstance(part, _DECIDING) for part in parts):
                for name, argument in filter(None, map(_child_call, parts)):
                    if name in once:
                        families.setdefault(argument, []).append(name)
            for part in parts:
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    yield families.pop(part.id, [])
        yield from families.values()


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """The lists of statements in a function; not those of functions in it, which may run later or elsewhere."""
    body = getattr(node, "body", None)
    if isinstance(body, list):
        yield body
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from _blocks(child)


_SIMPLE = (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr)
_DECIDING = (ast.IfExp, ast.BoolOp, ast.comprehension, ast.Lambda)


def _child_call(node: ast.AST) -> tuple[str, str] | None:
    """``("q_proj", "x")`` for ``self.q_proj(x)``."""
    match node:
        case ast.Call(ast.Attribute(ast.Name("self"), name), [ast.Name(argument)], []):
            return name, argument
    return None


def is_gated_mlp(cls: type[nn.Module]) -> bool:
    """Whether the forward of ``cls`` is ``down_proj(act_fn(gate_proj(x))·up_proj(x))``, instruction by instruction."""
    code = getattr(cls.forward, "__code__", None)
    return code is not None and any(_instructions(code) == _instructions(form.__code__) for form in _FORMS)


def _instructions(code: Any) -> tuple[Any, ...]:
    return code.co_code, code.co_names, code.co_argcount


def _expression(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _statement(self: Any, x: Tensor) -> Tensor:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


_FORMS = (_expression, _statement)
