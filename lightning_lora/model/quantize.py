"""``quantize_base``: quantize a model's linears to 4 or 8 bits in place, before LoRA is applied (QLoRA, arXiv:2305.14314).

A 4-bit base is an eighth of the size of an fp32 one. FP8 halves a bf16 base, and GPUs with FP8 tensor cores multiply it faster. Gradients
pass through the dequantized weight, or through FP8 products; only the adapters train. The layers stay the same modules under the same
names. A model that was loaded quantized does not need this: apply LoRA to it directly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn

from lightning_lora.config import ALL_LINEAR, LoRAConfig
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.spec import LayerSpec, init_options_of
from lightning_lora.model.targeting import find_targets
from lightning_lora.quantization.formats import Quantizer, dequantized, format_of, prepare, quantizer_of, remember, remember_lost
from lightning_lora.registry import belongs_to_packed_base
from lightning_lora.utils.checksums import sampled_digest
from lightning_lora.utils.sharding import is_sharded
from lightning_lora.utils.torch_private_parallel import let_fsdp2_shard_integers


def quantize_base(
    model: nn.Module,
    how: str,
    *,
    targets: Sequence[str] | str = ALL_LINEAR,
    modules_to_save: Sequence[str] | str = "auto",
    device: torch.device | str | None = None,
    lora: LoRAConfig | None = None,
) -> nn.Module:
    """Quantize the weights of a model's linears. Everything else (embeddings, norms, biases, heads) stays as it is.

    All linears are quantized or, after any failure, none. So the plain weights are kept until the last linear is done: the peak is the
    model's memory plus that of the quantized weights, a quarter of a bf16 model for 4 bits and a half for 8. Quantize block by block if
    there is no room for that.

    Args:
        model: a model without adapters, its weights loaded.
        how: ``"fp8"`` (e4m3, a scale per output channel; in bf16 on GPUs of compute capability 8.9 or higher the products are FP8 too),
            ``"nf4"`` (4-bit NormalFloat, double quantization) or ``"int8"`` (LLM.int8()) of bitsandbytes, ``"torchao-nf4"`` or
            ``"torchao-int8"`` (weights only).
        targets: which linears, named as ``target_modules`` of :class:`~lightning_lora.LoRAConfig`; by default all but output heads.
        modules_to_save: modules that will train in full and so are left out, as in the config.
        device: where to quantize, layer by layer (default: each weight's device). The quantized weight goes back to the weight's device.
        lora: the config that is applied next, if its ``init`` is ``"loftq"``: what quantizing loses of the layers that it names is kept in
            factors of its ranks.

    Returns:
        The same ``model``.

    Raises:
        ValueError: the format is not known, or a linear cannot be quantized: it is adapted, on the meta device, sharded, tied to another
            module, not a plain ``nn.Linear``, or of a size that does not fit the format.
        ImportError: the library is not installed; the message names the extra.

    Examples:
        >>> model = quantize_base(model, "fp8")  # "nf4" and "int8" need the extra bitsandbytes
        >>> model = apply_lora(model, LoRAConfig(target_modules="all-linear"))
    """
    quantize_reversibly(model, how, targets=targets, modules_to_save=modules_to_save, device=device, lora=lora)
    return model


def quantize_reversibly(
    model: nn.Module,
    how: str,
    *,
    targets: Sequence[str] | str = ALL_LINEAR,
    modules_to_save: Sequence[str] | str = "auto",
    device: torch.device | str | None = None,
    lora: LoRAConfig | None = None,
) -> Callable[[], None]:
    """Quantize as :func:`quantize_base`. Return a function that restores the linears, and keeps their plain weights until it is dropped."""
    quantizer = quantizer_of(how)
    quantizer.check_installed()
    report = find_targets(model, LoRAConfig(rank=1, target_modules=targets, modules_to_save=modules_to_save))
    layers = {target.fqn: target.module for target in report.targets if format_of(target.module) is None}
    specs = _made_up_for(model, lora)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for fqn, layer in layers.items():
        reason = _refusal(layer, fqn, owners, quantizer.unit)
        if reason:
            raise ValueError(f"quantize={how!r}: {fqn!r} ({type(layer).__name__}) {reason}.")
    with ExitStack() as undo:  # out of memory, an interrupt: any failure restores what was quantized before it
        for layer in layers.values():
            assert isinstance(layer, nn.Linear)
            undo.callback(_Plain(layer).put_back)
            remember(layer, sampled_digest(layer.weight))
            there = torch.device(device) if device is not None else layer.weight.device
            if layer in specs:
                quantize_with_factors(layer, quantizer, specs[layer], there)
            else:
                quantizer.pack(layer, there)
        let_fsdp2_shard_integers()
        return undo.pop_all().close


@torch.no_grad()
def quantize_with_factors(layer: nn.Linear, quantizer: Quantizer, spec: LayerSpec, device: torch.device) -> None:
    """Quantize a linear, and keep A and B of its spec's rank with Q + s·B·A ≈ W (LoftQ, arXiv:2310.08659, algorithm 1).

    Each iteration quantizes ``W − s·B·A``, which begins as W, and takes A and B from the largest singular values of W − Q.

    Args:
        layer: a plain linear.
        quantizer: of the format.
        spec: the rank, the scaling s, and the number of iterations.
        device: where to compute.
    """
    W = layer.weight.detach()
    wide = torch.promote_types(W.dtype, torch.float32)
    rest = W
    for _ in range(spec.init_options["iterations"]):
        last, trial = rest, nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        trial._parameters["weight"] = nn.Parameter(last.to(device, copy=True), requires_grad=False)
        quantizer.pack(trial, device)
        prepare(trial, W.dtype)
        lost = W.to(device, wide) - dequantized(trial).to(device, wide)
        U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
        root = (S[: spec.rank] / spec.scaling).sqrt()
        A, B = root[:, None] * Vh[: spec.rank], U[:, : spec.rank] * root
        rest = (W.to(device, wide) - spec.scaling * (B @ A)).to(W.dtype)
    if last is not W:
        layer._parameters["weight"] = nn.Parameter(last.to(W.device), requires_grad=False)
    quantizer.pack(layer, device)
    remember_lost(layer, A.to(W.device), B.to(W.device))


def before_quantizing(config: LoRAConfig) -> LoRAConfig:
    """Return a config that finds the same layers in the model before it is quantized."""
    return replace(config, init=LoRAConfig().init, init_options={}) if belongs_to_packed_base(config.init) else config


def _made_up_for(model: nn.Module, lora: LoRAConfig | None) -> dict[nn.Module, LayerSpec]:
    """Return layer → spec of the layers whose adapters make up for quantizing."""
    if lora is None or not belongs_to_packed_base(lora.init):
        return {}
    init_options_of(lora)  # raises for a wrong option
    targets = find_targets(model, before_quantizing(lora)).targets
    for target in targets:
        smallest = min(target.module.weight.shape) if type(target.module) is nn.Linear else target.rank
        if target.rank > smallest:
            raise ValueError(
                f"{target.fqn!r}: init={lora.init!r} with rank={target.rank} is above min(in, out)={smallest}; choose a lower rank."
            )
    return {target.module: replace(target.spec, config=lora) for target in targets}


class _Plain:
    """A linear as it was before it was quantized."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.cls, self.weight = layer, type(layer), layer.weight
        self.attributes = dict(layer.__dict__)
        self.tables = {name: copy.copy(table) for name, table in layer.__dict__.items() if isinstance(table, dict)}

    def put_back(self) -> None:
        """Restore class, weight, attributes and hooks. If the layer was moved since, its weight follows."""
        layer, device = self.layer, self.layer.weight.device
        layer.__class__ = self.cls
        layer.__dict__.clear()
        layer.__dict__.update(self.attributes)
        for name, table in self.tables.items():
            layer.__dict__[name].clear()
            layer.__dict__[name].update(table)
        if self.weight.device != device:
            self.weight.data = self.weight.data.to(device)


def _refusal(layer: nn.Module, fqn: str, owners: dict[int, list[str]], unit: int) -> str | None:
    """Return why a linear cannot be quantized; None if it can."""
    if isinstance(layer, LoRALayer):
        return "has an adapter already: quantize the base first, then apply LoRA"
    if type(layer) is not nn.Linear:
        return "is no plain nn.Linear, whose forward is all that the packed layer does: leave it out of the targets"
    weight = layer.weight
    if weight.is_meta:
        return "is on the meta device: load its weight first"
    if is_sharded(weight):
        return "is sharded already: quantize before the model is parallelized"
    if not weight.is_floating_point():
        return f"has a weight of dtype {weight.dtype}: it is quantized, by a library that is not known here"
    if weight.numel() % unit:
        return f"has {weight.numel()} entries, and this format packs multiples of {unit}: leave it out of the targets, or use 'nf4'"
    others = [name for name in owners[id(weight)] if name != f"{fqn}.weight"]
    return f"shares its weight with {others[0]}, which would keep the unpacked one: leave it out of the targets" if others else None
