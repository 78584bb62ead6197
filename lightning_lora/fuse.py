"""Recognise the parts of a block whose adapted linears can share work. On by default; :func:`unfuse` undoes it.

Linears that read the same input (q, k, v) share the pass over it. On a GPU a gated MLP is computed as one operation.

Parameters stay in their layers and state dicts are unchanged. Whatever does not fit (another variant, a quantized or sharded base, merged
layers, inputs that differ after all) is computed layer by layer, as if this had not been called.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import kernels
from lightning_lora.gated_ops import lora_gated_mlp
from lightning_lora.layers import LoRALinear
from lightning_lora.layers.siblings import Siblings


def fuse(model: nn.Module) -> list[Siblings]:
    """Let adapted linears that read the same input share it.

    Args:
        model: a model with adapters; its forward passes are not changed, its layers' are.

    Returns:
        The groups there are now.
    """
    unfuse(model)
    groups = []
    for parent in list(model.modules()):
        adapted = {name: child for name, child in parent.named_children() if isinstance(child, LoRALinear)}
        families = calls_together(type(parent)) if len(adapted) > 1 else []
        sets = [[adapted[name] for name in family if name in adapted] for family in families]
        mine = [Siblings(layers) for layers in sets if len(layers) > 1]
        for group in mine:
            for layer in group.layers:
                layer.lora_siblings = group
        mixins = [*([GatedMLP] if _is_gated_mlp(parent) else []), *([Sharing] if mine else [])]
        if mixins and not isinstance(parent, (Sharing, GatedMLP)):
            parent.__dict__["lora_groups"] = mine
            parent.__class__ = _fused_class(type(parent), *mixins)
        groups += mine
    return groups


def unfuse(model: nn.Module) -> None:
    """Compute every adapted linear by itself again."""
    for module in model.modules():
        if isinstance(module, LoRALinear) and module.lora_siblings is not None:
            module.lora_siblings.disband()
        if "fused_base" in type(module).__dict__:
            del module.__dict__["lora_groups"]
            module.__class__ = type(module).fused_base  # type: ignore[attr-defined]
        elif isinstance(module, Sharing):  # another class, FSDP2's, has been put on top
            module.lora_groups = []


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


class Sharing(nn.Module):
    """A mixin before the class of a module with siblings: they share while its forward runs."""

    lora_groups: list[Siblings]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not the base's, which may want arguments: what is made here is no subclass of the user's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class that the module had."""
        for group in self.lora_groups:
            group.open = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            for group in self.lora_groups:
                group.close()


class GatedMLP(nn.Module):
    """A mixin before the class of a gated MLP: its forward pass as one operation where that serves, else its own."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """As in :class:`Sharing`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class that the module had."""
        layers: list[Any] = [self.gate_proj, self.up_proj, self.down_proj]
        if len(args) != 1 or kwargs or not kernels.usable(args[0]):
            return super().forward(*args, **kwargs)
        same = len({layer.dropout_now() for layer in layers}) == 1
        if not same or not _is_silu(self.act_fn) or not all([_serves(layer, args[0]) for layer in layers]):
            return super().forward(*args, **kwargs)
        As, Bs = zip(*[layer.update_factors() for layer in layers], strict=True)
        weights, scales = [layer.weight for layer in layers], [layer.scaling for layer in layers]
        return lora_gated_mlp(args[0], weights, As, Bs, scales, layers[0].dropout_now())


def _fused_class(base: type[nn.Module], *mixins: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``base``, under its name: one for all its instances, so that compilers trace it once."""
    key = (base, *mixins)
    if key not in _CLASSES:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "fused_base": base}
        _CLASSES[key] = type(
            base.__name__, (*mixins, base), {**names, "fused_mixins": mixins, "__reduce_ex__": _reduce, "__setstate__": _restore}
        )
    return _CLASSES[key]


_CLASSES: dict[tuple[type[nn.Module], ...], type[nn.Module]] = {}


def _reduce(module: Any, protocol: Any) -> tuple[Any, ...]:
    cls = type(module)
    return _rebuild, (cls.fused_base, *cls.fused_mixins), module.__getstate__()


def _restore(module: Any, state: dict[str, Any]) -> None:
    super(type(module), module).__setstate__(state)
    for group in module.lora_groups:  # layers travel without: a copy of one would take the others along
        for layer in group.layers:
            layer.lora_siblings = group


def _rebuild(base: type[nn.Module], *mixins: type[nn.Module]) -> nn.Module:
    cls = _fused_class(base, *mixins)
    return cls.__new__(cls)


def _serves(layer: Any, x: Tensor) -> bool:
    return (
        isinstance(layer, LoRALinear)
        and layer.fusable(x)
        and layer.bias is None
        and "forward" not in layer.__dict__
        and layer.rank <= kernels.WIDEST_GATED
        and layer.lora_A.requires_grad
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and not torch.are_deterministic_algorithms_enabled()  # the kernel's sums over the intermediate features are not
    )


def _is_gated_mlp(module: Any) -> bool:
    """Whether a module's forward is, instruction by instruction, one of those below, with SiLU and three adapted projections."""
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(layer, LoRALinear) for layer in layers) or "forward" in module.__dict__:
        return False
    if len({layer.lora_config.dropout for layer in layers if isinstance(layer, LoRALinear)}) > 1:
        return False
    code = getattr(type(module).forward, "__code__", None)
    return (
        _is_silu(getattr(module, "act_fn", None))
        and code is not None
        and any(_instructions(code) == _instructions(form.__code__) for form in _FORMS)
    )


def _is_silu(function: Any) -> bool:
    """Whether it is SiLU and nobody watches it."""
    if isinstance(function, nn.Module):
        watched = function._forward_hooks or function._forward_pre_hooks or function._backward_hooks or function._backward_pre_hooks
        return type(function).__name__ in ("SiLU", "SiLUActivation") and not watched
    return function is nn.functional.silu


def _instructions(code: Any) -> tuple[Any, ...]:
    return code.co_code, code.co_names, code.co_argcount


def _expression(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _statement(self: Any, x: Tensor) -> Tensor:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


_FORMS = (_expression, _statement)
