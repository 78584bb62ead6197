"""Preconditioned gradients of A and B: Riemannian preconditioning, and the second version of LoRA-FA.

For an update s·B·A of a weight with gradient G, autograd gives g_A = s·Bᵀ·G and g_B = s·G·Aᵀ. How large they are depends on how the
product is divided between its factors. Both methods undo that by the r×r Gram matrix of the other factor::

    riemannian   g_A ← (BᵀB + δI)⁻¹·g_A    g_B ← g_B·(AAᵀ + δI)⁻¹      scaled SGD and AdamW (arXiv:2402.02347, section 3)
    lora_fa      A frozen                  g_B ← s⁻²·g_B·(AAᵀ + δI)⁻¹  the closed-form correction of arXiv:2308.03303v2

A factor that several products share, as experts do with ``shared_outer``, has the sum of their Gram matrices.

The gradients are rewritten before the optimizer's step (:mod:`lightning_lora.optim.before_step`), so any optimizer serves. Nothing is
kept between steps. :mod:`lightning_lora.optim.gram` has the computation.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from lightning_lora.layers.base import lora_layers
from lightning_lora.layers.factors import Factors
from lightning_lora.layers.slices import Sliced
from lightning_lora.optim.before_step import before_step
from lightning_lora.optim.gram import Pair, precondition
from lightning_lora.optim.groups import PRECONDITION, unwrapped
from lightning_lora.utils.names import clean_name


@dataclass(frozen=True)
class Method:
    """One of the two formulas.

    Attributes:
        damping: δ, as in the authors' code.
        frozen: one factor is frozen, and the other's gradient is also divided by the squared scaling.
    """

    damping: float
    frozen: bool


METHODS = {"riemannian": Method(1e-6, False), "lora_fa": Method(1e-8, True)}
# Of each optimizer: parameter's id → name and damping of its preconditioner.
_APPLIED: weakref.WeakKeyDictionary[Optimizer, dict[int, tuple[str, float]]] = weakref.WeakKeyDictionary()


def apply_preconditioner(optimizer: Optimizer, model: nn.Module, name: str, *, damping: float | None = None) -> None:
    """Precondition the gradients of A and B before each step of an optimizer.

    ``LoRACallback(precondition="riemannian")`` calls it. In a plain loop, call it once after building the optimizer. The gradients are
    rewritten in place, after accumulation, unscaling and clipping, which work on those of the loss. Everything else that trains (biases,
    DoRA's magnitudes, heads) keeps its gradients. With several optimizers, call it for each that holds factors.

    Args:
        optimizer: any of torch's form but LBFGS.
        model: an adapted model, or the part of it whose layers are meant.
        name: ``"riemannian"`` or ``"lora_fa"``; see :mod:`lightning_lora.optim.preconditioning`. ``"lora_fa"`` is for layers of which one
            factor is frozen, and equals PEFT's ``create_lorafa_optimizer`` with Adam.
        damping: δ > 0; by default the authors', 1e-6 for ``"riemannian"`` and 1e-8 for ``"lora_fa"``.

    Raises:
        ValueError: the method is not known or not defined for a layer (VeRA, LoRA-XS, AdaLoRA), FSDP1 has flattened the factors, the
            optimizer holds none of them or has another preconditioner for them, or it cannot be used with one.

    Examples:
        >>> optimizer = torch.optim.AdamW(lora_param_groups(apply_lora(model), lr=1e-4))
        >>> apply_preconditioner(optimizer, model, "riemannian")
    """
    check_preconditioner(model, name)
    optimizer = unwrapped(optimizer)
    method = METHODS[name]
    damping = method.damping if damping is None else damping
    if not isinstance(damping, (int, float)) or isinstance(damping, bool) or not 0 < damping < math.inf:
        raise ValueError(f"damping={damping!r}: give a finite number > 0, such as {method.damping:g}.")
    pairs = pairs_of(model, name, optimizer)
    if not pairs:
        raise ValueError(f"precondition={name!r}: {type(optimizer).__name__} holds no A or B of an adapter of {type(model).__name__}.")
    mine = {id(factor) for pair in pairs for factor, trains in zip((pair.A, pair.B), pair.trains, strict=True) if trains}
    applied = _APPLIED.setdefault(optimizer, {})
    known = {applied.get(number) for number in mine}
    if known == {(name, damping)}:
        return  # a module that keeps its optimizer is fitted again
    if known != {None}:
        raise ValueError(f"precondition={name!r}: {type(optimizer).__name__} has another preconditioner for these adapters; give it once.")
    before_step(optimizer, lambda: precondition(pairs, damping))
    applied.update(dict.fromkeys(mine, (name, damping)))
    for group in optimizer.param_groups:
        if any(id(parameter) in mine for parameter in group["params"]):
            group[PRECONDITION] = name


def check_known(name: str | None) -> None:
    """Raise ValueError unless a method of that name is known. None is no method."""
    if name is not None and name not in METHODS:
        raise ValueError(f"precondition={name!r} is not known; it is None, {' or '.join(map(repr, METHODS))}.")


def check_preconditioner(model: nn.Module, name: str) -> None:
    """Check that a method is defined for every adapter of a model.

    Raises:
        ValueError: the method is not known; or an update is not the product of B and A alone; or the method needs a frozen factor and
            both train. The message names the layer.
    """
    check_known(name)
    for fqn, layer in lora_layers(model):
        for part in layer.by_weight().values() if layer.low_rank else ():
            owner = next(cls for cls in type(part).__mro__ if "update_factors" in vars(cls) and cls is not Sliced)
            if owner is not Factors:
                raise ValueError(
                    f"precondition={name!r} is for updates B·A, and that of {clean_name(fqn)!r} is another"
                    f" (variant={layer.lora_config.variant!r}): leave precondition out."
                )
            if METHODS[name].frozen and part.lora_A.requires_grad and part.lora_B.requires_grad:
                raise ValueError(
                    f"precondition={name!r} is for a frozen factor, and both of {clean_name(fqn)!r} train: use variant='lora_fa' with it,"
                    " or precondition='riemannian'."
                )


def pairs_of(model: nn.Module, name: str, optimizer: Optimizer) -> list[Pair]:
    """Return the factors of a model's layers of which an optimizer holds at least one.

    Raises:
        ValueError: FSDP1 has flattened the factors.
    """
    held, pairs = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}, []
    for fqn, layer in lora_layers(model):
        for part in layer.by_weight().values() if layer.low_rank else ():
            A, B = part.lora_A, part.lora_B
            trains = id(A) in held, id(B) in held
            if any(trains):
                if A.ndim < 2 or B.ndim < 2:
                    raise ValueError(
                        f"precondition={name!r}: FSDP1 has flattened the factors of {clean_name(fqn)!r}, and it needs their matrices: use"
                        " strategy='lora_fsdp2' or 'ddp'."
                    )
                power = part.scaling**-2 if METHODS[name].frozen else 1.0
                pairs.append(Pair(A, B, tuple(part.factor_rows()), power, trains))
    return pairs
