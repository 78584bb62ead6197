"""Private names of transformers that the package reads. Each entry says what it is for and what happens without it.

They are attributes of the model, read by name; transformers itself is not imported. A model without one of them is handled like any
other model.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


def block_classes(module: nn.Module) -> list[str]:
    """Return the class names of the repeated blocks. Without it blocks are found by their lists, which works for nearly all models."""
    return list(getattr(module, "_no_split_modules", None) or ())


def tensor_parallel_plan(module: nn.Module) -> dict[str, str]:
    """Return module name → tensor-parallel style. Without it ``tensor_parallel_size`` above 1 is refused."""
    plan: Any = getattr(module, "_tp_plan", None)
    return dict(plan or {})


def model_name(config: Any) -> str:
    """Return where the model was loaded from. Without it a fingerprint names the model's type."""
    return str(getattr(config, "_name_or_path", "") or getattr(config, "model_type", "") or "")


def gives_gradients(module: nn.Module) -> bool:
    """True if ``enable_input_require_grads()`` was called. Without it that method is called twice, which does no harm."""
    return "_require_grads_hook" in module.__dict__


def is_loaded(parameter: nn.Parameter) -> bool:
    """Return True if a checkpoint contained it. Without it fresh heads are found by the class of their model.

    transformers marks the parameters that it loads, so that it does not initialize them again.
    """
    return bool(getattr(parameter, "_is_hf_initialized", False))


def computed_when_missing(model: nn.Module, name: str) -> bool:
    """Return True if transformers does not report this parameter when a checkpoint lacks it.

    It is computed, or not used. Without it such a parameter counts as fresh.
    """
    return any(re.search(pattern, name) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ())


def initializer_of(model: nn.Module) -> dict[nn.Module, Callable[[nn.Module], None]]:
    """Return module → the function of the transformers model around it that gives it a new model's values. Without it norms and rotary
    frequencies of a model that was built on the meta device have no values, and a warning names them.
    """
    found: dict[nn.Module, Callable[[nn.Module], None]] = {}
    for outer in model.modules():
        initialize = getattr(type(outer), "_init_weights", None)
        if callable(initialize) and hasattr(outer, "config"):
            found |= {module: partial(initialize, outer) for module in outer.modules()}
    return found


