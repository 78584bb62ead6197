"""Heads and embeddings: the modules at a model's ends, which LoRA trains in full or leaves alone."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.quantization.formats import format_of
from lightning_lora.utils.names import clean_name, modules_by_name
from lightning_lora.utils.patterns import compile_patterns, no_match

_FRESH_HEAD = re.compile(r"For\w*(Classification|MultipleChoice|QuestionAnswering)$")


def fresh_heads(model: nn.Module) -> list[str]:
    """FQNs of the heads that Hugging Face classification models start untrained: what stands beside the backbone.

    Recognised by the class name (``…ForSequenceClassification`` and the like), without importing transformers.
    """
    heads = []
    for fqn, module in model.named_modules():
        backbone = getattr(type(module), "base_model_prefix", None)
        if isinstance(backbone, str) and _FRESH_HEAD.search(type(module).__name__) and hasattr(module, backbone):
            own = [name for name, child in module.named_children() if name != backbone and any(True for _ in child.parameters())]
            heads += [clean_name(f"{fqn}.{name}" if fqn else name) for name in own]
    return heads


def saved_modules(model: nn.Module, config: LoRAConfig) -> list[str]:
    """FQNs of the modules that ``config.modules_to_save`` trains in full.

    Raises:
        ValueError: an entry matches nothing, or a module without parameters.
    """
    modules = modules_by_name(model)
    if config.modules_to_save == "auto":
        return fresh_heads(model)
    saved: list[str] = []
    for pattern in compile_patterns(config.modules_to_save, "modules_to_save"):
        found = [fqn for fqn in modules if pattern.matches(fqn)]
        if not found and not config.allow_unmatched:
            raise ValueError(no_match("modules_to_save", pattern.text, modules))
        empty = [fqn for fqn in found if not any(True for _ in modules[fqn].parameters())]
        if empty:
            raise ValueError(
                f"modules_to_save: {empty[0]!r} ({type(modules[empty[0]]).__name__}) has no parameters to train; name another module."
            )
        packed = [f"{fqn}.{part}" for fqn in found for part, child in modules[fqn].named_modules() if format_of(child)]
        if packed:
            raise ValueError(f"modules_to_save: {packed[0].rstrip('.')!r} is quantized and cannot be trained in full; adapt it instead.")
        saved += found
    saved = list(dict.fromkeys(saved))
    _check_not_tied(model, saved)
    return saved


def hf_ends(module: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The input and the output embeddings that a Hugging Face model names; None where it has none."""
    ends = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            ends.append(getattr(module, getter)())
        except (AttributeError, NotImplementedError):  # how transformers says "none" for models without text
            ends.append(None)
    return ends[0], ends[1]


def output_heads(model: nn.Module) -> set[nn.Module]:
    """The output embeddings that Hugging Face models name, which "all-linear" leaves alone."""
    heads = (hf_ends(module)[1] for module in model.modules() if hasattr(type(module), "get_output_embeddings"))
    return {head for head in heads if head is not None}


def within(fqn: str, parents: Iterable[str]) -> bool:
    """Whether a module is one of ``parents`` or inside one."""
    return any(fqn == parent or fqn.startswith(parent + ".") for parent in parents)


def _check_not_tied(model: nn.Module, saved: list[str]) -> None:
    """A module trained in full takes along whatever shares its weight: nobody means that without saying so."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(clean_name(name))
    for tied in names.values():
        inside = [name for name in tied if within(name, saved)]
        if inside and len(inside) < len(tied):
            outside = next(name for name in tied if name not in inside)
            raise ValueError(
                f"modules_to_save: {inside[0]} is tied to {outside}, which would train along; name both modules, or untie them first."
            )
