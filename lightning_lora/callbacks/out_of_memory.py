"""Advise which settings take less memory when a run is out of memory."""

from __future__ import annotations

import torch

from lightning_lora.utils.messages import append_line

ADVICE = (
    "Training with LoRA takes less memory with: a smaller batch_size and Trainer(accumulate_grad_batches=...); shorter sequences;"
    " Trainer(precision='bf16-true'); LoRACallback(quantize='nf4'); LoRACallback(checkpointing='full'), with offload='activations' for"
    " long rows; LoRACallback(offload='frozen') for a model larger than the GPU; strategy='lora_fsdp2' on several GPUs. A smaller rank"
    " saves little: only gradients and optimizer states of the adapters shrink."
)
_CPU = "DefaultCPUAllocator"  # torch raises a plain RuntimeError that names it


def advise(exception: BaseException) -> None:
    """Append the advice to an exception that says that memory is out. Leave any other unchanged."""
    if isinstance(exception, (MemoryError, torch.OutOfMemoryError)) or (isinstance(exception, RuntimeError) and _CPU in str(exception)):
        append_line(exception, ADVICE)
