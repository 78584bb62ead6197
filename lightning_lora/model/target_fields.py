"""The fields of a config that choose modules by patterns: which modules each matches, and how many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_lora.config import ALL_LINEAR, LoRAConfig
from lightning_lora.layers.adapting import refusal
from lightning_lora.layers.several_weights import SeveralWeights
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.model.heads import output_heads, within
from lightning_lora.model.routers import routers
from lightning_lora.model.suitability import Suitability
from lightning_lora.registry import kind_of
from lightning_lora.utils.patterns import compile_patterns, is_regex, starred


class Field:
    """Hold the patterns of one config field and count the modules that each matches."""

    def __init__(self, name: str, entries: str | Iterable[str]) -> None:
        self.name, self.patterns = name, compile_patterns(entries, name)
        self.hits = Counter({pattern.text: 0 for pattern in self.patterns})

    def matching(self, fqn: str) -> list[str]:
        """Return the entries that match a module, and count them."""
        found = [pattern.text for pattern in self.patterns if pattern.matches(fqn)]
        self.hits.update(found)
        return found

    def would_match(self, fqn: str) -> bool:
        """Return whether an entry matches a module, without counting it."""
        return any(pattern.matches(fqn) for pattern in self.patterns)

    def values(self, table: dict[str, Any], names: list[str], fqn: str, default: Any) -> list[Any]:
        """Return what a table of patterns gives each name of a layer, or else the layer itself."""
        own = next((table[text] for text in self.matching(fqn)), default)
        return [own if name == fqn else next((table[text] for text in self.matching(name)), own) for name in names]


class AllLinear(Field):
    """``target_modules="all-linear"``: match every linear and all experts, but no output heads, no routers, and nothing that is trained in
    full or unsuitable for LoRA.
    """

    def __init__(
        self, model: nn.Module, modules: dict[str, nn.Module], saved: list[str], suitability: Suitability, config: LoRAConfig
    ) -> None:
        self.name, self.hits = "target_modules", Counter({ALL_LINEAR: 0})
        heads = output_heads(model)
        kinds = {fqn: kind_of(type(module)) for fqn, module in modules.items() if module not in heads and not within(fqn, saved)}
        linears = [fqn for fqn, kind in kinds.items() if kind is not None and kind.is_linear]  # type: ignore[attr-defined]
        inside = {f"{fqn}.{name}" for fqn in linears for name in children_too(modules[fqn]) if not suitability.reason(modules[fqn])}
        linears = [fqn for fqn in linears if fqn not in inside]  # adapted together with the module around them
        self.passed_over = routers(modules, linears)
        for fqn in linears:
            reason = suitability.reason(modules[fqn], variant=config.variant)
            if reason is None and issubclass(kinds[fqn], SeveralWeights):  # type: ignore[arg-type]
                # Not every variant and format suits experts. The linears around them are adapted all the same.
                reason = refusal(modules[fqn], LayerSpec(config, config.rank, config.alpha, starred(fqn)))
            if reason is not None:
                self.passed_over.setdefault(fqn, reason.removesuffix("."))
        self.linears = set(linears) - self.passed_over.keys()

    def matching(self, fqn: str) -> list[str]:
        """Return "all-linear" for a module that is among them, and count it."""
        found = [ALL_LINEAR] if self.would_match(fqn) else []
        self.hits.update(found)
        return found

    def would_match(self, fqn: str) -> bool:
        """Return whether a module is among them, without counting it."""
        return fqn in self.linears


def children_too(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the children that are adapted together with a module."""
    return getattr(kind_of(type(module)), "children_too", ())


def excluded_around(excluded: Field, wanted: Field, modules: dict[str, nn.Module], chosen: Iterable[str]) -> list[str]:
    """Return a problem per exclusion that matches no target, only modules around targets: these would be adapted all the same."""
    problems = []
    for pattern in excluded.patterns:
        names = [fqn for fqn in modules if pattern.matches(fqn)]
        inside = next((fqn for fqn in chosen if fqn.startswith(tuple(f"{name}." for name in names))), None)
        if inside is not None and not any(wanted.would_match(fqn) for fqn in names):
            around = next(name for name in names if inside.startswith(f"{name}."))
            cure = pattern.text if is_regex(pattern.text) else rf"(.*\.)?{pattern.text}"
            problems.append(
                f"exclude_modules: {pattern.text!r} matches {around!r}, which is no target itself, and {inside!r} in it would be adapted."
                rf" To exclude all that is in it write r'{cure}\..*'."
            )
    return problems
