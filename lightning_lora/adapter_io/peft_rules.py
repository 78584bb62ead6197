"""Match modules as PEFT does, which differs from our own matching in three ways.

A module's whole name matches regardless of ``layers_to_transform``. ``modules_to_save`` compares ends of names, without a dot before
them. Task types add the names of heads. Source: PEFT 0.21, ``check_target_module_exists``, ``_set_trainable``, ``get_pattern_key``,
``PeftModelForSequenceClassification`` and its siblings.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from lightning_lora.utils.torch_private import fsdp2_original

# Modules that PEFT's classes for a task train in full, whether or not the JSON names them.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
# End of a transformers class's name → PEFT's task type.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def is_target(fields: dict[str, Any], fqn: str) -> bool:
    """Return whether PEFT adapts a module for ``target_modules``."""
    exclude, targets = fields.get("exclude_modules"), fields.get("target_modules")
    if exclude and (re.fullmatch(exclude, fqn) if isinstance(exclude, str) else _named(exclude, fqn)):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", fqn) for name in fields.get("modules_to_save") or ()):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, fqn) is not None
    if fqn in (targets or ()):
        return True
    indices = fields.get("layers_to_transform")
    if not _named(targets or (), fqn) or indices is None or indices == []:
        return _named(targets or (), fqn)
    return _index(fqn, fields.get("layers_pattern")) in ([indices] if isinstance(indices, int) else indices)


def is_target_parameter(fields: dict[str, Any], name: str) -> bool:
    """Return whether PEFT adapts a parameter for ``target_parameters``."""
    return _named(fields.get("target_parameters") or (), name)


def saved_names(fields: dict[str, Any]) -> list[str]:
    """Return the names that PEFT uses as ``modules_to_save``, with those that it adds for the task type."""
    return [*(fields.get("modules_to_save") or ()), *HEADS.get(fields.get("task_type") or "", ())]


def is_saved(names: Collection[str], fqn: str) -> bool:
    """Return whether PEFT trains a module in full for these names."""
    return any(fqn.endswith(name) for name in names)


def pattern_value(patterns: dict[str, Any] | None, fqn: str, default: Any) -> Any:
    """Return the value of ``rank_pattern`` or ``alpha_pattern`` for a layer. The first key that matches applies."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", fqn))
    return next(found, default)


def task_type(model: nn.Module, saved: Collection[str], modules: Collection[str]) -> str | None:
    """Return PEFT's task type for a transformers model; None if PEFT's class for it would expect something else.

    Args:
        model: the adapter's root.
        saved: FQNs of the modules trained in full.
        modules: FQNs of all modules.
    """
    task = next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None)
    config = getattr(model, "config", None)
    if task is None or not hasattr(config, "model_type") or getattr(model, "main_input_name", None) != "input_ids":
        return None
    if task == "SEQ_2_SEQ_LM" and not getattr(config, "is_encoder_decoder", False):
        return None
    heads = {fqn for fqn in modules if is_saved(HEADS.get(task, ()), fqn)}
    inside = {fqn for fqn in modules if any(fqn == name or fqn.startswith(f"{name}.") for name in saved)}
    return task if heads <= inside and (heads or task not in HEADS) else None


def auto_mapping(model: nn.Module, task: str | None) -> dict[str, str] | None:
    """Return what PEFT's ``AutoPeftModel`` finds the class of a transformers model by, where PEFT has no task type for it; else None."""
    cls = fsdp2_original(type(model))
    if task is not None or not cls.__module__.startswith("transformers."):
        return None
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}


def _named(names: Collection[str], fqn: str) -> bool:
    """Return whether a name, or an end of it after a dot, is among these. It is fast for a set."""
    parts = fqn.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))


def _index(fqn: str, lists: str | list[str] | None) -> int | None:
    """Return the index of a module's block: in the first list of the name, or in a list that ``layers_pattern`` names."""
    lists = [lists] if isinstance(lists, str) else lists
    patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in lists] if lists else [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for pattern in patterns if (match := re.match(pattern, fqn))), None)
    return None if found is None else int(found[1])
