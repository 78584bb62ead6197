"""Names of tensors in PEFT's files and in a model, both ways.

They differ for three reasons. PEFT wraps modules, which adds parts to names. Other tools leave an adapter's name or a wrapper's part in
them. And transformers renames modules between releases, so a file may have the names of an older model or of a published checkpoint.

PEFT applies transformers' renamings to every LoRA tensor that it reads, even if the name is the model's own already. A few renamings then
give a wrong name. Such a layer is written under the name that PEFT turns into the right one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from lightning_lora.registry import VARIANTS
from lightning_lora.utils.names import bare, clean_name
from lightning_lora.utils.transformers_conventions import checkpoint_conversions, is_converted

ROOT = "base_model."
PREFIX = f"{ROOT}model."  # begins every tensor name in PEFT's files
_FACTOR = re.compile(
    r"\.(lora_B\.bias|lora_(?:embedding_)?[AB]|lora_magnitude_vector|vera_lambda_[bd]|token_adapter\.trainable_tokens_delta)(?:\.(?!weight$|bias$)([^.]+))?(?:\.weight)?$"
)
_NESTED = re.compile(r"(.*?)((?:\.base_layer)*)")
_OURS = {"lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B", "vera_lambda_b": "lora_lambda_b", "vera_lambda_d": "lora_lambda_d"}
_OURS |= {"token_adapter.trainable_tokens_delta": "lora_rows", "lora_B.bias": "lora_B_bias"}
# B of a layer inside an adapted one: the output projection of nn.MultiheadAttention. PEFT 0.21 adds its update twice, in forward passes and
# in merges (tests/parity/test_attention.py). So the B that gives the update is twice the file's.
_ADDED_TWICE = re.compile(r"\.base_layer\.(?!lora_)[^.]+\.lora_B(?:\.(?!weight$)[^.]+)?\.weight$")
_PROBE = ".lora_A.weight"


def our_names(names: Iterable[str], where: str) -> dict[str, str]:
    """Return name in a PEFT file → name in our adapted model. PEFT's copies of untrained modules are left out.

    Args:
        names: all names in a file.
        where: the file's path, for messages.

    Raises:
        ValueError: a name does not follow PEFT's convention, or the file holds several adapters.
    """
    names = [name for name in names if ".original_module." not in name]
    adapters = sorted({match[2] for name in names if (match := _FACTOR.search(name)) and match[2]})
    found = {name: our_name(name, where, adapters) for name in names}
    factors = [ours for name, ours in found.items() if _FACTOR.search(name)]
    if len(adapters) > 1 or (adapters and len(set(factors)) < len(factors)):
        raise ValueError(f"{where} holds several adapters ({', '.join(adapters)}); save one of them alone.")
    return found


def factor_in_file(name: str) -> float:
    """Return what a tensor is multiplied by when it is written to a PEFT file under this name, and divided by when it is read."""
    return 0.5 if _ADDED_TWICE.search(name) else 1.0


def our_name(name: str, where: str, adapters: Collection[str] = ()) -> str:
    """Return the name in our adapted model of a tensor in a PEFT file.

    Args:
        name: in the file. Parts that wrappers added are dropped.
        where: the file's path, for messages.
        adapters: names of adapters that stand in the file's names.

    Raises:
        ValueError: the name does not follow PEFT's convention.
    """
    clean = clean_name(name).removeprefix("module.")
    shared = {f"{ROOT}{each}": each for mixin in VARIANTS.values() for each in getattr(mixin, "peft_shared", ())}
    if clean in shared:
        return shared[clean]
    if not clean.startswith(PREFIX):
        raise ValueError(f"{where}: tensor {name!r} does not start with {PREFIX!r}; this is no PEFT adapter.")
    clean = clean.removeprefix(PREFIX)
    if match := _FACTOR.search(clean):
        owner, inside = _NESTED.fullmatch(clean[: match.start()]).groups()  # type: ignore[union-attr]
        owner = re.sub(r"\.base_layer(?=\.)", "", owner)  # of a layer inside an adapted one
        depth = inside.count(".")  # PEFT wraps a module once for each of its parameters that it adapts
        return f"{owner}.{_OURS.get(match[1], match[1])}" + (f"_{depth}" if depth else "")
    several = "|".join(map(re.escape, ("default", *adapters)))
    return re.sub(rf"\.(?:(?:token_adapter\.)?base_layer|modules_to_save(?:\.(?:{several})(?=\.))?)\.", ".", clean)


def peft_name(name: str, adapted: Collection[str]) -> str:
    """Return the name of a base tensor or of a layer in PEFT's files, where what is inside an adapted layer is one module deeper."""
    parts = name.split(".")
    inside = [i for i in range(1, len(parts)) if ".".join(parts[:i]) in adapted]
    return ".".join(f"base_layer.{part}" if i in inside else part for i, part in enumerate(parts))


