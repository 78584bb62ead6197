"""GaLore (arXiv:2403.03507): every weight trains, and its gradient's moments are kept in a rank-r subspace.

For a weight (m, n) with m ≥ n, P (r, n) holds the gradient's leading right singular vectors. It is computed again every
``update_proj_gap`` steps. For m < n it holds the left ones, on the other side::

    R = G·Pᵀ                            # (m, r)
    W ← W - lr · scale · Adam(R)·P      # moments in (m, r) instead of (m, n)

The optimizer is ``pytorch_optimizer.GaLore``. This file adds its parameter groups and its checkpoints. The library keeps P in an object,
which ``torch.load`` refuses, so states are saved and loaded as plain tensors. The library differs from the paper in two details that
matter little: the first subspace lasts one step less than the others, and the singular vectors are computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.config import ALL_LINEAR, LoRAConfig
from lightning_lora.model.targeting import find_targets
from lightning_lora.utils.sharding import is_sharded

# Allowed sides of the projection. The library's "random" is left out: it computes singular vectors all the same.
SIDES = ("std", "reverse_std", "left", "right", "full")


@dataclass(frozen=True, kw_only=True)
class GaLoreConfig:
    """Which gradients are projected, and how.

    Args:
        rank: r of the subspace; at most the smaller side of every targeted weight.
        update_proj_gap: T, optimizer steps between two subspaces.
        scale: α, the factor on the projected update; the paper's 0.25 goes with a learning rate of 1e-2 for pre-training.
        projection_type: ``std`` projects the longer side away, ``reverse_std`` the shorter, ``left`` and ``right`` always one side,
            ``full`` both.
        target_modules: names or regexes, as in ``LoRAConfig``; ``"all-linear"`` is every linear except the output head.
        exclude_modules: names or regexes that are never projected, even if targeted.

    Raises:
        ValueError: a field is out of range; the message names the field, its value and the allowed values.

    Examples:
        >>> config = GaLoreConfig(rank=4, update_proj_gap=50, exclude_modules=["down_proj"])
        >>> optimizer = galore_optimizer(galore_param_groups(model, lr=1e-3, config=config))
    """

    rank: int = 128
    update_proj_gap: int = 200
    scale: float = 0.25
    projection_type: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    target_modules: Sequence[str] | str = ALL_LINEAR
    exclude_modules: Sequence[str] | str = ()

    def __post_init__(self) -> None:
        for name in ("rank", "update_proj_gap"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: give a whole number ≥ 1.")
        if not isinstance(self.scale, (int, float)) or isinstance(self.scale, bool) or not 0 < self.scale < float("inf"):
            raise ValueError(f"scale={self.scale!r}: give a finite number > 0, such as 0.25.")
        if self.projection_type not in SIDES:
            raise ValueError(f"projection_type={self.projection_type!r}: choose one of {', '.join(SIDES)}.")
        LoRAConfig(target_modules=self.target_modules, exclude_modules=self.exclude_modules)


def galore_param_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, config: GaLoreConfig | None = None, **fields: Any
) -> list[dict[str, Any]]:
    """Return groups for ``pytorch_optimizer.GaLore``: ``galore_optimizer(galore_param_groups(model, lr=1e-4, rank=64))``.

    Args:
        model: a plain model that trains in full; frozen parameters are left out.
        lr: learning rate; projected weights effectively get ``scale`` times it.
        weight_decay: for matrices; vectors (biases, norms) get none.
        config: what is projected; or pass its ``fields`` one by one.
        fields: fields of :class:`GaLoreConfig`, in place of ``config``.

    Returns:
        ``galore`` (targeted weights), ``other`` (matrices that are not targeted: embeddings, output heads) and ``no_decay`` (vectors).

    Raises:
        ValueError: a pattern matches nothing, or a targeted weight is frozen, not a matrix, sharded, or smaller than the rank.

    Examples:
        >>> groups = galore_param_groups(model, lr=1e-3, rank=4)
        >>> [group["name"] for group in groups]
        ['galore', 'other', 'no_decay']
    """
    if config is not None and fields:
        raise ValueError(f"config and {', '.join(fields)} are both given; give one or the other.")
    config = config or GaLoreConfig(**fields)
    patterns = LoRAConfig(rank=1, target_modules=config.target_modules, exclude_modules=config.exclude_modules, modules_to_save=[])
    projected = {}
    for target in find_targets(model, patterns).targets:
        for name in target.kind.adapted:
            weight = target.module._parameters[name]
            assert isinstance(weight, Tensor)
            reason = _refusal(weight, config.rank)
            if reason:
                raise ValueError(f"{target.fqn}.{name} {reason}, or leave it out with exclude_modules.")
            projected[id(weight)] = weight
    how = {name: value for name, value in asdict(config).items() if not name.endswith("_modules")}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in projected]
    groups = [
        {"name": "galore", "params": list(projected.values()), "lr": lr, "weight_decay": weight_decay, **how},
        {"name": "other", "params": [p for p in others if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"name": "no_decay", "params": [p for p in others if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _refusal(weight: Tensor, rank: int) -> str | None:
    if not weight.requires_grad:
        return "is frozen, and GaLore trains the weights themselves: train without LoRA (full_finetuning: true)"
    if is_sharded(weight):
        return "is sharded, and its singular vectors need the full tensor: train under DDP"
    if weight.ndim != 2:
        return f"has shape {tuple(weight.shape)}, and only matrices are projected (FSDP1 flattens them): train under DDP"
    if rank > min(weight.shape):
        return f"is {weight.shape[0]}×{weight.shape[1]}, and rank={rank} is above its smaller side: give a smaller rank"
    return None


def galore_optimizer(groups: list[dict[str, Any]], **kwargs: Any) -> Optimizer:
    """Return ``pytorch_optimizer.GaLore`` with a state dict of plain tensors and numbers, so that training resumes exactly.

    Args:
        groups: from :func:`galore_param_groups`.
        kwargs: the optimizer's own arguments, such as ``betas`` and ``eps``.

    Raises:
        ImportError: pytorch_optimizer is not installed; the message names the extra to install.

    Examples:
        >>> optimizer = galore_optimizer(galore_param_groups(model, lr=1e-3, rank=4), betas=(0.9, 0.95))
        >>> model(**batch).loss.backward()
        >>> optimizer.step()
    """
    try:
        from pytorch_optimizer.optimizer.galore import GaLore
    except ModuleNotFoundError as error:
        raise ImportError("GaLore needs the package pytorch_optimizer; pip install 'lightning-lora[galore]'") from error
    optimizer = GaLore(groups, **kwargs)
    optimizer.register_state_dict_post_hook(_to_tensors)
    optimizer.register_step_pre_hook(_from_tensors)
    return optimizer


# Slots of a parameter's state that store a projector. torch moves tensors to the parameter's device and dtype when it loads them.
_STEP, _PARTS = "projector_step", ("projector", "projector_right")


def _to_tensors(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the state dict for a checkpoint: each projector as its one or two matrices, and the step of their computation."""
    state = {}
    for index, slots in state_dict["state"].items():
        projector = slots.get("projector")
        if projector is not None and not isinstance(projector, Tensor):
            matrices = projector.ortho_matrix if isinstance(projector.ortho_matrix, tuple) else (projector.ortho_matrix,)
            slots = slots | dict(zip(_PARTS, matrices, strict=False)) | {_STEP: projector.last_svd_step}
        state[index] = slots
    return state_dict | {"state": state}


def _from_tensors(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Create projectors from the loaded tensors, before a step.

    Not at load: the library processes the loaded slots again after torch has.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if "rank" in group else ():
            slots = optimizer.state.get(parameter, {})
            if isinstance(slots.get("projector"), Tensor):
                from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector

                projector = GaLoreProjector(**{name: group[name] for name in ("rank", "update_proj_gap", "scale", "projection_type")})
                matrices = tuple(slots.pop(part) for part in _PARTS if part in slots)
                projector.ortho_matrix = matrices if len(matrices) > 1 else matrices[0]
                projector.last_svd_step = slots.pop(_STEP)
                slots["projector"] = projector
