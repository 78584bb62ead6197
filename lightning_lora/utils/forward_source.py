"""Read from a forward's code, without running it, what the forward does.

``calls_together`` finds the children that read one variable. ``is_gated_mlp`` recognizes a gated MLP.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn


def calls_together(cls: type[nn.Module]) -> list[list[str]]:
    """Return the groups of children that a module's forward calls on one variable.

    The calls of a group are in one block of statements that does not assign the variable in between. They are read from the source of
    ``cls.forward``, so no call is tried out; without source there are no groups. ``self.q_proj(x)`` and ``self.k_proj(x)`` are such calls.
    Cross-attention's ``self.k_proj(memory)`` is not, nor is a call that an ``if`` may skip.
    """
    if cls not in _TOGETHER:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
        except (OSError, TypeError, SyntaxError):  # created at run time, or not written in Python
            tree = ast.Module([], [])
        _TOGETHER[cls] = [family for family in _families(tree) if len(family) > 1]
    return _TOGETHER[cls]


_TOGETHER: dict[type[nn.Module], list[list[str]]] = {}


def _families(tree: ast.Module) -> Iterator[list[str]]:
    if not tree.body or not isinstance(tree.body[0], ast.FunctionDef):
        return
    arguments = tree.body[0].args
    me = next((argument.arg for argument in (*arguments.posonlyargs, *arguments.args)), "")
    child_call = partial(_child_call, me)
    calls = [call for call in map(child_call, ast.walk(tree)) if call is not None]
    once = {name for name, _ in calls if [other for other, _ in calls].count(name) == 1}
    for body in _blocks(tree.body[0]):
        families: dict[str, list[str]] = {}  # variable → children called on it so far
        for statement in body:
            parts = list(ast.walk(statement))
            # A statement with inner blocks, or with an expression that decides what runs, may skip its calls.
            if isinstance(statement, _SIMPLE) and not any(isinstance(part, _DECIDING) for part in parts):
                for name, argument in filter(None, map(child_call, parts)):
                    if name in once:
                        families.setdefault(argument, []).append(name)
            for part in parts:
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    yield families.pop(part.id, [])
        yield from families.values()


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """Yield the lists of statements in a function. Functions defined inside it are left out: they may run later or elsewhere."""
    body = getattr(node, "body", None)
    if isinstance(body, list):
        yield body
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from _blocks(child)


_SIMPLE = (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr)
_DECIDING = (ast.IfExp, ast.BoolOp, ast.comprehension, ast.Lambda)


def _child_call(me: str, node: ast.AST) -> tuple[str, str] | None:
    """Return ``("q_proj", "x")`` for ``self.q_proj(x)`` if ``me`` is "self", None for anything else."""
    match node:
        case ast.Call(ast.Attribute(ast.Name(owner), name), [ast.Name(argument)], []) if owner == me:
            return name, argument
    return None


def is_gated_mlp(cls: type[nn.Module]) -> bool:
    """True if the forward of ``cls`` is ``down_proj(act_fn(gate_proj(x))·up_proj(x))``, bytecode instruction by instruction."""
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
