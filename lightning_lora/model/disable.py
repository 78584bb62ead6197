"""``disabled_lora``: the base alone while a ``with`` block runs, for reference logits (DPO, GRPO). Nothing is moved or copied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_lora.layers.base import PREFIX, lora_layers
from lightning_lora.utils.names import clean_name


@contextmanager
def disabled_lora(model: nn.Module) -> Iterator[None]:
    """Within it, every adapted layer of the model computes what its base does, bit for bit; the adapters get no gradient.

    .. code-block:: python

        with torch.no_grad(), disabled_lora(model):
            reference = model(**batch).logits

    It nests, and an exception ends it as its end does. The switch is on the layers, so all threads that run the model see it: give a
    thread that needs the adapters a model of its own. Run backward passes inside too, for gradient checkpointing computes forward
    passes again. Buffers (BatchNorm's statistics) are as training left them. Compiled blocks are compiled once more.

    Args:
        model: an adapted model, or a part of one; other parts stay as they are.

    Raises:
        ValueError: the model has no LoRA or is merged, or more of it trains than adapters (``modules_to_save``, ``bias``), whose values
            at the start are not kept; nothing is changed then.
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
    mine = [layer for _, layer in layers if not layer.disabled]  # an outer block has switched off the others, and keeps them so
    try:
        for layer in mine:
            layer.__dict__["disabled"] = True
        yield
    finally:
        for layer in mine:
            layer.__dict__.pop("disabled", None)