def checkpoint_options(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield the options of each module's activation checkpointing, as keywords of ``torch.utils.checkpoint``.

    Without it adapters inside re-entrant checkpoints get no gradient, and ``LoRACallback`` raises after the first step.
    """
    for child in model.modules():
        yield getattr(getattr(child, "_gradient_checkpointing_func", None), "keywords", None) or {}


# The arguments in which blocks take a cache of keys and values. Without them a checkpointed block that has one adds its tokens twice, and
# torch raises in the backward pass.
CACHES = ("past_key_values", "past_key_value", "layer_past")


def checkpoints_itself(module: nn.Module) -> bool:
    """Return True if transformers checkpoints this module. Without it a block that is checkpointed twice is computed twice more."""
    return bool(getattr(module, "gradient_checkpointing", False)) and hasattr(module, "_gradient_checkpointing_func")


def keeps_masked_logits(model: nn.Module) -> bool:
    """True if the model's forward accepts a mask as ``logits_to_keep``. Without it all logits are computed.

    The file of such a model has the function ``slice_logits_to_keep``. The signature alone is not enough: earlier models take positions
    under that name.
    """
    file = sys.modules[type(model).__module__]
    return hasattr(file, "slice_logits_to_keep") and "logits_to_keep" in inspect.signature(type(model).forward).parameters


def attention_implementation(model: nn.Module) -> str | None:
    """Return the name of the model's attention. Without it packed rows take the slower way of transformers' masks."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def attention_tables() -> tuple[Any, Any]:
    """Return transformers' tables of attention functions and of mask functions, by name. Both classes are public."""
    transformers = sys.modules["transformers"]
    return transformers.AttentionInterface, transformers.AttentionMaskInterface


@contextmanager
def one_document_a_row() -> Iterator[None]:
    """Tell transformers that the rows of the batches within are not packed: each is one document, without padding.

    It would read that from the positions, on the device, and so wait for all work before them, at every step. Without it, it does.
    """
    masks, name = sys.modules.get("transformers.masking_utils"), "find_packed_sequence_indices"
    if not hasattr(masks, name):
        yield
        return
    find = getattr(masks, name)
    setattr(masks, name, _no_documents)
    try:
        yield
    finally:
        setattr(masks, name, find)


def _no_documents(position_ids: Any) -> None:
    return None


def loaded_from(model: nn.Module) -> str | None:
    """Return the hub id or folder that the model was loaded from. Without it adapter files do not name their base."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "") or None


def checkpoint_conversions(model: nn.Module) -> list[Any]:
    """Return, in order, how transformers turns a checkpoint's names into this model's; empty for other models and before transformers 5.

    Each has ``rename_source_key(name)`` → (name, pattern or None) and ``reverse_transform()``; those that also change tensors have
    ``operations``. Without it adapter files of older models are refused for their names, and PEFT misreads ours of four architectures.
    """
    conversions = getattr(sys.modules.get("transformers.conversion_mapping"), "get_model_conversion_mapping", None)
    own = isinstance(getattr(model, "base_model_prefix", None), str) and hasattr(getattr(model, "config", None), "model_type")
    return list(conversions(model)) if conversions is not None and own else []


def is_converted(model: nn.Module) -> bool:
    """Return True if transformers has conversions for the model's own type, not only for a part's: PEFT applies them only then.

    Without it PEFT misreads our files of a few architectures.
    """
    mapping = getattr(sys.modules.get("transformers.conversion_mapping"), "get_checkpoint_conversion_mapping", None)
    return mapping is not None and mapping(getattr(getattr(model, "config", None), "model_type", None)) is not None


def expert_family(model: nn.Module) -> str:
    """Return whose experts a model's checkpoints have, "qwen2_moe" or "mixtral"; "" if neither's or before transformers 5.

    PEFT decides by this table. Without it PEFT misreads our files of such models.
    """
    families: dict[str, str] = getattr(sys.modules.get("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", {})
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    return families.get(model_type, "mixtral" if model_type == "mixtral" and families else "")


# Saving.


def forget_placement(model: nn.Module) -> None:
    """Make a model forget the devices that it was loaded to. Without it ``save_pretrained`` takes deferred weights for offloaded ones."""
    model.__dict__.pop("hf_device_map", None)
    config = model.__dict__.get("config")
    if getattr(config, "distributed_config", None) is not None:
        del config.distributed_config  # type: ignore[union-attr]


def quantizing_library(model: nn.Module) -> str | None:
    """Return the library whose format a model was loaded in (``bitsandbytes``), None for a plain model.

    Without it an export of a quantized model whose every layer was dequantized by a merge cannot be loaded.
    """
    method = getattr(getattr(model.__dict__.get("hf_quantizer"), "quantization_config", None), "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def forget_quantizer(model: nn.Module) -> None:
    """Make a model forget that it was loaded quantized. Without it an export of dequantized weights cannot be loaded."""
    model.__dict__.pop("hf_quantizer", None)
    getattr(model.__dict__.get("config"), "__dict__", {}).pop("quantization_config", None)
    read = model.__dict__.get("_weight_conversions")
    if read is not None:  # conversions of the files' names to the model's; those that unpacked weights cannot be reversed
        model.__dict__["_weight_conversions"] = [each for each in read if _has_way_back(each)]


def _has_way_back(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


# Ties.


def is_transformers_model(module: nn.Module) -> bool:
    """Return True for a model of transformers, by its classes. Without it a weight that a merge unties is tied again when it is loaded."""
    return any(f"{cls.__module__}.{cls.__qualname__}" == "transformers.modeling_utils.PreTrainedModel" for cls in type(module).__mro__)


def declared_ties(model: nn.Module) -> Iterator[tuple[str, Any, dict[str, str]]]:
    """Yield ``(prefix, model, ties)`` for each Hugging Face model inside: name of a weight → name of the one that it is tied to.

    Names are relative to the inner model; ``prefix`` makes them full. Models that tie nothing are left out. Without it a weight that a
    merge unties is tied again when it is loaded.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        ties = module.get_expanded_tied_weights_keys() if is_transformers_model(module) else {}
        if ties:
            yield f"{name}." if name else "", module, ties


def declare_ties(model: nn.Module, ties: dict[str, str] | None) -> dict[str, str] | None:
    """Set the ties of one instance; None removes them, so that its class's count. Return what was set before.

    Without it a weight that a merge unties is left out by ``save_pretrained``.
    """
    before: dict[str, str] | None = model.__dict__.pop("_tied_weights_keys", None)
    if ties is not None:
        model.__dict__["_tied_weights_keys"] = ties
    return before


def without_ties(config: Any, classes: Iterable[type[nn.Module]]) -> list[Any] | None:
    """Return the configs whose ``tie_word_embeddings`` must be off for a model to load with no ties.

    None if ties cannot be switched off by it: a forward reads the flag for something else too, or the config does not keep it, as T5's.
    """
    forwards = (getattr(inspect.unwrap(cls.forward), "__code__", None) for cls in classes)
    if any(code is not None and "tie_word_embeddings" in code.co_names for code in forwards):
        return None
    text = config.get_text_config()
    off = [each for each in ([config] if text is config else [config, text]) if getattr(each, "tie_word_embeddings", False)]
    tied, untied = (_read_back(config, off, flag) for flag in (True, False))
    return off if untied[0] is False and tied[1] == untied[1] else None


def _read_back(config: Any, flagged: list[Any], flag: bool) -> tuple[bool, str]:
    """Return ``tie_word_embeddings`` of a config that was saved with this flag and loaded, and all its other fields."""
    memo: dict[int, Any] = {}
    changed = copy.deepcopy(config, memo)
    for each in flagged:
        memo[id(each)].tie_word_embeddings = flag
    loaded = type(config).from_dict(changed.to_dict())
    fields = json.dumps(loaded.to_dict(), sort_keys=True, default=str)
    return loaded.tie_word_embeddings, fields.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