def names_here(model: nn.Module, old: Iterable[str], modules: Collection[str]) -> dict[str, str]:
    """Return name of a module in a file → its name in this model, for those that transformers has renamed since.

    Args:
        model: the adapter's root.
        old: names of modules in the file.
        modules: names of the model's modules.
    """
    conversions = None
    found: dict[str, str] = {}
    for name in sorted(old):
        if name in modules:
            continue
        if conversions is None:
            conversions = checkpoint_conversions(bare(model))
        for end in (".weight", _PROBE):  # some patterns end in the parameter's name, others go on after the module's
            new = _renamed(name + end, conversions).removesuffix(end)
            if new in modules:
                found[name] = new
                break
    return found


class Conversion(NamedTuple):
    """What becomes of a module of an older model.

    Attributes:
        name: of the parameter here that its weight is a part of.
        pattern: the one of the conversion's patterns that its name matches.
        conversion: transformers' own.
    """

    name: str
    pattern: str
    conversion: Any


def conversion_of(model: nn.Module, old: str) -> Conversion | None:
    """Return what becomes of a module of an older model, such as one expert. None if that is not known."""
    name = f"{old}.weight"
    for conversion in checkpoint_conversions(bare(model)):
        name, pattern = conversion.rename_source_key(name)
        if pattern is not None and hasattr(conversion, "operations"):
            return Conversion(name, pattern, conversion)
    return None


def rebuilt(model: nn.Module, old: str) -> str | None:
    """Return what replaces a module of an older model, in words. None if that is not known."""
    known = conversion_of(model, old)
    if known is None:
        return None
    patterns = known.conversion.target_patterns
    return f"part of {known.name!r}" if len(patterns) == 1 else f"split into {', '.join(patterns)}"


def names_for_peft(model: nn.Module, layers: Iterable[str]) -> dict[str, str | None]:
    """Return FQN of an adapted layer → the name under which PEFT 0.21 finds it; None if there is no such name.

    Args:
        model: the adapter's root.
        layers: FQNs.
    """
    model = bare(model)
    if not is_converted(model):
        return {fqn: fqn for fqn in layers}
    conversions = [each for each in checkpoint_conversions(model) if not hasattr(each, "operations")]
    backward = [conversion.reverse_transform() for conversion in reversed(conversions)]
    found: dict[str, str | None] = {}
    for fqn in layers:
        names = (name for name in _candidates(fqn + _PROBE, backward) if _read(name, conversions) == fqn + _PROBE)
        name = next(names, None)
        found[fqn] = None if name is None else name.removesuffix(_PROBE)
    return found


def names_in_file(root: nn.Module, layers: Collection[str]) -> dict[str, str]:
    """Return FQN of an adapted layer → its name in a file of ours. Warn where PEFT would not find it."""
    found = names_for_peft(root, layers)
    unread = [fqn for fqn, name in found.items() if name is None]
    if unread:
        warnings.warn(
            f"{unread[0]!r} and {len(unread) - 1} more: PEFT 0.21 renames them when it reads a file, to names that this model does not"
            " have. load_adapter reads this folder.",
            stacklevel=3,
        )
    return {fqn: peft_name(fqn, layers) if name in (None, fqn) else name for fqn, name in found.items()}


def _candidates(name: str, backward: list[Any]) -> Iterator[str]:
    """Yield the model's own name, then the name before each renaming, then the name before all renamings."""
    yield name
    for conversion in backward:
        yield _renamed(name, [conversion])
    yield _renamed(name, backward)


def _read(name: str, conversions: list[Any]) -> str:
    """Return the name as which PEFT 0.21 reads a LoRA tensor's name. PEFT undoes renamings that only remove the beginning."""
    new = _renamed(name, conversions)
    return name if name.endswith(new) else new


def _renamed(name: str, conversions: list[Any]) -> str:
    for conversion in conversions:
        if not hasattr(conversion, "operations"):
            name, _ = conversion.rename_source_key(name)
    return name
