"""Convert between our config and PEFT's ``adapter_config.json``.

PEFT's fields are of three kinds. Some are honoured. Some change the maths in ways that are not supported: they are refused by name unless
they have their default value. Some change nothing once the adapter is trained: they are ignored. An unknown field raises a warning, since
it may change the adapter's meaning.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from typing import Any

from lightning_lora.adapter_io.peft_rules import saved_names
from lightning_lora.adapter_io.peft_types import check_types
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.factors import Exported
from lightning_lora.registry import VARIANTS
from lightning_lora.utils.patterns import is_regex

_INERT = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "fan_in_fan_out",
    "megatron_core", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
}  # fmt: skip
_HONOURED = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "use_rslora",
    "modules_to_save", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_dora", "variant_options", "target_parameters",
    "trainable_token_indices", "ensure_weight_tying", "lora_bias",
}  # fmt: skip
_REFUSED = {
    "use_qalora", "use_bdlora", "velora_config", "alora_invocation_tokens", "monteclora_config", "kasa_config",
    "arrow_config", "layer_replication", "megatron_config",
}  # fmt: skip
_NOT_CODE = {"auto_mapping", "megatron_core", "trust_remote_code"}
# Values of init_lora_weights that subtract something from the base. All others leave the base unchanged.
_CHANGED_BASE = re.compile(r"pissa(_niter_\d+)?|olora|corda|loftq|lora_ga")


def to_peft(
    config: LoRAConfig, layers: dict[str, Exported], saved: Collection[str], modules: Collection[str], *, transposed: bool = False
) -> dict[str, Any]:
    """Return the JSON that makes PEFT adapt exactly these layers.

    Args:
        config: of the layers.
        layers: FQN → what the layer exports.
        saved: FQNs of the modules trained in full.
        modules: FQNs of all modules of the model.
        transposed: True if some layers store their weight as (in, out).

    Raises:
        ValueError: PEFT's matching cannot express it.
    """
    for name in saved:  # PEFT compares with str.endswith, without a dot before the name
        other = next((m for m in modules if m.endswith(name) and m not in saved and not m.startswith(f"{name}.")), None)
        if other is not None:
            raise ValueError(
                f"modules_to_save: {name!r} cannot be saved in PEFT's format, which would take {other!r}, a name that ends in it,"
                " for it too."
            )
    stacks = {fqn: layer for fqn, layer in layers.items() if layer.peft_parameters}
    called = [fqn for fqn in layers if fqn not in stacks]
    # Name in PEFT's patterns → layer: that of the module, or of each parameter.
    keys = {key: layer for fqn, layer in layers.items() for key in ([f"{fqn}.{name}" for name in layer.peft_parameters] or [fqn])}
    fields = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _whole(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": target_names(_without(config.target_modules, stacks), called, saved, modules) if called else [],
        "bias": config.bias,
        "use_rslora": config.scaling == "rslora",
        "modules_to_save": sorted(saved) or None,
        # One anchored entry per layer: none overlap, so order does not matter. PEFT sorts keys when it saves, which would reorder patterns.
        "rank_pattern": {anchored(key): layer.rank for key, layer in keys.items() if layer.rank != config.rank},
        "alpha_pattern": {anchored(key): _whole(layer.alpha) for key, layer in keys.items() if layer.alpha != config.alpha},
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
    }
    if stacks:
        fields["target_parameters"] = sorted(key for key in keys if key not in layers)
        if config.dropout:
            warnings.warn(
                f"PEFT 0.21 has no dropout on {next(iter(stacks))!r}, whose weights are one tensor for all experts: the folder says"
                " lora_dropout=0, for PEFT's readers. load_adapter has the dropout.",
                stacklevel=4,
            )
            fields["lora_dropout"] = 0.0
    mixin = _mixin(config.variant)
    return fields if mixin is None else mixin.to_peft_fields(fields, config)


def _without(preferred: Collection[str], stacks: Collection[str]) -> Collection[str]:
    """Return the names that PEFT may target as modules: not those of modules whose parameters it targets."""
    if isinstance(preferred, str):
        return preferred
    return [name for name in preferred if not any(fqn == name or fqn.endswith(f".{name}") for fqn in stacks)]


def variant_fields(config: LoRAConfig) -> dict[str, Any]:
    """Return the fields of PEFT's JSON that a variant adds to those of plain LoRA."""
    return getattr(VARIANTS[config.variant], "peft_fields", {})


