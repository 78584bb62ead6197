"""``quantize_base``: quantize a model's linears and experts to 4 or 8 bits in place, before LoRA is applied (QLoRA, arXiv:2305.14314).

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
from lightning_lora.layers.several_weights import SeveralWeights
from lightning_lora.layers.spec import LayerSpec, init_options_of
from lightning_lora.model.target_report import Target
from lightning_lora.model.targeting import find_targets
from lightning_lora.quantization.content import remember_lost
from lightning_lora.quantization.formats import dequantized, format_of, prepare, remember
from lightning_lora.quantization.loading import remember_format
from lightning_lora.quantization.quantizers import Quantizer, quantizer_of
from lightning_lora.quantization.stacks import STACK_FORMATS, pack_stacks
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
    """Quantize the weights of a model's linears and experts. Everything else (embeddings, norms, biases, routers, heads) stays as it is.

    All are quantized or, after any failure, none. So the plain weights are kept until the last one is done: the peak is the model's memory
    plus that of the quantized weights, a quarter of a bf16 model for 4 bits and a half for 8. If there is no room for that, build the
    model on the meta device, quantize its linears there to ``"fp8"`` or ``"nf4"``, and give it its weights one by one with
    :func:`~lightning_lora.load_base`.

    Experts that transformers stores in one tensor per projection are packed by "fp8" and "nf4". A product dequantizes them: an expert at a
    time where the experts run in a loop, else at most 1 GiB of one projection's experts, which is freed before the next product.

    Args:
        model: a model without adapters, its weights loaded.
        how: ``"fp8"`` (e4m3, a scale per output channel; in bf16 on GPUs of compute capability 8.9 or higher linears' products are FP8
            too), ``"nf4"`` (4-bit NormalFloat, double quantization) or ``"int8"`` (LLM.int8()) of bitsandbytes, ``"torchao-nf4"`` or
            ``"torchao-int8"`` (weights only).
        targets: which linears and experts, named as ``target_modules`` of :class:`~lightning_lora.LoRAConfig`; by default all but output
            heads and routers.
        modules_to_save: modules that will train in full and so are left out, as in the config.
        device: where to quantize, layer by layer (default: each weight's device). The quantized weight goes back to the weight's device.
        lora: the config that is applied next, if its ``init`` is ``"loftq"``: what quantizing loses of the layers that it names is kept in
            factors of its ranks.

    Returns:
        The same ``model``.

    Raises:
        ValueError: the format is not known, or a target cannot be quantized: it is adapted, sharded, tied to another module, neither a
            plain ``nn.Linear`` nor experts that the format packs, of a size or dtype that does not fit the format, or on the meta device
            (experts, and formats but ``"fp8"`` and ``"nf4"``).
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
    """Quantize as :func:`quantize_base`. Return a function that restores the layers, and keeps their plain weights until it is dropped."""
    quantizer = quantizer_of(how)
    quantizer.check_installed()
    report = find_targets(model, LoRAConfig(rank=1, target_modules=targets, modules_to_save=modules_to_save))
    layers = {target.fqn: target for target in report.targets if format_of(target.module) is None}
    specs = _made_up_for(model, lora)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for fqn, target in layers.items():
        reason = _refusal(target, how, quantizer, owners, target.module in specs)
        if reason:
            raise ValueError(f"quantize={how!r}: {fqn!r} ({type(target.module).__name__}) {reason}.")
    with ExitStack() as undo:  # out of memory, an interrupt: any failure restores what was quantized before it
        for target in layers.values():
            layer = target.module
            undo.callback(_Plain(layer).put_back)
            there = None if device is None else torch.device(device)
            if stacks := _stacks(target):
                pack_stacks(layer, stacks, STACK_FORMATS[how], there)
                continue
            assert isinstance(layer, nn.Linear)
            if layer.weight.is_meta:
                remember_format(layer, how)
                there = layer.weight.device
            else:
                remember(layer, sampled_digest(layer.weight))
            if layer in specs:
                quantize_with_factors(layer, quantizer, specs[layer], there or layer.weight.device)
            else:
                quantizer.pack(layer, there or layer.weight.device)
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
    """A layer as it was before it was quantized."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.cls, self.parameters = layer, type(layer), list(layer.parameters(recurse=False))
        self.attributes = dict(layer.__dict__)
        self.tables = {name: copy.copy(table) for name, table in layer.__dict__.items() if isinstance(table, dict)}

    def put_back(self) -> None:
        """Restore class, weights, attributes and hooks. If the layer was moved since, its weights follow."""
        layer, device = self.layer, next(self.layer.parameters(recurse=False)).device
        layer.__class__ = self.cls
        layer.__dict__.clear()
        layer.__dict__.update(self.attributes)
        for name, table in self.tables.items():
            layer.__dict__[name].clear()
            layer.__dict__[name].update(table)
        for parameter in self.parameters:
            if parameter.device != device:
                parameter.data = parameter.data.to(device)


def _stacks(target: Target) -> dict[str, bool]:
    """Return the names of a target's weights that are stacks of matrices → True if a matrix is (in, out)."""
    return target.kind.stacks(type(target.module)) if issubclass(target.kind, SeveralWeights) else {}


def _refusal(target: Target, how: str, quantizer: Quantizer, owners: dict[int, list[str]], makes_up: bool) -> str | None:
    """Return why a target cannot be quantized; None if it can."""
    layer, stacks = target.module, _stacks(target)
    if isinstance(layer, LoRALayer):
        return "has an adapter already: quantize the base first, then apply LoRA"
    if stacks and how not in STACK_FORMATS:
        known = " or ".join(map(repr, sorted(STACK_FORMATS)))
        return (
            f"holds its weights in one tensor for all experts, which this format does not pack: use {known}, or leave it out of the targets"
        )
    if not stacks and type(layer) is not nn.Linear:
        return "is no plain nn.Linear, whose forward is all that the packed layer does: leave it out of the targets"
    for name in stacks or ("weight",):
        weight = layer._parameters[name]
        assert weight is not None
        unit, entries = (STACK_FORMATS[how].unit, weight[0].numel()) if stacks else (quantizer.unit, weight.numel())
        if weight.is_meta and (stacks or not quantizer.on_meta):
            return (
                "is on the meta device, where only 'fp8' and 'nf4' quantize, and linears only: load its weights first, or leave it out of"
                " the targets"
            )
        if weight.is_meta and makes_up:
            return "is on the meta device, where nothing is lost that init='loftq' could make up for: load its weight first"
        if is_sharded(weight):
            return "is sharded already: quantize before the model is parallelized"
        if not weight.is_floating_point():
            return f"has a weight of dtype {weight.dtype}: it is quantized, by a library that is not known here"
        if weight.dtype == torch.float64 and not stacks and not quantizer.float64:
            return "has a weight of float64, which this format does not pack: call model.float() first"
        if entries % unit:
            other = "'fp8'" if stacks else "'nf4'"
            what = f"{name} with matrices of " if stacks else ""
            return f"has {what}{entries} entries, and this format packs multiples of {unit}: leave it out of the targets, or use {other}"
        others = [other for other in owners[id(weight)] if other != f"{target.fqn}.{name}"]
        if others:
            return f"shares its weight with {others[0]}, which would keep the unpacked one: leave it out of the targets"
    return None
