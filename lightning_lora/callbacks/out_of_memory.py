"""Say what takes less memory when a run is out of it. The exception stays the same object, so that handlers of it still match."""

from __future__ import annotations

import torch

ADVICE = (
    "Training with LoRA takes less memory with: a smaller batch_size and Trainer(accumulate_grad_batches=...); shorter sequences;"
    " Trainer(precision='bf16-true'); LoRACallback(quantize='nf4'); gradient checkpointing in the model; strategy='lora_fsdp2' on several"
    " GPUs; a smaller rank only helps the optimizer."
)
_CPU = "DefaultCPUAllocator"  # torch raises a plain RuntimeError of it


def advise(exception: BaseException) -> None:
    """Append the advice to the message of an exception that says that memory is out. Leave any other unchanged."""
    text = str(exception)
    out = isinstance(exception, (MemoryError, torch.OutOfMemoryError)) or (isinstance(exception, RuntimeError) and _CPU in text)
    if out and ADVICE not in text:
        exception.args = (f"{text}\n{ADVICE}" if text else ADVICE,)
