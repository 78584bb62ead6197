"""Find heads and embeddings, the modules that LoRA trains in full or leaves frozen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from lightning_lora.config import ALL_LINEAR, LoRAConfig
from lightning_lora.layers.base import lora_layers
from lightning_lora.quantization.formats import format_of
from lightning_lora.utils.names import clean_name, modules_by_name
from lightning_lora.utils.patterns import Pattern, compile_patterns, no_match
from lightning_lora.utils.transformers_conventions import is_loaded

# Classes whose heads have always been trained in full, and those whose heads are where it is not known what the checkpoint had.
_CLASSIFIERS = re.compile(r"For\w*(Classification|MultipleChoice|QuestionAnswering)\w*$")
_TASKS = re.compile(r"For\w*(Classification|MultipleChoice|QuestionAnswering|CTC|XVector|Segmentation|Detection|DepthEstimation)\w*$")
_TRAINED = "_lora_trained_in_full"  # set on a module, because transformers' marks are lost when parameters are sharded or copied


def fresh_heads(model: nn.Module, targets: Sequence[Pattern] = ()) -> list[str]:
    """FQNs of the modules that Hugging Face task models (``…ForSequenceClassification`` and the like) start untrained.

    A model that ``from_pretrained`` loaded says which parameters the checkpoint had: what it had not is fresh, wherever it is. Otherwise
    it is what stands beside the backbone. A classifier or a question answering head is trained in full in any case, as PEFT does.

    Args:
        model: any module.
        targets: what is to be adapted by name, such as a fresh pooler's layer: that is adapted, not trained in full.
    """
    fresh: list[str] = []
    for fqn, module in model.named_modules():
        if not isinstance(getattr(type(module), "base_model_prefix", None), str) or not _FOR.search(type(module).__name__):
            continue
        missing = _not_loaded(module)
        inside = [name for name, _ in module.named_modules() if any(p.matches(clean_name(f"{fqn}.{name}".strip("."))) for p in targets)]
        names = [name for name in missing or () if not any(within(target, [name]) for target in inside)]
        if _CLASSIFIERS.search(type(module).__name__) or (missing is None and _TASKS.search(type(module).__name__)):
            names += _beside_backbone(module)
        names = list(dict.fromkeys(name for name, _ in module.named_modules() if name in names))
        fresh += [clean_name(f"{fqn}.{name}" if fqn else name) for name in names if not within(name.rpartition(".")[0], names)]
    return fresh


_FOR = re.compile(r"For[A-Z]\w*$|LMHeadModel$|WithLMHead\w*$")


def _not_loaded(model: nn.Module) -> list[str] | None:
    """Return the largest submodules that the checkpoint had no parameter of, by name. None: not loaded, or loaded without marks."""
    loaded = {id(p) for p in model.parameters() if is_loaded(p)}
    plain = [p for module in model.modules() if not format_of(module) for p in module._parameters.values() if p is not None]
    if not plain or 2 * sum(id(p) in loaded for p in plain) < len(plain):  # some ways of quantizing make new parameters
        return None
    names: list[str] = []
    for name, module in model.named_modules():
        own = list(module.parameters())
        if name and own and not within(name, names) and not any(id(p) in loaded for p in own) and not any(map(format_of, module.modules())):
            names.append(name)
    return names


def left_frozen(model: nn.Module, adapted: Iterable[str], saved: Iterable[str]) -> list[str]:
    """Return the names of what trains without LoRA and is frozen with it.

    These are a module's children without an adapter, its own parameters, and what the checkpoint of a pretrained part did not contain.

    Args:
        model: the whole module, before its parameters are frozen.
        adapted: FQNs of the layers to adapt.
        saved: FQNs of the modules trained in full.
    """
    busy = [*adapted, *saved]
    names = [name for name, p in model.named_parameters(recurse=False) if p.requires_grad]
    for name, child in model.named_children():
        if any(p.requires_grad for p in child.parameters()) and not any(within(fqn, [clean_name(name)]) for fqn in busy):
            names.append(name)
    for fqn, module in model.named_modules():
        if isinstance(getattr(type(module), "base_model_prefix", None), str):
            names += [f"{fqn}.{name}".strip(".") for name in _not_loaded(module) or ()]
    names = [clean_name(name) for name in names]
    return [name for name in dict.fromkeys(names) if not within(name, saved) and not any(within(fqn, [name]) for fqn in busy)]


def _beside_backbone(model: nn.Module) -> list[str]:
    """Names of a task model's children that are no pretrained model; where all is inside one, of the layers with an output per label."""
    children = {name: child for name, child in model.named_children() if any(True for _ in child.parameters())}
    prefix, (embeddings, _) = getattr(type(model), "base_model_prefix", ""), hf_ends(model)
    backbones = {
        name for name, child in children.items() if name == prefix or hasattr(type(child), "base_model_prefix") or child is embeddings
    }
    if not backbones and children:
        backbones = {max(children, key=lambda name: sum(p.numel() for p in children[name].parameters()))}
    heads = [name for name in children if name not in backbones]
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    sizes = ("out_features", "out_channels")
    return heads or [
        name for name, module in model.named_modules() if labels and any(getattr(module, size, None) == labels for size in sizes)
    ]


def saved_modules(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the FQNs of the modules that ``config.modules_to_save`` trains in full.

    Raises:
        ValueError: an entry matches nothing, or a module without parameters.
    """
    modules = modules_by_name(model)
    if config.modules_to_save == "auto":
        if next(lora_layers(model), None) is None:
            everything = config.target_modules == ALL_LINEAR
            return fresh_heads(model, () if everything else compile_patterns(config.target_modules, "target_modules"))
        return [clean_name(name) for name, module in model.named_modules() if _TRAINED in module.__dict__]
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


def note_saved(model: nn.Module, saved: Iterable[str]) -> None:
    """Mark these modules as trained in full, and no others."""
    for module in model.modules():
        module.__dict__.pop(_TRAINED, None)
    modules = modules_by_name(model)
    for fqn in saved:
        modules[fqn].__dict__[_TRAINED] = True


def hf_ends(module: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the input and the output embeddings that a Hugging Face model names; None where it has none."""
    ends = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            ends.append(getattr(module, getter)())
        except (AttributeError, NotImplementedError):  # transformers raises these for models without text
            ends.append(None)
    return ends[0], ends[1]


def output_heads(model: nn.Module) -> set[nn.Module]:
    """Return the output embeddings that Hugging Face models name. "all-linear" passes over them."""
    heads = (hf_ends(module)[1] for module in model.modules() if hasattr(type(module), "get_output_embeddings"))
    return {head for head in heads if head is not None}


def within(fqn: str, parents: Iterable[str]) -> bool:
    """Return True if a module is one of ``parents`` or inside one."""
    return any(fqn == parent or fqn.startswith(parent + ".") for parent in parents)


def _check_not_tied(model: nn.Module, saved: list[str]) -> None:
    """Refuse a module whose weight another module shares: training it in full would train that module too."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(clean_name(name))
    for tied in names.values():
        inside = [name for name in tied if within(name, saved)]
        if inside and len(inside) < len(tied):
            outside = next(name for name in tied if name not in inside)
            raise ValueError(
                f"modules_to_save: {inside[0]} is tied to {outside}, which would train too; name both modules, or untie them first."
            )
