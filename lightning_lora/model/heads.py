"""Find heads and embeddings: what LoRA trains in full, and what it leaves frozen."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import nn

from lightning_lora.config import ALL_LINEAR, LoRAConfig
from lightning_lora.layers.base import lora_layers
from lightning_lora.quantization.formats import format_of, unknown_storage
from lightning_lora.utils.names import clean_name, join, modules_by_name, parameters_by_name
from lightning_lora.utils.patterns import Pattern, compile_patterns, no_match
from lightning_lora.utils.shared_memory import SharedMemory
from lightning_lora.utils.transformers_conventions import computed_when_missing, is_loaded

# Classes whose heads are always trained in full, and classes whose heads are fresh if the model was not loaded.
_CLASSIFIERS = re.compile(r"For\w*(Classification|MultipleChoice|QuestionAnswering)\w*$")
_TASKS = re.compile(r"For\w*(Classification|MultipleChoice|QuestionAnswering|CTC|XVector|Segmentation|Detection|DepthEstimation)\w*$")
_FOR = re.compile(r"For[A-Z]\w*$|LMHeadModel$|WithLMHead\w*$")
_VISION = {"timm", "torchvision"}  # whose models nearly always get a new head, under one of these names
_VISION_HEADS = {"classifier", "fc", "head", "head_dist", "heads"}
_TRAINED = "_lora_trained_in_full"  # set on a module, because transformers' marks are lost when parameters are sharded or copied


def fresh_heads(model: nn.Module, targets: Sequence[Pattern] = ()) -> list[str]:
    """Return the FQNs of the modules, and of the parameters outside them, that Hugging Face models start untrained.

    Three rules, by what is known of a model:

    - ``from_pretrained`` loaded it, or a part of it: all that no checkpoint contained is fresh, wherever it is.
    - It was not loaded: the head of a task model (``…ForSequenceClassification`` and the like) is fresh, which is all beside its backbone.
    - A head for classification or question answering is trained in full in any case, as PEFT does.

    A backbone alone has no head. Its pooler may not be used, so a fresh one stays frozen.

    Args:
        model: any module.
        targets: patterns of modules to adapt, in some rows or wholly. A fresh module that one matches is not trained in full.
    """
    fresh: list[str] = []
    tasks: list[str] = []
    for fqn, module in model.named_modules():
        if not _may_have_head(module) or within(fqn, tasks):  # a task model's parts have no heads of their own
            continue
        tasks += [fqn] * _is_task(module)
        adapted = [name for name, _ in module.named_modules() if any(p.matches(clean_name(join(fqn, name))) for p in targets)]
        missing = _not_loaded(module, adapted)
        found = set(missing or ())
        if _CLASSIFIERS.search(type(module).__name__) or (missing is None and _TASKS.search(type(module).__name__)):
            found |= set(_beside_backbone(module))
        fresh += [clean_name(join(fqn, name)) for name in _names(module) if name in found]
    return [name for name in dict.fromkeys(fresh) if not within(name.rpartition(".")[0], fresh)]


def _may_have_head(module: nn.Module) -> bool:
    """Return True for a Hugging Face model that is more than one backbone."""
    return _is_task(module) or (_is_hf(module) and any(_is_hf(each) for each in module.modules() if each is not module))


def _is_task(module: nn.Module) -> bool:
    return _is_hf(module) and _FOR.search(type(module).__name__) is not None


def _is_hf(module: nn.Module) -> bool:
    return isinstance(getattr(type(module), "base_model_prefix", None), str)


def _not_loaded(model: nn.Module, adapted: Collection[str] = ()) -> list[str] | None:
    """Return what no checkpoint contained: names of the largest such modules, and of single parameters.

    Return None if nothing was loaded, or if parameters were replaced after loading. Conversions of layers do that, and lose transformers'
    marks. Most parameters of a model are unmarked then, and so are most of a child that has marks.

    Args:
        model: a Hugging Face model.
        adapted: names of its modules to leave out.
    """
    missing = {id(p) for name, p in model.named_parameters() if not (is_loaded(p) or computed_when_missing(model, name))}
    packed = {
        id(p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if p is not None and (format_of(module) or unknown_storage(module, name))
    }
    missing -= packed
    loaded = {id(p) for p in model.parameters() if is_loaded(p)} - packed

    def mostly(module: nn.Module) -> bool:
        inside = {id(p) for p in module.parameters()}
        return len(inside & loaded) >= len(inside & missing)

    parts = [child for child in model.children() if not loaded.isdisjoint(map(id, child.parameters()))]
    if not loaded or not (mostly(model) or all(map(mostly, parts))):
        return None
    names: list[str] = []
    for name, module in model.named_modules():
        inside = {id(p) for p in module.parameters()}
        if not inside & missing or within(name, [*names, *adapted]):
            continue
        if name and inside <= missing and not any(within(each, [name]) for each in adapted):
            names.append(name)
        else:
            inside = {id(p) for p in module.parameters(recurse=False)}
            names += [join(name, own) for own, p in module._parameters.items() if id(p) in missing]
        missing -= inside  # tied parameters are named once
    return names


def _names(model: nn.Module) -> Iterator[str]:
    """Yield the names of all modules, the root's as "", each followed by the names of its own parameters."""
    for name, module in model.named_modules():
        yield name
        yield from (join(name, own) for own, p in module._parameters.items() if p is not None)


