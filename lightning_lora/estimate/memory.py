"""The peak memory of a training step, and its parts.

What blocks save is counted (:mod:`lightning_lora.estimate.saved`); parameters, optimizer and logits follow from sizes. Of these rules
each is by what was measured on an H200 (benchmarks/README.md, "Estimated memory").
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import ALL_LINEAR, LoRAConfig
from lightning_lora.estimate.saved import Saved, count_saved
from lightning_lora.estimate.setting import DTYPES, QUANTIZED, Setting
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.several_weights import SeveralWeights
from lightning_lora.model.apply import apply_lora
from lightning_lora.model.targeting import find_targets
from lightning_lora.ops.frozen_stack import MOST
from lightning_lora.quantization.stacks import STACK_FORMATS
from lightning_lora.utils.blocks import repeated_blocks

GIB = 2**30
CHUNK = 2048  # rows of logits that the chunked loss has at a time
MOMENTS = 2  # of AdamW, in each trained parameter's dtype
STAYING = 2  # blocks whose activations are on the device with offload="activations" when the backward pass begins
RESIDENT = 2  # blocks whose weights are on the device with offload="frozen", or gathered under lora_fsdp2
RECORDED = 0.06  # of the activations: gaps in the memory of CUDA graphs


@dataclass(frozen=True)
class Estimate:
    """The memory of a step's peak on one device, in bytes. The parts add up to :attr:`peak`.

    Attributes:
        base: frozen weights and buffers.
        adapters: what trains, in its own dtype, and under ddp its gradients' buckets.
        optimizer: AdamW's moments.
        gradients: of what trains, as far as they are there at the peak: they come while activations go.
        activations: what is kept for the backward pass.
        logits: the loss and its gradient while they are computed.
        working: what the backward pass needs more than that, as activations are all there.

    Examples:
        >>> with torch.device("meta"):
        ...     empty = type(model)(model.config)
        >>> found: Estimate = estimate_memory(empty, LoRAConfig(rank=4), Setting(batch=2, length=16))
        >>> found.peak == sum(found.parts().values())
        True
    """

    base: int
    adapters: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    working: int

    @property
    def peak(self) -> int:
        """The sum of the parts."""
        return sum(getattr(self, field.name) for field in fields(self))

    def parts(self) -> dict[str, int]:
        """Return name → bytes, in the order in which they are printed."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        rows = {**self.parts(), "peak": self.peak}
        return "\n".join(f"{name:<12}{size / GIB:8.2f} GiB" for name, size in rows.items())


