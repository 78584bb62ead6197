"""The difference of a fully tuned model and its base as an adapter: ``extract_adapter``."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import LoRALayer, lora_layers
from lightning_lora.layers.filling import fill_factors
from lightning_lora.model.apply import inject
from lightning_lora.model.target_report import TargetReport
from lightning_lora.model.targeting import find_targets
from lightning_lora.ops.low_rank_svd import balanced, check_energy, rank_for_energy
from lightning_lora.quantization.formats import format_of
from lightning_lora.utils.names import clean_name, modules_by_name, parameters_by_name
from lightning_lora.utils.patterns import exactly


@torch.no_grad()
def extract_adapter(model: nn.Module, tuned: nn.Module, config: LoRAConfig, *, energy: float | None = None) -> nn.Module:
    """Adapt a base so that it comes as close as its ranks allow to a tuned copy of it: each update is the truncated singular value
    decomposition of ``W_tuned − W``, in float64. Then :func:`~lightning_lora.save_adapter` writes it.

    Args:
        model: the base, without LoRA. Changed in place.
        tuned: the same architecture with other weights, such as a full fine-tune. Not changed.
        config: which modules to adapt, at which ranks; plain LoRA. ``modules_to_save`` takes the tuned values.
        energy: in place of the config's ranks, the share of ``‖W_tuned − W‖²`` that each layer keeps, in (0, 1].

    Returns:
        The same ``model``.

    Raises:
        ValueError: the model has LoRA, the two models differ in shape, a target is quantized or a grouped convolution, or an option is out
            of range. The model is unchanged then.

    Warns:
        UserWarning: other weights differ too, which the adapter cannot carry.

    Examples:
        >>> tuned = copy.deepcopy(model)
        >>> update = torch.outer(torch.ones(32), torch.arange(32.0)) / 100  # of rank one
        >>> tuned.model.layers[0].self_attn.q_proj.weight.data += update
        >>> model = extract_adapter(model, tuned, LoRAConfig(rank=1, target_modules=["layers.0.self_attn.q_proj"]))
        >>> torch.allclose(model(**batch).logits, tuned(**batch).logits, atol=1e-5)
        True
    """
    if energy is not None:
        check_energy(energy)
    if config.variant != "plain":
        raise ValueError(f"variant={config.variant!r}: a difference is extracted as plain LoRA; use variant='plain'.")
    if config.init != LoRAConfig.init:  # one that keeps a start would subtract it from the update
        raise ValueError(f"init={config.init!r}: A and B come from the difference here; leave init out.")
    for each, what in ((model, "model"), (tuned, "tuned")):
        if adapted := next((name for name, _ in lora_layers(each)), None):
            raise ValueError(f"{what}: {adapted!r} has LoRA; merge and unload it, or drop it with unload_lora.")
    report = find_targets(model, config)
    for target in report.targets:
        if target.spec.slices is not None:
            names = ", ".join(target.names)
            raise ValueError(f"{names}: a difference is extracted from a layer's whole weight; name the fused layer, or exclude it.")
        if target.kind.adapted != ("weight",):
            weights = ", ".join(target.kind.adapted)
            raise ValueError(f"{target.fqn!r} has no single matrix but {weights}, which is not supported here: exclude it.")
    twins: dict[str, Any] = modules_by_name(tuned)
    for target in report.targets:
        _check_pair(target.module, twins.get(target.fqn), target.fqn)
    if energy is not None:
        changes = ((target.fqn, _difference(target.module, twins[target.fqn])) for target in report.targets)  # one at a time
        ranks = {exactly(fqn): rank_for_energy(torch.linalg.svdvals(change.flatten(1)), energy) for fqn, change in changes}
        config = replace(config, rank_pattern=ranks)
        report = find_targets(model, config)
    _warn_of_others(model, tuned, report)
    inject(model, config, report)
    for name, layer in lora_layers(model):
        _fill(layer, _difference(layer, twins[clean_name(name)]))
    theirs = parameters_by_name(tuned)
    for name, parameter in parameters_by_name(model).items():
        if any(name == saved or name.startswith(f"{saved}.") for saved in report.saved):
            parameter.copy_(theirs[name])
    return model


def _check_pair(module: Any, twin: Any, fqn: str) -> None:
    """Raise ValueError for a layer whose weight has no difference to the tuned one's."""
    for each, what in ((module, "model"), (twin, "tuned")):
        if each is not None and format_of(each) is not None:
            raise ValueError(f"{what}: {fqn!r} is quantized, so its difference is that of the rounding too; give unquantized models.")
        if each is not None and not each.weight.isfinite().all():
            raise ValueError(f"{what}: the weight of {fqn!r} has NaN or infinity, of which there is no difference: exclude it.")
    shape = None if twin is None else tuple(twin.weight.shape)
    if shape != tuple(module.weight.shape):
        raise ValueError(f"{fqn!r} has a weight of {tuple(module.weight.shape)} in model and of {shape} in tuned: not one architecture.")
    if getattr(module, "groups", 1) > 1:
        raise ValueError(f"{fqn!r} is a grouped convolution, which has a pair for each group; not supported here: exclude it.")


def _difference(module: Any, twin: Any) -> Tensor:
    """Return ``W_tuned − W`` of a layer, in float64."""
    difference: Tensor = twin.weight.to(module.weight.device, torch.float64) - module.weight
    return difference


def _fill(layer: LoRALayer, difference: Tensor) -> None:
    matrix = layer.to_matrix(difference)
    U, S, Vh = torch.linalg.svd(matrix.flatten(0, -2), full_matrices=False)
    rank = min(layer.rank, len(S))
    B, A = balanced(U, S / layer.scaling, Vh, rank)
    spare = layer.rank - rank
    fill_factors(layer, torch.cat([A, A.new_zeros(spare, A.shape[1])]), torch.cat([B, B.new_zeros(B.shape[0], spare)], 1))


def _warn_of_others(model: nn.Module, tuned: nn.Module, report: TargetReport) -> None:
    """Warn of parameters that differ and that no adapter carries."""
    carried = {f"{target.fqn}.weight" for target in report.targets}
    theirs, left = parameters_by_name(tuned), []
    for name, parameter in parameters_by_name(model).items():
        if name in carried or any(name == saved or name.startswith(f"{saved}.") for saved in report.saved):
            continue
        twin = theirs.get(name)
        if twin is None or twin.shape != parameter.shape or not torch.equal(twin.to(parameter.device), parameter):
            left.append(name)
    if left:
        warnings.warn(
            f"{left[0]!r} and {len(left) - 1} more parameters differ between the two models and are not in the adapter; name their modules"
            " in target_modules or modules_to_save to carry them.",
            stacklevel=3,
        )
