"""LoRA for PyTorch Lightning. The public names; see README.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_lora import inits  # noqa: F401 (it registers what configs name)
from lightning_lora.adapter_io.export import export_merged
from lightning_lora.adapter_io.save_load import load_adapter, save_adapter
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import LoRALinear
from lightning_lora.model.apply import apply_lora, get_lora_parameters, unload_lora
from lightning_lora.model.merge import merge_lora, merge_report, unmerge_lora
from lightning_lora.model.quantize import quantize_base
from lightning_lora.model.targeting import find_targets
from lightning_lora.optim import lora_param_groups
from lightning_lora.variants import shrink_adalora

if TYPE_CHECKING:
    from lightning_lora.callbacks import AdaLoRACallback, LoRACallback
    from lightning_lora.strategies import LoRAFSDP2Strategy

__all__ = [
    "AdaLoRACallback",
    "LoRACallback",
    "LoRAConfig",
    "LoRAFSDP2Strategy",
    "LoRALinear",
    "apply_lora",
    "export_merged",
    "find_targets",
    "get_lora_parameters",
    "load_adapter",
    "lora_param_groups",
    "merge_lora",
    "merge_report",
    "quantize_base",
    "save_adapter",
    "shrink_adalora",
    "unload_lora",
    "unmerge_lora",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # These need Lightning, which takes seconds to import; the plain functions do without it.
    if name in ("AdaLoRACallback", "LoRACallback"):
        from lightning_lora import callbacks

        return getattr(callbacks, name)
    if name == "LoRAFSDP2Strategy":
        from lightning_lora.strategies import LoRAFSDP2Strategy

        return LoRAFSDP2Strategy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