def left_frozen(model: nn.Module, adapted: Iterable[str], saved: Iterable[str]) -> list[str]:
    """Return the names of what trains without LoRA and is frozen with it.

    These are a module's children without an adapter, its own parameters, the heads of vision models inside, and what the checkpoint of a
    pretrained part did not contain.

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
    vision: list[str] = []
    for fqn, module in model.named_modules():
        if _is_hf(module):
            names += [join(fqn, name) for name in _not_loaded(module) or ()]
        elif type(module).__module__.partition(".")[0] in _VISION and not within(fqn, vision):
            vision.append(fqn)
            heads = ((name, child) for name, child in module.named_children() if name in _VISION_HEADS)
            names += [join(fqn, name) for name, child in heads if any(p.requires_grad for p in child.parameters())]
    names = [clean_name(name) for name in names]
    return [name for name in dict.fromkeys(names) if not within(name, saved) and not any(within(fqn, [name]) for fqn in busy)]


def _beside_backbone(model: nn.Module) -> list[str]:
    """Return the names of a task model's children and own parameters beside its backbone.

    The backbone is the child that transformers names. Without one, it is the Hugging Face models and embeddings. Without these, it is the
    largest child, with the children before it as its stem. If nothing is beside the backbone, return its layers with one output per label.
    """
    children = {name: child for name, child in model.named_children() if any(True for _ in child.parameters())}
    prefix, (embeddings, _) = getattr(type(model), "base_model_prefix", ""), hf_ends(model)
    backbones = {prefix} & children.keys() or {name for name, child in children.items() if _is_hf(child) or child is embeddings}
    if backbones:
        heads = [name for name in children if name not in backbones] + [name for name, p in model._parameters.items() if p is not None]
    else:
        names = sorted(children, key=lambda name: sum(p.numel() for p in children[name].parameters()))
        heads = [*children][[*children].index(names[-1]) + 1 :] if names else []
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    sizes = ("out_features", "out_channels")
    return heads or [
        name for name, module in model.named_modules() if labels and any(getattr(module, size, None) == labels for size in sizes)
    ]


def saved_modules(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the FQNs of the modules and parameters that ``config.modules_to_save`` trains in full.

    An entry that matches no module may match parameters, such as a bare ``nn.Parameter`` of the model itself.

    Raises:
        ValueError: an entry matches nothing, or a module without parameters.
    """
    modules = modules_by_name(model)
    if config.modules_to_save == "auto":
        if next(lora_layers(model), None) is None:
            targets = () if config.target_modules == ALL_LINEAR else compile_patterns(config.target_modules, "target_modules")
            named = config.trainable_token_indices if isinstance(config.trainable_token_indices, Mapping) else ()
            return fresh_heads(model, (*targets, *compile_patterns(list(named), "trainable_token_indices")))
        return [clean_name(join(name, own)) for name, module in model.named_modules() for own in module.__dict__.get(_TRAINED, ())]
    parameters = parameters_by_name(model)
    saved: list[str] = []
    for pattern in compile_patterns(config.modules_to_save, "modules_to_save"):
        found = [fqn for fqn in modules if pattern.matches(fqn)] or [fqn for fqn in parameters if pattern.matches(fqn)]
        if not found and not config.allow_unmatched:
            raise ValueError(no_match("modules_to_save", pattern.text, modules))
        empty = [fqn for fqn in found if fqn in modules and not any(True for _ in modules[fqn].parameters())]
        if empty:
            raise ValueError(
                f"modules_to_save: {empty[0]!r} ({type(modules[empty[0]]).__name__}) has no parameters to train; name another module."
            )
        packed = [fqn for fqn, module in modules.items() if format_of(module) and (within(fqn, found) or fqn in map(_owner, found))]
        if packed:
            raise ValueError(f"modules_to_save: {packed[0]!r} is quantized and cannot be trained in full; adapt it instead.")
        saved += found
    saved = list(dict.fromkeys(saved))
    _check_not_tied(model, saved)
    return saved


def note_saved(model: nn.Module, saved: Iterable[str]) -> None:
    """Mark these modules and parameters as trained in full, and no others."""
    for module in model.modules():
        module.__dict__.pop(_TRAINED, None)
    modules = {"": model, **modules_by_name(model)}
    for fqn in saved:
        owner, own = (fqn, "") if fqn in modules else (_owner(fqn), fqn.rpartition(".")[2])
        modules[owner].__dict__.setdefault(_TRAINED, []).append(own)


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
    """Return True if a module or parameter is one of ``parents`` or inside one. The root's name is ""."""
    return any(not parent or fqn == parent or fqn.startswith(parent + ".") for parent in parents)


def _owner(fqn: str) -> str:
    return fqn.rpartition(".")[0]


def _check_not_tied(model: nn.Module, saved: list[str]) -> None:
    """Refuse a module whose weight another module shares: training it in full would train that module too."""
    parameters = [(clean_name(name), parameter) for name, parameter in model.named_parameters(remove_duplicate=False)]
    memory = SharedMemory(parameters)
    for inside, parameter in parameters:
        outside = [name for name in memory.names(parameter) if not within(name, saved)] if within(inside, saved) else []
        if outside:
            raise ValueError(
                f"modules_to_save: {inside} is tied to {outside[0]}, which would train too; name both modules, or untie them first."
            )
