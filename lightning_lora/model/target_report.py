"""Report what a config selects in a model: modules to adapt, what trains in full, what is left out. It prints as a table."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_lora.layers.base import PREFIX, LoRALayer
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.model.fused_slices import names_of
from lightning_lora.quantization.formats import elements, plain_shape
from lightning_lora.registry import KIND_NAMES, kind_of
from lightning_lora.utils.messages import counted
from lightning_lora.utils.patterns import starred

_MUCH = 0.2  # share of the model's elements; a larger share left out by "all-linear" is a warning


@dataclass(frozen=True)
class Target:
    """One module to adapt."""

    fqn: str
    module: nn.Module = field(repr=False)
    type_name: str  # the module's type before it is adapted
    kind: type[LoRALayer]  # the module's class after it is adapted
    spec: LayerSpec

    @property
    def names(self) -> list[str]:
        """The names by which a config names it: its own, or those of the slices that are adapted."""
        return names_of(self.fqn, self.spec.slices)

    @property
    def rank(self) -> int:
        """r of the adapter."""
        return self.spec.rank

    @property
    def alpha(self) -> float:
        """Scaling numerator of the adapter."""
        return self.spec.alpha

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the base weight; of the first one if the module has several."""
        return self.shapes[0]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shape of each base weight."""
        return [tuple(plain_shape(self.module, name)) for name in self.kind.adapted]

    @property
    def parameters(self) -> int:
        """Number of elements of the adapter."""
        return sum(math.prod(shape) for shape in self.kind.parameter_shapes(self.module, self.spec).values())


@dataclass(frozen=True)
class TargetReport:
    """Report what a config selects in a model; ``print`` it.

    Attributes:
        targets: the modules to adapt, in the model's order.
        hits: config field → pattern → number of modules that it matched.
        saved: names of the modules and parameters trained in full.
        left_out: module and type → elements left out by ``"all-linear"``: tensors in no linear, such as experts in one tensor, and the
            linears of ``passed_over``. Embeddings and vectors are not listed. For named targets: modules that hold several projections as
            parameters, such as experts, and are not named.
        total: number of elements of the model.
        passed_over: module name → why ``"all-linear"`` passed over this linear.
        rows: the modules with rows that train (``trainable_token_indices``), and those tied to them, which have the same rows.
        copies: FQN of a frozen part → FQN of the part whose copy it is: its adapters do not train, they follow by your code.
    """

    targets: tuple[Target, ...]
    hits: dict[str, dict[str, int]]
    saved: tuple[str, ...]
    left_out: dict[str, int]
    total: int
    passed_over: dict[str, str]
    rows: tuple[Target, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of elements of all adapters together."""
        return sum(target.parameters for target in (*self.targets, *self.rows))

    @property
    def reached(self) -> int:
        """Number of elements of the model that the adapters act on."""
        return sum(math.prod(shape) for target in self.targets for shape in target.shapes)

    def __str__(self) -> str:
        groups: Counter[tuple[str, ...]] = Counter()
        parameters: Counter[tuple[str, ...]] = Counter()
        for target in self.targets:
            shape = ", ".join("×".join(map(str, each)) for each in target.shapes)
            slices = f" ({', '.join(target.spec.slices.names)})" if target.spec.slices else ""
            row = (starred(target.fqn) + slices, target.type_name, shape, str(target.rank), f"{target.alpha:g}")
            groups[row] += 1
            parameters[row] += target.parameters
        rows: list[tuple[str, ...]] = [("module", "type", "weight", "rank", "alpha", "count", "parameters")]
        rows += [(*row, str(count), f"{parameters[row]:,}") for row, count in groups.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.rjust(w) if i > 2 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        lines.append(f"LoRA on {counted(len(self.targets), 'module')}, {sum(target.parameters for target in self.targets):,} parameters")
        lines.append(f"reached: {self.reached:,} of {self.total:,} elements of the model, {self.reached / self.total:.0%}")
        lines += [
            f"  {name} {pattern!r}: {counted(count, 'module')}" for name, hits in self.hits.items() for pattern, count in hits.items()
        ]
        lines += [f"token rows: {line}" for line in self._row_lines()]
        lines += [f"passed over: {line}" for line in lines_of(self.passed_over)]
        lines += [f"frozen: {name}, a copy of {of}, whose adapters begin as its" for name, of in self.copies.items()]
        if trained := [name for name in self.saved if not any(name.startswith(f"{copy}.") for copy in self.copies)]:
            lines.append(f"trained in full: {', '.join(trained)}")
        lines += [f"left out: {name}, {size:,} elements, {size / self.total:.0%} of the model" for name, size in self.left_out.items()]
        return "\n".join(line.rstrip() for line in lines)

    def _row_lines(self) -> list[str]:
        """Return one line for each module with rows that train."""
        tied: dict[str, list[str]] = {target.fqn: [] for target in self.rows}
        for target in self.rows:
            tied.setdefault(target.spec.rows_of, []).append(target.fqn)
        return [
            f"{target.fqn}, {counted(len(target.spec.rows), 'row')}, {target.parameters:,} parameters"
            + (f"; the same rows in {', '.join(tied[target.fqn])}" if tied[target.fqn] else "")
            for target in self.rows
            if not target.spec.rows_of
        ]


def lines_of(reasons: dict[str, str]) -> list[str]:
    """Return one line per name and reason that all blocks share.

    Args:
        reasons: FQN → reason.
    """
    groups = Counter((starred(fqn), reason) for fqn, reason in reasons.items())
    return [f"{name} ({count}): {reason}" for (name, reason), count in groups.items()]


def no_target_of(kind: str, modules: Mapping[str, nn.Module], passed_over: Mapping[str, str]) -> str:
    """Return why ``kind_options`` of a kind have no effect.

    Args:
        kind: its name.
        modules: FQN → module of the model.
        passed_over: module name → why ``"all-linear"`` passed over this linear.
    """
    reasons = {fqn: why for fqn, why in passed_over.items() if issubclass(kind_of(type(modules[fqn])) or object, KIND_NAMES[kind])}
    why = f": 'all-linear' passes over {lines_of(reasons)[0]}" if reasons else ""
    return f"kind_options[{kind!r}]: no target is of that kind{why}; leave the options out."


def left_out(modules: dict[str, nn.Module], passed_over: Container[str]) -> dict[str, int]:
    """Return module and type → elements left out by "all-linear". Vectors (norms, biases) and embeddings are not listed."""
    left: Counter[str] = Counter()
    for fqn, module in modules.items():
        kind = kind_of(type(module))
        served = kind is not None and kind.is_linear and fqn not in passed_over  # type: ignore[attr-defined]
        if not served and not isinstance(module, nn.Embedding):
            sizes = [elements(module, name, parameter) for name, parameter in own_parameters(module) if parameter.ndim > 1]
            if sum(sizes):
                base = getattr(type(module), "lora_base", type(module))
                left[f"{starred(fqn) or 'the model itself'} ({base.__name__})"] += sum(sizes)
    return dict(left.most_common())


def warn_of_left_out(left: Mapping[str, int], total: int, passed_over: Mapping[str, str]) -> None:
    """Warn if "all-linear" leaves out much of the model.

    Args:
        left: what `left_out` returned.
        total: elements of the model.
        passed_over: module name → why ``"all-linear"`` passed over this linear.
    """
    size = sum(left.values())
    if size > _MUCH * total:
        name = next(iter(left))
        why = next((reason for fqn, reason in passed_over.items() if name.startswith(f"{starred(fqn)} (")), None)
        named = "Name it in target_modules if LoRA has a kind for it, or in" if why is None else f"Passed over: {why}. Name it in"
        warnings.warn(
            f"target_modules='all-linear' leaves out {size / total:.0%} of the model, which no linear that LoRA can adapt"
            f" contains: {name} has {left[name]:,} of {total:,} elements. {named} exclude_modules if this is intended.",
            stacklevel=4,
        )


def own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the module's own parameters, without those of children and adapters."""
    return [(name, p) for name, p in module._parameters.items() if p is not None and not name.startswith(PREFIX)]
