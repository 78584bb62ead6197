"""``save_adapter`` and ``load_adapter``: write a model's adapter to files, and load one into a model.

Loading is all or nothing: it checks everything before it changes anything. No tensor may be missing or left over, every shape must fit,
the base must be the one that the adapter was trained on, and no value may be NaN.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapter_io import fingerprint, peft_format
from lightning_lora.adapter_io.exported import export_layers, with_parent
from lightning_lora.adapter_io.extras import (
    brought_tensors,
    check_values_kept,
    equal_values,
    extra_tensors,
    is_adapter,
    note_brought,
    takes_extra_state,
    why_not_brought,
)
from lightning_lora.adapter_io.files import AdapterFile, check_free, read_adapter, write_folder
from lightning_lora.adapter_io.fingerprint import base_identity
from lightning_lora.adapter_io.peft_experts import beside_experts
from lightning_lora.adapter_io.peft_names import factor_in_file, names_in_file, peft_name
from lightning_lora.adapter_io.peft_rules import auto_mapping, task_type
from lightning_lora.adapter_io.placing import place
from lightning_lora.adapter_io.size_limit import check_size
from lightning_lora.adapter_io.token_rows import peft_rows
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import PREFIX, LoRALayer, lora_layers
from lightning_lora.layers.factors import Exported
from lightning_lora.layers.spec import LayerSpec, options_of
from lightning_lora.model.apply import inject
from lightning_lora.model.heads import saved_modules
from lightning_lora.model.merge import unmerge_lora
from lightning_lora.model.targeting import TargetReport, resolve
from lightning_lora.utils.names import adapter_root, bare, clean_name, modules_by_name, second_names
from lightning_lora.utils.sharding import full_tensor, local_shard, local_tensor, on_first_rank
from lightning_lora.utils.transformers_conventions import expert_family, loaded_from
from lightning_lora.utils.values import kind_of_numbers


def save_adapter(model: nn.Module, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write the adapter of a model, merged or not, so that PEFT and the servers that read its format can load it.

    On a sharded model every rank has to call it. The first one writes, and all return once the files exist.

    Args:
        model: an adapted model, or a LightningModule around one (names are relative to the model inside).
        folder: created if it does not exist.
        overwrite: replace an existing adapter.

    Returns:
        The folder.

    Raises:
        ValueError: the model has no LoRA, or the folder is not empty and ``overwrite`` is False.
    """
    folder = Path(folder)
    _, root = adapter_root(model)
    layers = adapted_layers(root)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layers to save; call apply_lora(model, config=...) first.")
    on_first_rank(lambda: check_free(folder, overwrite))
    exported, config = export_layers(layers)
    brought = brought_tensors(root)
    extras = extra_tensors(root, config, layers) | brought
    names = names_in_file(root, layers)
    tensors = {f"{names[fqn]}.{part}": tensor for fqn, layer in exported.items() for part, tensor in layer.tensors.items()}
    tensors |= {peft_name(name, layers): tensor for name, tensor in extras.items()}
    check_values_kept(tensors, str(folder), "no values to save")
    for name, other in _shared(root, layers).items():
        warnings.warn(f"{name!r} and {other!r} are one module: read by PEFT, the adapter would be on the first only.", stacklevel=2)
    base = base_identity(root, extras) if fingerprint.is_readable(root) else None
    if base is None:
        warnings.warn(
            f"{folder}: {type(root).__name__} is part of an FSDP1 unit, which alone can tell its parameters apart. So the adapter has no"
            " fingerprint of its base, and loads on any base of its shapes: save it from the module that FSDP1 wrapped as a whole.",
            stacklevel=2,
        )
    whole = {name: full_tensor(tensor.detach()) for name, tensor in tensors.items()}
    whole = {name: tensor if (by := factor_in_file(name)) == 1 else tensor * by for name, tensor in whole.items()}
    content = AdapterFile(config, whole, base, frozenset(brought))
    fields = _fields(root, config, exported, layers)
    on_first_rank(lambda: write_folder(folder, content, fields, lambda: check_free(folder, overwrite)))
    return folder


