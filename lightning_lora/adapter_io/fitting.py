"""Whether an adapter that was read fits a model: all that ``load_adapter`` checks before it changes anything.

No tensor may be missing or left over, every shape must fit, the base must be the one that the adapter was trained on, and no value may be
NaN.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapter_io import fingerprint
from lightning_lora.adapter_io.extras import check_values_kept, equal_values, extra_tensors, is_adapter, why_not_brought
from lightning_lora.adapter_io.files import AdapterFile, read_adapter
from lightning_lora.adapter_io.names_below import resolve_file
from lightning_lora.adapter_io.placing import place
from lightning_lora.adapter_io.size_limit import check_size
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.spec import LayerSpec, kind_options_of, options_of
from lightning_lora.model.heads import saved_modules
from lightning_lora.model.targeting import TargetReport
from lightning_lora.registry import KIND_NAMES
from lightning_lora.utils.messages import counted
from lightning_lora.utils.names import clean_name, persistent_buffers, second_names
from lightning_lora.utils.values import kind_of_numbers


def checked_adapter(
    root: nn.Module, path: str | Path, *, check_base: bool, allow_nonfinite: bool
) -> tuple[AdapterFile, TargetReport, dict[str, Tensor], set[str]]:
    """Read an adapter for a model and check it as :func:`load_adapter` does, all but its checksum. Change nothing.

    Returns:
        The content; the layers that it adapts here; its tensors by their names here; the names of those that replace base weights.
    """
    check_size(Path(path), root)
    adapter = place(read_adapter(path), root, str(path))
    masks = adapter.beside & persistent_buffers(root).keys()  # these may hold infinity
    values = {name: tensor for name, tensor in adapter.tensors.items() if name not in masks and tensor.is_floating_point()}
    bad = [name for name, tensor in values.items() if not _finite(tensor)]
    if bad and not allow_nonfinite:
        raise ValueError(
            f"{path}: {bad[0]} holds NaN or infinity ({counted(len(bad), 'tensor', 'do')}); pass allow_nonfinite=True to load it anyway."
        )
    adapter, report = _resolved(root, adapter, str(path))
    if adapter.base is None:  # PEFT wrote the file, and adapts a module under its first name only
        for name, other in two_names(root, [clean_name(target.fqn) for target in report.targets]).items():
            raise ValueError(
                f"{path}: {name!r} and {other!r} are one module here and two in PEFT, which would have adapted only the first."
            )
    tensors, brought = _fit(root, report, adapter, str(path), check_base)
    places = {
        f"{target.fqn}.{name}": p for target in (*report.targets, *report.rows) for name, p in target.module.named_parameters(recurse=False)
    }
    places |= {name: tensor for name, tensor in root.state_dict(keep_vars=True).items() if clean_name(name) in tensors}
    check_values_kept(places, str(path), "the adapter's values would be lost there")
    if check_base and adapter.base is not None:
        trained = {name for name in tensors if not is_adapter(name)} | adapter.beside
        rows = {f"{target.fqn}.weight": target.spec.rows for target in report.rows}
        fingerprint.check_base(fingerprint.identity_like(adapter.base, root, trained, rows), adapter.base, str(path))
        fingerprint.check_buffers(root, adapter.base, trained, str(path))
    return adapter, report, tensors, brought


def _resolved(root: nn.Module, adapter: AdapterFile, where: str) -> tuple[AdapterFile, TargetReport]:
    """Return the layers that an adapter is for, and the adapter with a config that finds them here.

    Raises:
        ValueError: its config does not fit this model.
    """
    try:
        config, report = resolve_file(root, adapter)
    except ValueError as error:
        first, *others = str(error).splitlines()
        raise ValueError(f"{where}: {first}" + (f" ({len(others)} more)" if others else "")) from error
    return replace(adapter, config=config), report


def check_same(root: nn.Module, layers: dict[str, LoRALayer], report: TargetReport, config: LoRAConfig, where: str) -> None:
    """Raise ValueError unless the model's adapted layers are those of the file, with its rank, scaling and variant."""

    def key(config: LoRAConfig, spec: LayerSpec, kind: type[LoRALayer]) -> tuple[Any, ...]:
        if spec.rows:
            return spec.rows
        own = [kind_options_of(config, name) for name in config.kind_options if issubclass(kind, KIND_NAMES[name])]
        slices = [] if spec.slices is None else spec.slices.names
        return spec.rank, config.scaling_of(spec.rank, spec.alpha), config.variant, *options_of(config).items(), *own, *slices

    here = {name: key(layer.lora_config, layer.spec, type(layer)) for name, layer in layers.items()}
    file = {clean_name(t.fqn): key(config, t.spec, t.kind) for t in (*report.targets, *report.rows)}
    different = [
        f"{name!r} has {here.get(name)}, the file {file.get(name)}" for name in sorted(here | file) if here.get(name) != file.get(name)
    ]
    own = next(layer for layer in layers.values() if layer.low_rank).lora_config
    for name, mine, theirs in (
        ("bias", own.bias, config.bias),
        ("modules_to_save", sorted(saved_modules(root, replace(own, modules_to_save="auto"))), sorted(report.saved)),
    ):
        if mine != theirs:
            different.append(f"{name} is {mine!r}, the file has {theirs!r}")
    if different:
        raise ValueError(
            f"{where} does not fit the LoRA this model has, in {counted(len(different), 'place')} (rank, scaling, variant, options):"
            f" {different[0]}; call unload_lora(model) first (if it is merged with merged='keep', which leaves the update in the weights,"
            " or merged='drop')."
        )


