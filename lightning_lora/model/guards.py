"""Guard the methods of Hugging Face's models that would silently lose an adapter: while a model is adapted, they raise.

The guard is an attribute of the instance. So deep copies and pickles have it too, and other instances of the class do not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from lightning_lora.layers.base import PREFIX, LoRALayer, lora_layers
from lightning_lora.model.heads import hf_ends
from lightning_lora.model.plain_copy import GUARDED

_RESIZE, _SAVE = GUARDED
_LIBRARIES = ("transformers.", "diffusers.", "huggingface_hub.")  # their `from_pretrained` passes over what a model does not have


def guard(model: nn.Module) -> Callable[[], None]:
    """Guard every Hugging Face model in a model that contains an adapter. Return a function that removes the guards."""
    for module in model.modules():
        if hasattr(type(module), _RESIZE) and any(isinstance(end, LoRALayer) for end in hf_ends(module)):
            module.__dict__[_RESIZE] = _refuse_resize
        if _saves_for_a_library(module) and _SAVE not in module.__dict__ and next(lora_layers(module), None) is not None:
            save = partial(_save_plain, module)
            save.__wrapped__ = type(module).save_pretrained  # type: ignore[attr-defined]  # pipelines look up which options it takes
            module.__dict__[_SAVE] = save
    return partial(unguard, model)


def unguard(model: nn.Module) -> None:
    """Remove the guards."""
    for module in model.modules():
        if module.__dict__.get(_RESIZE) is _refuse_resize:
            del module.__dict__[_RESIZE]
        if getattr(module.__dict__.get(_SAVE), "func", None) is _save_plain:
            del module.__dict__[_SAVE]


def _saves_for_a_library(module: nn.Module) -> bool:
    return any(_SAVE in vars(cls) and cls.__module__.startswith(_LIBRARIES) for cls in type(module).__mro__)


def _refuse_resize(*args: object, **kwargs: object) -> None:
    """Refuse ``resize_token_embeddings``: it replaces or reshapes the embedding and the head, whose adapter would be lost."""
    raise ValueError(
        "resize_token_embeddings would drop the adapter on the embedding or the head: resize before apply_lora,"
        " or call unload_lora(model) first."
    )


def _save_plain(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """Call ``save_pretrained``. Refuse if adapters are not merged, because ``from_pretrained`` would drop their parameters."""
    state = kwargs.get("state_dict")
    apart = [name for name, layer in lora_layers(model) if not layer.merged]
    if apart and (state is None or any(key.rpartition(".")[2].startswith(PREFIX) for key in state)):
        raise ValueError(
            f"save_pretrained({str(save_directory)!r}): {apart[0]!r} and {len(apart) - 1} more have adapters that are not merged, and"
            " from_pretrained would load the base without them. Call export_merged(model, folder) for a merged copy on disk,"
            " save_adapter(model, folder) for the adapter alone, or merge_lora(model) before save_pretrained."
        )
    return type(model).save_pretrained(model, save_directory, *args, **kwargs)