def load_adapter(model: nn.Module, path: str | Path, *, check_base: bool = True, allow_nonfinite: bool = False) -> nn.Module:
    """Load an adapter into a model. Apply LoRA first if the model has none; unmerge it first if it is merged.

    Args:
        model: a base model, one with an adapter of the same shapes, or a LightningModule around one.
        path: a folder (ours or PEFT's), or a checkpoint that :class:`~lightning_lora.LoRACallback` wrote, a file or a folder of shards.
        check_base: refuse an adapter that was trained on another base (known for adapters written here).
        allow_nonfinite: accept NaN and infinity.

    Returns:
        The same ``model``.

    Raises:
        ValueError: the file cannot be read or does not fit the model, which is then unchanged.
    """
    _, root = adapter_root(model)
    adapter, report, tensors, brought = checked_adapter(root, path, check_base=check_base, allow_nonfinite=allow_nonfinite)
    around, modules = {clean_name(name): t for name, t in model.state_dict(keep_vars=True).items()}, dict(model.named_modules())
    outside = {} if root is model else adapter.outside
    beside = {name: value for name, value in outside.items() if not isinstance(value, Tensor) and name.rpartition(".")[0] in modules}
    for states, there in ((adapter.extra_state, dict(root.named_modules())), (beside, modules)):
        if stateless := [name for name in states if not takes_extra_state(there.get(name.rpartition(".")[0]))]:
            raise ValueError(f"{path} has extra state under {stateless[0]!r}: there is no module here that takes it.")
    adapter.check_intact(str(path))
    layers = adapted_layers(root)
    if layers:
        _same_adapter(root, layers, report, adapter.config, str(path))
        unmerge_lora(root)
    else:
        inject(root, adapter.config, report)
    mine = {clean_name(name): tensor for name, tensor in root.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            local_tensor(mine[name]).copy_(local_shard(tensor, mine[name]))
    note_brought(root, brought)
    for name, value in adapter.extra_state.items():
        root.get_submodule(name.rpartition(".")[0]).set_extra_state(value)
    for name, value in outside.items():
        mine_there = around.get(name)
        if isinstance(value, Tensor) and isinstance(mine_there, Tensor) and mine_there.shape == value.shape:
            mine_there.detach().copy_(value)
        elif name in beside:
            modules[name.rpartition(".")[0]].set_extra_state(value)
    return model


def checked_adapter(
    root: nn.Module, path: str | Path, *, check_base: bool, allow_nonfinite: bool
) -> tuple[AdapterFile, TargetReport, dict[str, Tensor], set[str]]:
    """Read an adapter for a model and check it as :func:`load_adapter` does, all but its checksum. Change nothing.

    Returns:
        The content; the layers that it adapts here; its tensors by their names here; the names of those that replace base weights.
    """
    check_size(Path(path), root)
    adapter = place(read_adapter(path), root, str(path))
    bad = [name for name, tensor in adapter.tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad and not allow_nonfinite:
        raise ValueError(f"{path}: {bad[0]} holds NaN or infinity ({len(bad)} tensors do); pass allow_nonfinite=True to load it anyway.")
    try:
        report = resolve(root, adapter.config, frozen_parts=True)  # the file says which layers it is for
    except ValueError as error:
        first, *others = str(error).splitlines()
        raise ValueError(f"{path}: {first}" + (f" ({len(others)} more)" if others else "")) from error
    if adapter.base is None:  # PEFT wrote the file, and adapts a module under its first name only
        for name, other in _shared(root, [clean_name(target.fqn) for target in report.targets]).items():
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
        fingerprint.check_base(base_identity(root, trained, rows), adapter.base, str(path))
    return adapter, report, tensors, brought


def adapted_layers(root: nn.Module) -> dict[str, LoRALayer]:
    """Return FQN, without the names of wrappers, → adapted layer."""
    return {clean_name(name): layer for name, layer in lora_layers(root)}


def _fields(root: nn.Module, config: LoRAConfig, exported: dict[str, Exported], layers: dict[str, LoRALayer]) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``."""
    by_name, saved = {name: each for name, each in modules_by_name(root).items() if PREFIX not in name}, saved_modules(root, config)
    transposed, model, modules = any(layer.transposed for layer in layers.values()), bare(root), [*by_name]
    rows, layers = peft_rows(model, layers, by_name), {fqn: layer for fqn, layer in layers.items() if layer.low_rank}
    exported = {fqn: each for fqn, each in exported.items() if fqn in layers and not with_parent(fqn, layers)}  # PEFT too adapts these so
    fields = peft_format.to_peft(config, exported, saved, modules, transposed=transposed) | rows
    task = task_type(model, saved, modules)
    fields |= {"base_model_name_or_path": loaded_from(model), "task_type": task, "auto_mapping": auto_mapping(model, task)}
    called = {fqn: layer for fqn, layer in layers.items() if not layer.peft_parameters}
    return beside_experts(fields, expert_family(model), called, modules)


def _fit(root: nn.Module, report: TargetReport, adapter: AdapterFile, where: str, check_base: bool) -> tuple[dict[str, Tensor], set[str]]:
    """Return the file's tensors by their names in this model, checked against it, and the names of those that replace base weights.

    Raises:
        ValueError: a tensor is missing, left over, of another shape, or a weight of another base.
    """
    tensors, config = dict(adapter.tensors), adapter.config
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
    base = {clean_name(name): tensor for name, tensor in root.state_dict(keep_vars=True).items() if not is_adapter(name)}
    extras = extra_tensors(root, config, {clean_name(target.fqn) for target in report.targets})
    shapes |= {name: tuple(tensor.shape) for name, tensor in extras.items() if isinstance(tensor, nn.Parameter) or name in tensors}

    missing = sorted(shapes.keys() - tensors.keys())
    if missing:
        raise ValueError(f"{where}: {len(missing)} tensors are missing that its config needs on this model: {_some(missing)}.")
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


def _same_adapter(root: nn.Module, layers: dict[str, LoRALayer], report: TargetReport, config: LoRAConfig, where: str) -> None:
    """Raise ValueError unless the model's adapted layers are those of the file, with its rank, scaling and variant."""

    def key(config: LoRAConfig, spec: LayerSpec) -> tuple[Any, ...]:
        if spec.rows:
            return spec.rows
        slices = [] if spec.slices is None else spec.slices.names
        return spec.rank, config.scaling_of(spec.rank, spec.alpha), config.variant, *options_of(config).items(), *slices

    here = {name: key(layer.lora_config, layer.spec) for name, layer in layers.items()}
    file = {clean_name(t.fqn): key(config, t.spec) for t in (*report.targets, *report.rows)}
    different = [
        f"{name!r} has {here.get(name)}, the file {file.get(name)}" for name in sorted(here | file) if here.get(name) != file.get(name)
    ]
    own = next(layer for layer in layers.values() if layer.low_rank).lora_config
    for name, mine, theirs in (
        ("bias", own.bias, config.bias),
        ("modules_to_save", sorted(saved_modules(root, own)), sorted(report.saved)),
    ):
        if mine != theirs:
            different.append(f"{name} is {mine!r}, the file has {theirs!r}")
    if different:
        raise ValueError(
            f"{where} does not fit the LoRA this model has, in {len(different)} places (rank, scaling, variant): {different[0]}; call"
            " unload_lora(model) first (if it is merged with merged='keep', which leaves the update in the weights, or merged='drop')."
        )


def _shared(root: nn.Module, adapted: Collection[str]) -> dict[str, str]:
    return {name: other for name, other in second_names(root).items() if name in adapted or other in adapted}


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
