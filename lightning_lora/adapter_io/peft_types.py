"""Check the types of the fields in PEFT's ``adapter_config.json``: anyone may have written the file."""

from __future__ import annotations

from typing import Any

_NAMES = "a name or a list of names"
_CHECKS = {
    "a whole number": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "a number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "true or false": lambda value: isinstance(value, bool),
    "a text": lambda value: isinstance(value, str),
    "true, false or a name": lambda value: isinstance(value, (bool, str)),
    "a mapping": lambda value: isinstance(value, dict),
    "a list of names": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
    _NAMES: lambda value: isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value)),
    "a list of whole numbers, or a mapping from names to such lists": lambda value: all(
        isinstance(each, list) and each and all(isinstance(index, int) and not isinstance(index, bool) for index in each)
        for each in (value.values() if isinstance(value, dict) else [value])
    ),
    "a whole number or a list of them": lambda value: all(
        isinstance(each, int) and not isinstance(each, bool) for each in (value if isinstance(value, list) else [value])
    ),
}
#: Field → what its value is, unless it is null.
_FIELDS = {
    "peft_type": "a text", "task_type": "a text", "bias": "a text",
    "r": "a whole number", "lora_alpha": "a number", "lora_dropout": "a number",
    "vera_dropout": "a number", "d_initial": "a number", "projection_prng_key": "a whole number",
    "lora_bias": "true or false", "use_rslora": "true or false", "use_dora": "true or false", "fan_in_fan_out": "true or false",
    "init_lora_weights": "true, false or a name",
    "target_modules": _NAMES, "exclude_modules": _NAMES, "layers_pattern": _NAMES,
    "modules_to_save": "a list of names", "target_parameters": "a list of names",
    "layers_to_transform": "a whole number or a list of them",
    "trainable_token_indices": "a list of whole numbers, or a mapping from names to such lists",
    "ensure_weight_tying": "true or false", "rank_pattern": "a mapping", "alpha_pattern": "a mapping", "variant_options": "a mapping",
}  # fmt: skip
_SHOWN = 60  # characters of a wrong value in the message


def check_types(fields: dict[str, Any], where: str) -> None:
    """Check the types of the fields that this package uses.

    Args:
        fields: the JSON.
        where: the file's path, for messages.

    Raises:
        ValueError: a field has a value of another type than PEFT writes.
    """
    for name, what in _FIELDS.items():
        value = fields.get(name)
        if value is not None and not _CHECKS[what](value):
            shown = repr(value)
            shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "…"
            raise ValueError(f"{where}: {name}={shown} is not {what}.")
