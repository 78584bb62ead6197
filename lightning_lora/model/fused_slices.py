"""Names for the slices of fused projections: ``layers.0.self_attn.q_proj`` on a model whose attention has ``qkv_proj``.

A slice is named as a sibling of its fused projection, as if it were a linear of its own. Where the module around it has a child of that
name, the child is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch import nn

from lightning_lora.layers.spec import Slices
from lightning_lora.utils.fused_layouts import FusedLayout, fused_layouts


def fused_projections(modules: Mapping[str, nn.Module]) -> dict[str, tuple[FusedLayout, dict[str, str]]]:
    """Return FQN of a fused projection → its layout, and full name of a slice → its name in the layout."""
    found = {}
    for fqn, parent in modules.items():
        for child, layout in fused_layouts(parent).items():
            if f"{fqn}.{child}" in modules:
                found[f"{fqn}.{child}"] = layout, {f"{fqn}.{name}": name for name in layout.names if f"{fqn}.{name}" not in modules}
    return found


def slice_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the full names of all slices."""
    return [name for _, names in fused_projections(modules).values() for name in names]


def chosen_slices(
    modules: Mapping[str, nn.Module],
    whole: Collection[nn.Module],
    wanted: Callable[[str], object],
    excluded: Callable[[str], object],
) -> dict[nn.Module, Slices]:
    """Return fused projection → the slices to adapt, which may be none; without those that are adapted as a whole.

    Args:
        modules: by name.
        whole: modules that are targets themselves. Such a one loses its excluded slices, and keeps the others.
        wanted: returns something true for the name of a slice that is targeted.
        excluded: the same for a slice that is excluded.
    """
    found = {}
    for fqn, (layout, names) in fused_projections(modules).items():
        module = modules[fqn]
        hit, out = ({name for name in names if rule(name)} for rule in (wanted, excluded))
        if module not in whole:
            chosen = hit - out
        elif out:
            chosen = names.keys() - out
        else:
            continue
        if chosen or module in whole:
            found[module] = Slices(layout, tuple(part for name, part in names.items() if name in chosen))
    return found


def names_of(fqn: str, slices: Slices | None) -> list[str]:
    """Return the names by which a config names a layer: its own, or those of its slices."""
    parent = fqn.rpartition(".")[0]
    return [fqn] if slices is None else [f"{parent}.{name}" for name in slices.names]