def estimate_memory(model: Any, config: LoRAConfig | None, setting: Setting) -> Estimate:
    """Estimate the peak memory of a training step.

    It is what the allocator hands out, as ``torch.cuda.max_memory_allocated`` says; for recorded blocks what it reserves. Libraries and the
    CUDA context take 0.5 to 1 GiB more.

    Args:
        model: a model of text from transformers on the meta device, without adapters. It does not change.
        config: of the adapters; None trains every weight.
        setting: of the run.

    Raises:
        ValueError: the model is not on the meta device, is not one of text, or cannot run there; or the config does not fit it.

    Examples:
        >>> with torch.device("meta"):
        ...     empty = type(model)(model.config)
        >>> small = estimate_memory(empty, LoRAConfig(rank=4), Setting(batch=2, length=16))
        >>> large = estimate_memory(empty, LoRAConfig(rank=4), Setting(batch=4, length=16))
        >>> small.activations < large.activations, small.optimizer == large.optimizer
        (True, True)
    """
    loaded = next((name for name, parameter in model.named_parameters() if not parameter.is_meta), None)
    if loaded is not None:
        raise ValueError(f"{loaded!r} of {type(model).__name__} is not on the meta device: build the model under torch.device('meta')")
    model = copy.deepcopy(model).train()
    mixed = setting.precision.endswith("mixed")
    whole = {name: p.nbytes for name, p in model.named_parameters() if mixed}
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    casts = {name: p.numel() * 2 for name, p in model.named_parameters() if mixed and p.dim() > 1 and p.dtype == torch.float32}
    model.to(DTYPES[setting.precision])
    packed = _packed(model, setting.quantize) if setting.quantize else {}
    if config is not None:
        apply_lora(model, config)
    sizes = {name: packed.get(name) or whole.get(name) or p.nbytes for name, p in model.named_parameters()}
    frozen = {name: sizes[name] for name, p in model.named_parameters() if not p.requires_grad}
    buffers = buffers if mixed else sum(buffer.nbytes for buffer in model.buffers())
    trained = sum(sizes.values()) - sum(frozen.values())
    shards = setting.devices if setting.strategy == "lora_fsdp2" else 1
    saved = _with_casts(model, count_saved(model, lambda: _hidden(model, setting), setting.compiled), casts, packed)
    widest = max((_dense(parameter, setting.quantize) for name, parameter in model.named_parameters() if name in packed), default=0)
    working = saved.backward + widest
    held, again = _activations(saved, setting)

    def moment(activations: int, logits: int = 0, working: int = 0, gradients: int = 0) -> Estimate:
        return Estimate(
            base=_base(model, frozen, setting) + buffers,
            adapters=trained // shards + (trained if setting.strategy == "ddp" else 0),
            optimizer=MOMENTS * trained // shards,
            gradients=gradients,
            activations=int(activations * (1 + RECORDED * setting.recorded)),
            logits=logits,
            working=working,
        )

    moments = (
        moment(held, logits=_logits(model, saved.output, setting)),
        moment(held + again, working=working),  # the last block's backward pass
        moment(max(saved.blocks, default=0) + saved.outside, working=working, gradients=trained // shards),  # the first block's
    )
    return max(moments, key=lambda each: each.peak)


def _hidden(model: Any, setting: Setting) -> Tensor:
    """Return the last hidden states of rows of full length."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(f"{type(model).__name__} reads {model.main_input_name!r}; estimate knows models of text")
    ids = torch.zeros(setting.batch, setting.length, dtype=torch.long, device="meta")
    body = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    more = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {"use_cache": False}
    try:
        return body(input_ids=ids, **more).last_hidden_state
    except TypeError as error:
        raise ValueError(f"{type(model).__name__} does not take input_ids as models of text do: {error}") from error


def _with_casts(model: nn.Module, saved: Saved, casts: dict[str, int], packed: dict[str, int]) -> Saved:
    """Add the copies of fp32 matrices that mixed precision multiplies by, which their products save.

    An adapted linear and its update are one operation, which saves the weight as it is and casts it again in the backward pass.
    """
    blocks, head = [f"{fqn}." for fqn, _ in repeated_blocks(model)], _head(model)
    fused = {f"{fqn}.weight" for fqn, m in model.named_modules() if isinstance(m, LoRALinear) and m.weight_reader and m.is_plain_sum()}
    free = fused | packed.keys()
    each = [sum(size for name, size in casts.items() if name.startswith(fqn) and name not in free) for fqn in blocks]
    outside = next((casts.get(name, 0) for name, p in model.named_parameters() if head is not None and p is head.weight), 0)
    return replace(saved, blocks=tuple(a + b for a, b in zip(saved.blocks, each, strict=True)), outside=saved.outside + outside)


def _activations(saved: Saved, setting: Setting) -> tuple[int, int]:
    """Return what is kept between the passes, and what a checkpointed block makes again."""
    if setting.checkpointing is None:
        return sum(saved.blocks) + saved.outside, 0
    attention = saved.attention if setting.checkpointing == "selective" else (0,) * len(saved.blocks)
    each = [a + b for a, b in zip(saved.inputs, attention, strict=True)]
    again = max((block - held for block, held in zip(saved.blocks, each, strict=True)), default=0)
    return sum(each[-STAYING:] if "activations" in setting.offload else each) + saved.outside, again


def _head(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _logits(model: Any, hidden: int, setting: Setting) -> int:
    """Return the memory of the loss: logits in fp32, their log-softmax and gradient; or of one chunk. And the hidden states' gradients."""
    head = _head(model)
    if head is None:
        return hidden
    rows, vocabulary = setting.batch * setting.length, head.weight.shape[0]
    if not setting.chunked_loss or head.weight.requires_grad:
        return rows * vocabulary * 12 + hidden
    width = DTYPES[setting.precision].itemsize
    # Compiled: logits and their gradient. Else the log-softmax in fp32 too; of bf16 torch makes a copy in fp32 first, in its place.
    each = 2 * width if setting.compiled else width + 4 + {torch.bfloat16: 4, torch.float16: 2}.get(DTYPES[setting.precision], 0)
    return min(rows, CHUNK) * vocabulary * each + 2 * hidden


def _packed(model: nn.Module, how: str) -> dict[str, int]:
    """Return the bytes of each weight that is quantized."""
    per_entry, per_channel = QUANTIZED[how]
    packed: dict[str, int] = {}
    for target in find_targets(model, LoRAConfig(rank=1, target_modules=ALL_LINEAR)).targets:
        stacks = target.kind.stacks(type(target.module)) if issubclass(target.kind, SeveralWeights) and how in STACK_FORMATS else {}
        plain = {"weight": False} if type(target.module) is nn.Linear else {}
        for name, transposed in (stacks or plain).items():
            *experts, rows, columns = target.module._parameters[name].shape  # type: ignore[union-attr]
            channels = math.prod(experts) * (columns if transposed else rows)
            packed[f"{target.fqn}.{name}"] = int(math.prod((*experts, rows, columns)) * per_entry + channels * per_channel)
    return packed


def _dense(parameter: nn.Parameter, how: str | None) -> int:
    """Return the bytes of a quantized weight that are dense while it multiplies. 8-bit linears multiply as they are."""
    return min(parameter.nbytes, MOST) if parameter.dim() > 2 else parameter.nbytes if "nf4" in (how or "") else 0


def _base(model: nn.Module, frozen: dict[str, int], setting: Setting) -> int:
    """Return the frozen weights on one device."""
    blocks = [sum(size for name, size in frozen.items() if name.startswith(f"{fqn}.")) for fqn, _ in repeated_blocks(model)]
    total, here = sum(frozen.values()), sum(sorted(blocks)[-RESIDENT:])
    outside = total - sum(blocks)
    if "frozen" in setting.offload:
        return outside + here
    if setting.strategy == "lora_fsdp2":  # beside the shards, what is in no block is whole from the first pass on, and some blocks are
        return total // setting.devices + outside + here
    return total