def as_lora(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert PEFT's JSON of any adapter type that has a variant here to the fields of PEFT's ``LoraConfig``.

    Raises:
        ValueError: no variant has this adapter type.
    """
    check_types(fields, where)
    types = {"LORA": "plain"} | {said["peft_type"]: name for name, said in _said().items() if "peft_type" in said}
    if fields.get("peft_type") not in types:
        raise ValueError(f"{where}: peft_type={fields.get('peft_type')!r}; only {', '.join(types)} adapters can be loaded.")
    mixin = _mixin(types[fields["peft_type"]])
    return fields if mixin is None else mixin.from_peft_fields(fields)


def _mixin(variant: str) -> type[LoRALayer] | None:
    """Return a variant's class; None for plain LoRA, which adds nothing."""
    mixin = VARIANTS[variant]
    return mixin if issubclass(mixin, LoRALayer) else None


def _said() -> dict[str, dict[str, Any]]:
    return {name: getattr(mixin, "peft_fields", {}) for name, mixin in VARIANTS.items()}


def from_peft(fields: dict[str, Any], where: str, tensor_names: Iterable[str]) -> LoRAConfig:
    """Return our config for PEFT's JSON.

    Args:
        fields: the JSON.
        where: the file's path, for messages.
        tensor_names: of the tensors beside it, without :data:`PREFIX`; they give the targets if the JSON names none.

    Raises:
        ValueError: it is not a LoRA config, or asks for something that is not supported.
    """
    fields = as_lora(fields, where)
    for name in sorted(_REFUSED & fields.keys()):
        if fields[name] not in (None, False, [], {}):
            raise ValueError(f"{where}: {name}={fields[name]!r} changes what the adapter computes and is not supported.")
    formulas = [next(iter(mine)) for mine in _said().values() if _has(fields, mine)]
    if len(formulas) > 1:
        both = " and ".join(f"{name}={fields[name]!r}" for name in formulas)
        raise ValueError(f"{where}: {both} are two formulas, which PEFT does not combine either.")
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and _CHANGED_BASE.fullmatch(init):
        raise ValueError(
            f"{where}: init_lora_weights={init!r} trains on a base changed at the start;"
            " convert the adapter to plain LoRA when saving it in PEFT."
        )
    if fields.get("loftq_config"):
        raise ValueError(
            f"{where}: loftq_config={fields['loftq_config']!r} belongs to a base that was changed at the start,"
            " which this adapter does not carry."
        )
    acting = sorted(name for name in _NOT_CODE & fields.keys() if fields[name] not in (None, False, "megatron.core"))
    unknown = sorted(fields.keys() - _INERT - _HONOURED - _REFUSED - {"trust_remote_code"})
    for name in unknown:
        warnings.warn(f"{where}: {name}={fields[name]!r} is not a field we know; it is not acted on.", stacklevel=3)
    for name in acting:
        if name != "auto_mapping":
            warnings.warn(f"{where}: {name}={fields[name]!r} is never acted on: nothing is imported or run for an adapter.", stacklevel=3)
    owners = sorted({name.rpartition(".lora_")[0] for name in tensor_names if ".lora_" in name and not name.endswith(".lora_rows")})
    # The module of each parameter. A model tells more: placing.py reads the JSON again with one.
    by_weight = list(dict.fromkeys(name.rpartition(".")[0] or name for name in fields.get("target_parameters") or ()))
    targets = fields.get("target_modules") or ([] if by_weight else owners)
    if by_weight:
        targets = [*([f"^(?:{targets})$"] if isinstance(targets, str) else targets), *by_weight]
    saved = saved_names(fields)
    exclude = fields.get("exclude_modules") or ()
    # PEFT never adapts what modules_to_save covers, even if it is targeted. Our config refuses that, so those modules are excluded.
    exclude = [rf"(?:{exclude})"] if isinstance(exclude, str) else [*exclude]
    exclude += [rf"(?:.*\.)?{re.escape(name)}(?:\..*)?" for name in saved]
    targets, layers = _layers(targets, fields.get("layers_to_transform"), fields.get("layers_pattern"))
    said: dict[str, Any] = dict(
        rank=fields.get("r", 8),
        alpha=fields.get("lora_alpha", 8),
        dropout=fields.get("lora_dropout", 0.0),
        target_modules=targets,
        exclude_modules=exclude,
        layers=layers,
        bias=fields.get("bias", "none"),
        rank_pattern={_ours(key): value for key, value in (fields.get("rank_pattern") or {}).items()},
        alpha_pattern={_ours(key): value for key, value in (fields.get("alpha_pattern") or {}).items()},
        modules_to_save=saved,
        trainable_token_indices=fields.get("trainable_token_indices"),
        scaling="rslora" if fields.get("use_rslora") else "standard",
        init=init if init in ("gaussian", "orthogonal") else "kaiming",
        variant=variant_of(fields),
        variant_options=fields.get("variant_options", {}),
        allow_unmatched=True,  # PEFT's patterns may match nothing; loading checks the tensors' names instead
    )
    try:
        return LoRAConfig(**said)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def variant_of(fields: dict[str, Any]) -> str:
    """Return the variant whose fields the JSON has. Variants without fields of their own are plain LoRA to PEFT."""
    return next((name for name, mine in _said().items() if _has(fields, mine)), "plain")


def _has(fields: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Return whether a JSON has the fields of a variant that has some."""
    return bool(mine) and all(fields.get(key) == mine[key] for key in mine)


def target_names(preferred: Collection[str], layers: Collection[str], saved: Collection[str], modules: Collection[str]) -> list[str] | str:
    """Return PEFT ``target_modules`` that match exactly these layers: the preferred plain names if they do, else FQNs, else a regex."""
    for names in (preferred, layers):
        if not isinstance(names, str) and not any(map(is_regex, names)):
            hit = {m for m in modules if any(m == name or m.endswith(f".{name}") for name in names)}
            if {m for m in hit if not any(m == s or m.startswith(f"{s}.") for s in saved)} == set(layers):
                return sorted(names)
    return "|".join(re.escape(fqn) for fqn in sorted(layers))


def _layers(targets: Any, indices: Any, patterns: Any) -> tuple[Any, list[int] | None]:
    """Convert PEFT's ``layers_to_transform`` and ``layers_pattern``, the name of the list that the indices count in.

    Returns:
        The targets, and the layer indices; with ``layers_pattern`` the indices are part of the targets' regex instead.
    """
    if indices is None or indices == []:
        return targets, None
    indices = [indices] if isinstance(indices, int) else list(indices)
    if not patterns:
        return targets, indices
    patterns = [patterns] if isinstance(patterns, str) else patterns
    inside = rf"(?=(?:.*?\.)?(?:{'|'.join(patterns)})\.(?:{'|'.join(map(str, indices))})\.)"
    return rf"{inside}(?:.*\.)?(?:{'|'.join(map(re.escape, targets))})", None


def _ours(key: str) -> str:
    """Convert a key of PEFT's rank_pattern, which PEFT matches as ``re.match(rf"(.*\\.)?({key})$", FQN)``, to our pattern."""
    return rf"(?:.*\.)?(?:{key})" if is_regex(key) else key


def anchored(fqn: str) -> str:
    """Return a key of PEFT's ``rank_pattern`` that matches this name alone."""
    return "^" + re.escape(fqn)


def _whole(alpha: float) -> float | int:
    """Return a whole alpha as an integer: PEFT's own files have integers, and some readers require them."""
    return int(alpha) if float(alpha).is_integer() else alpha