def two_names(root: nn.Module, adapted: Collection[str]) -> dict[str, str]:
    """Return first name → another of each module that is there twice, if either is adapted. PEFT adapts the first only."""
    return {name: other for name, other in second_names(root).items() if name in adapted or other in adapted}


def _named(report: TargetReport, adapter: AdapterFile, where: str) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Return the file's tensors by their names in this model, and name → shape of those that the layers need.

    Raises:
        ValueError: a tensor of PEFT's form does not fit the layer.
    """
    tensors = dict(adapter.tensors)
    try:
        report.targets[0].kind.take_shared([(target.module, target.spec) for target in report.targets], tensors)
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from error
    shapes: dict[str, tuple[int, ...]] = {}
    for target in (*report.targets, *report.rows):
        for file_name, own in target.kind.file_names.items():
            if (named := f"{clean_name(target.fqn)}.{file_name}") in tensors:
                tensors[f"{clean_name(target.fqn)}.{own}"] = tensors.pop(named)
        for part, shape in target.kind.parameter_shapes(target.module, target.spec).items():
            name = f"{clean_name(target.fqn)}.{part}"
            shapes[name] = shape
            if name in tensors and tuple(tensors[name].shape) != shape:
                try:
                    tensors[name] = target.kind.from_peft(target.module, part, tensors[name], target.spec)
                except ValueError as error:
                    raise ValueError(f"{where}: {name}: {error}.") from error
    return tensors, shapes


def _fit(root: nn.Module, report: TargetReport, adapter: AdapterFile, where: str, check_base: bool) -> tuple[dict[str, Tensor], set[str]]:
    """Return the file's tensors by their names in this model, checked against it, and the names of those that replace base weights.

    Raises:
        ValueError: a tensor is missing, left over, of another shape, or a weight of another base.
    """
    config = adapter.config
    tensors, shapes = _named(report, adapter, where)
    base = {clean_name(name): tensor for name, tensor in root.state_dict(keep_vars=True).items() if not is_adapter(name)}
    extras = extra_tensors(root, config, {clean_name(target.fqn) for target in report.targets})
    shapes |= {name: tuple(tensor.shape) for name, tensor in extras.items() if isinstance(tensor, nn.Parameter) or name in tensors}

    missing = sorted(shapes.keys() - tensors.keys())
    if missing:
        raise ValueError(
            f"{where}: {counted(len(missing), 'tensor', 'are')} missing that its config needs on this model: {_some(missing)}."
        )
    left = sorted(tensors.keys() - shapes.keys())
    for name in left:
        if name not in base:
            raise ValueError(f"{where}: {name!r} is no tensor that its config puts on this model ({len(left)} such tensors).")
        if equal_values(base[name], tensors[name]):  # PEFT also writes frozen embeddings: not part of the adapter
            del tensors[name]
        elif name not in adapter.beside:
            raise ValueError(f"{where}: {name!r} is a base weight that differs from this model's ({len(left)} such tensors).")
        elif reason := why_not_brought(root, base[name], tensors[name], check=check_base and adapter.fields is not None):
            raise ValueError(f"{where}: {name!r} {reason}.")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(tensors[name].shape)}, this model and rank={config.rank} need {shape}:"
                " the adapter is for another base or another rank."
            )
        mine = kind_of_numbers(base[name].dtype if name in base else torch.float32)
        if (theirs := kind_of_numbers(tensors[name].dtype)) != mine:
            raise ValueError(f"{where}: {name} has {theirs} numbers ({tensors[name].dtype}), this model needs {mine} ones.")
    owners: dict[int, str] = {}
    for name in tensors.keys() & base.keys():  # parameters tied in this model: one parameter cannot take two values
        other = owners.setdefault(id(base[name]), name)
        if not torch.equal(tensors[name], tensors[other]):
            first, second = sorted((name, other))
            raise ValueError(
                f"{where}: {first} and {second} are one tied parameter in this model, the file has two values; untie them first."
            )
    return tensors, tensors.keys() - shapes.keys()


def _finite(tensor: Tensor) -> bool:
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # torch has no such test of FP8
    return bool(torch.isfinite(wide).all())


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
