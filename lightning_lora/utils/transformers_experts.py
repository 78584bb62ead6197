"""Private names of transformers' mixtures of experts. Each entry says what it is for and what happens without it.

They are read from classes and modules by name; transformers itself is not imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

from torch import nn

# Classes with experts in one tensor per projection that transformers' decorator does not mark → names of the tensors, and whether each
# expert's matrix is stored as (in, out).
_GATED = ("gate_up_proj", "down_proj")
_EXPERTS = {
    "llama4.modeling_llama4.Llama4TextExperts": (_GATED, True),
    "step3p7.modeling_step3p7.Step3p7Experts": (_GATED, False),
    "longcat_flash.modeling_longcat_flash.LongcatFlashExperts": (_GATED, False),
    "inkling.modeling_inkling.InklingSharedExperts": (("gate_proj", "up_proj", "down_proj"), False),
    "jetmoe.modeling_jetmoe.JetMoeParallelExperts": (("weight",), False),
}


def stored_experts(cls: type) -> tuple[tuple[str, ...], bool] | None:
    """Return the names of the tensors that hold a class's experts, and whether a matrix is (in, out) there; None for other classes.

    ``use_experts_implementation``, public in transformers, marks such classes: its options are free variables of the constructor that it
    makes. Without it experts are left out by "all-linear", which the report says, and refused by name.
    """
    for base in cls.__mro__:
        known = _EXPERTS.get(f"{base.__module__}.{base.__qualname__}".removeprefix("transformers.models."))
        if known is not None:
            return known
        start = vars(base).get("__init__")
        names = getattr(getattr(start, "__code__", None), "co_freevars", ())
        if "is_transposed" in names and "has_gate" in names:
            options = {name: cell.cell_contents for name, cell in zip(names, start.__closure__, strict=True)}  # type: ignore[union-attr]
            return (_GATED if options["has_gate"] else ("up_proj", "down_proj")), options["is_transposed"]
    return None


# DBRX's experts: their matrices lie one below another, and the forward gets those of one expert. Without it they are left out.
DBRX_EXPERTS = "transformers.models.dbrx.modeling_dbrx.DbrxExpertGLU"


def experts_implementation(module: nn.Module) -> str | None:
    """Return the name of the implementation by which experts run, None if they have only their own."""
    return getattr(getattr(module, "config", None), "_experts_implementation", None)


def dequantized_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return transformers' function for experts with plain weights, of the module's implementation; None for "eager".

    transformers' experts with FP8 weights have other functions by the same names, whose kernels are fetched when first called and run on
    GPUs. Without it such experts run in a loop.
    """
    return getattr(sys.modules.get("transformers.integrations.moe"), f"{experts_implementation(module)}_experts_forward", None)


#: Implementations that use the weights in products alone.
PRODUCTS_ALONE = (None, "eager", "batched_mm", "grouped_mm")

_ACTIVE = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


def active_experts(module: nn.Module, model: nn.Module) -> int | None:
    """Return how many experts a token meets, by the config of their module or else of the model; None if neither says.

    Without it a rank that depends on it has to be given.
    """
    whole = getattr(model, "config", None)
    configs = (getattr(module, "config", None), *(getattr(whole, name, None) for name in ("text_config", "ffn_config")), whole)
    said = [getattr(config, name, None) for config in configs for name in _ACTIVE]
    return next((value for value in said if isinstance(value, int) and value > 0), None)


def traced_experts(cls: type, product: Callable[..., Any]) -> dict[str | None, Callable[..., Any]]:
    """Return implementation → transformers' own function for a class's experts, of those that a compiler traces as one graph.

    Their product of sorted rows is a function of torch that compilers trace without asking what its operands are. So in a copy of
    transformers' functions it is ``product(original, input, weight, offs)``, where ``original`` is the function that it replaces. Without
    it experts run uncompiled between compiled parts.

    Args:
        cls: a class that :func:`stored_experts` knows.
        product: as above.
    """
    forward: Any = getattr(cls, "forward", None)
    names = getattr(getattr(forward, "__code__", None), "co_freevars", ())
    moe: Any = sys.modules.get("transformers.integrations.moe")
    if moe is None or "experts_interface" not in names:  # a forward of its own may do more than the implementation
        return {}
    chosen = forward.__closure__[names.index("experts_interface")].cell_contents
    own = {name: getattr(moe, f"{name}_experts_forward", None) for name in ("batched_mm", "grouped_mm")}
    found: dict[str | None, Callable[..., Any]] = {name: known for name, known in own.items() if known and chosen.get(name) is known}
    inner = [getattr(moe, name, None) for name in ("_grouped_mm", "_grouped_linear")]
    if found.pop("grouped_mm", None) and None not in inner:
        # Without a name: a compiler looks up a named module's globals in the module.
        scope = {name: value for name, value in vars(moe).items() if name != "__name__"} | {"_grouped_mm": partial(product, inner[0])}
        again = lambda function: FunctionType(function.__code__, scope, function.__name__, function.__defaults__)  # noqa: E731
        scope["_grouped_linear"] = again(inner[1])
        found["grouped_mm"] = again(moe.grouped_mm_experts_forward)
    return found
