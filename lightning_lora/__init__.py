"""LoRA for PyTorch Lightning. The public names; see docs/index.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_lora import inits  # noqa: F401 (it registers what configs name)
from lightning_lora.adapter_io.certificate import MergeCertificate, merge_certificate
from lightning_lora.adapter_io.export import export_merged
from lightning_lora.adapter_io.save_load import load_adapter, save_adapter
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import LoRALayer, LoRALinear, lora_layers
from lightning_lora.model.apply import apply_lora, get_lora_parameters, unload_lora
from lightning_lora.model.disable import disabled_lora
from lightning_lora.model.fuse import unfuse
from lightning_lora.model.merge import merge_lora, merge_report, unmerge_lora
from lightning_lora.model.quantize import quantize_base
from lightning_lora.model.targeting import find_targets
from lightning_lora.ops.cross_entropy import chunked_cross_entropy
from lightning_lora.optim import (
    GaLoreConfig,
    apply_lora_plus,
    apply_preconditioner,
    galore_optimizer,
    galore_param_groups,
    lora_param_groups,
    resize_ranks,
)
from lightning_lora.registry import register_init, register_kind, register_variant
from lightning_lora.variants import shrink_adalora
from lightning_lora.variants.rank_allocation import RankAllocator

if TYPE_CHECKING:
    from lightning_lora.adapter_io.adapter_set import AdapterSet, load_adapters
    from lightning_lora.adapter_io.combine import combine_adapters, compress_adapter
    from lightning_lora.adapter_io.export_adapter import export_adapter
    from lightning_lora.adapter_io.verify import verify_lora
    from lightning_lora.callbacks import AdaLoRACallback, LoRACallback, LoRAMonitor
    from lightning_lora.model.checkpointing import checkpoint_layers
    from lightning_lora.model.compile import compile_layers, cuda_graph_step, uncompile_layers
    from lightning_lora.model.data_start import initialize_from_data
    from lightning_lora.model.extract import extract_adapter
    from lightning_lora.model.offload import offload_activations
    from lightning_lora.model.offload_frozen import offload_frozen
    from lightning_lora.model.parallel import replicated_parameters
    from lightning_lora.model.weights import load_base
    from lightning_lora.optim.advice import advise_learning_rate
    from lightning_lora.strategies import DurableCheckpointIO, LoRAFSDP2Strategy
    from lightning_lora.trials.in_one_fit import Trials
    from lightning_lora.trials.sweep import sweep

__all__ = [
    "AdaLoRACallback",
    "AdapterSet",
    "DurableCheckpointIO",
    "GaLoreConfig",
    "LoRACallback",
    "LoRAConfig",
    "LoRAFSDP2Strategy",
    "LoRALayer",
    "LoRALinear",
    "LoRAMonitor",
    "MergeCertificate",
    "RankAllocator",
    "Trials",
    "advise_learning_rate",
    "apply_lora",
    "apply_lora_plus",
    "apply_preconditioner",
    "checkpoint_layers",
    "chunked_cross_entropy",
    "combine_adapters",
    "compile_layers",
    "compress_adapter",
    "cuda_graph_step",
    "disabled_lora",
    "export_adapter",
    "export_merged",
    "extract_adapter",
    "find_targets",
    "galore_optimizer",
    "galore_param_groups",
    "get_lora_parameters",
    "initialize_from_data",
    "load_adapter",
    "load_adapters",
    "load_base",
    "lora_layers",
    "lora_param_groups",
    "merge_certificate",
    "merge_lora",
    "merge_report",
    "offload_activations",
    "offload_frozen",
    "quantize_base",
    "register_init",
    "register_kind",
    "register_variant",
    "replicated_parameters",
    "resize_ranks",
    "save_adapter",
    "shrink_adalora",
    "sweep",
    "uncompile_layers",
    "unfuse",
    "unload_lora",
    "unmerge_lora",
    "verify_lora",
]
__version__ = "0.1.0"

# Imported when they are asked for: Lightning takes seconds, torch's compiler and FSDP the better part of one.
_LAZY = {
    "AdaLoRACallback": "callbacks",
    "AdapterSet": "adapter_io.adapter_set",
    "DurableCheckpointIO": "strategies",
    "LoRACallback": "callbacks",
    "LoRAFSDP2Strategy": "strategies",
    "LoRAMonitor": "callbacks",
    "Trials": "trials.in_one_fit",
    "advise_learning_rate": "optim.advice",
    "checkpoint_layers": "model.checkpointing",
    "combine_adapters": "adapter_io.combine",
    "compile_layers": "model.compile",
    "compress_adapter": "adapter_io.combine",
    "cuda_graph_step": "model.compile",
    "export_adapter": "adapter_io.export_adapter",
    "extract_adapter": "model.extract",
    "initialize_from_data": "model.data_start",
    "load_adapters": "adapter_io.adapter_set",
    "load_base": "model.weights",
    "offload_activations": "model.offload",
    "offload_frozen": "model.offload_frozen",
    "replicated_parameters": "model.parallel",
    "sweep": "trials.sweep",
    "uncompile_layers": "model.compile",
    "verify_lora": "adapter_io.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
