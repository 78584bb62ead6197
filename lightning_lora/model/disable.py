"""``disabled_lora``: run the base alone within a ``with`` block, for reference logits (DPO, GRPO). Nothing is moved or copied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from lightning_lora.layers.base import PREFIX, LoRALayer, lora_layers
from lightning_lora.utils.names import clean_name


@contextmanager
def disabled_lora(model: nn.Module) -> Iterator[None]:
    """Make every adapted layer compute its base's output, bit for bit, within the ``with`` block. The adapters get no gradient.

    It can be nested. An exception enables the adapters again too. The switch is on the layers, so all threads that run the model see it:
    give a thread that needs the adapters its own model. Run backward passes inside too, since gradient checkpointing repeats forward
    passes. Buffers (BatchNorm's statistics) keep their values from training. Compiled blocks are compiled once more.

    Args:
        model: an adapted model, or a part of one; other parts do not change.

    Raises:
        ValueError: the model has no LoRA, is merged, or trains other parameters than adapters (``modules_to_save``, ``bias``), whose
            initial values are not kept. Nothing is changed then.

    Examples:
        >>> with torch.no_grad(), disabled_lora(apply_lora(model)):
        ...     reference = model(**batch).logits
    """
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layers to disable; call apply_lora(model, config=...) first.")
    for name, layer in layers:
        if layer.merged:
            raise ValueError(f"{name!r} is merged, and its weight is not the base's; call unmerge_lora(model) first.")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.rpartition(".")[2].startswith(PREFIX):
            raise ValueError(
                f"{clean_name(name)!r} trains beside the adapters, and its values at the start are not kept: the base alone is not here any"
                " more. Give the part of the model without it, such as model.base_model, or keep a copy of the base."
            )
    with switched_off(layer for _, layer in layers):
        yield


@contextmanager
def switched_off(layers: Iterable[LoRALayer]) -> Iterator[None]:
    """Do as :func:`disabled_lora` for these layers, without its checks."""
    mine = [layer for layer in layers if not layer.disabled]  # an outer block disabled the others, and enables them at its end
    try:
        for layer in mine:
            layer.__dict__["disabled"] = True
        yield
    finally:
        for layer in mine:
            layer.__dict__.pop("disabled", None)
