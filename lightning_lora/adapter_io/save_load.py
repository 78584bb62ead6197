"""``save_adapter`` and ``load_adapter``: write a model's adapter to files, and load one into a model.

Loading is all or nothing: everything is checked (:mod:`~lightning_lora.adapter_io.fitting`) before anything is changed.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapter_io import fingerprint, peft_format
from lightning_lora.adapter_io.exported import export_layers, with_parent
from lightning_lora.adapter_io.extras import (
    brought_names,
    brought_tensors,
    check_values_kept,
    extra_tensors,
    made_by_user,
    note_brought,
    takes_extra_state,
    warn_of_state,
)
from lightning_lora.adapter_io.files import AdapterFile, check_free, write_folder
from lightning_lora.adapter_io.fingerprint import base_identity, buffer_digests
from lightning_lora.adapter_io.fitting import check_same, checked_adapter, two_names
from lightning_lora.adapter_io.names_below import below
from lightning_lora.adapter_io.peft_experts import beside_experts
from lightning_lora.adapter_io.peft_names import factor_in_file, names_in_file, peft_name
from lightning_lora.adapter_io.peft_rules import auto_mapping, task_type
from lightning_lora.adapter_io.token_rows import peft_rows
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.awaiting import data_came
from lightning_lora.layers.base import PREFIX, LoRALayer, lora_layers
from lightning_lora.layers.factors import Exported
from lightning_lora.model.apply import inject, unload_lora
from lightning_lora.model.heads import saved_modules
from lightning_lora.model.merge import remerging, unmerge_layers
from lightning_lora.model.modes import restore_flags
from lightning_lora.model.noted_state import base_buffers, has_extra_state
from lightning_lora.model.whole_adapters import check_not_flattened, whole_adapters
from lightning_lora.utils.names import adapter_root, bare, clean_name, modules_by_name
from lightning_lora.utils.sharding import full_tensor, local_shard, local_tensor, on_first_rank
from lightning_lora.utils.transformers_conventions import expert_family, loaded_from


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
        ValueError: the model has no LoRA, or several adapters of which none is active; or the folder is not empty and ``overwrite`` is
            False.

    Examples:
        >>> folder = save_adapter(apply_lora(model), "adapter")
        >>> sorted(path.name for path in folder.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    folder = Path(folder)
    prefix, root = adapter_root(model)
    layers = adapted_layers(root)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layers to save; call apply_lora(model, config=...) first.")
    on_first_rank(lambda: check_free(folder, overwrite))
    with whole_adapters(root):
        if all(layer.lora_state.base_alone and not layer.lora_B.any() for layer in layers.values()):
            raise ValueError("none of the model's adapters is active, and the folder would hold zeros; call adapters.use(name) first.")
        exported, config = export_layers(layers)
    config = below(prefix, root, config, layers, exported)
    brought = brought_tensors(root) | base_buffers(root, moved=True)
    extras = extra_tensors(root, config, layers) | brought
    warn_of_state(model, root, str(folder))
    names = names_in_file(root, layers)
    tensors = {f"{names[fqn]}.{part}": tensor for fqn, layer in exported.items() for part, tensor in layer.tensors.items()}
    tensors |= {peft_name(name, layers): tensor for name, tensor in extras.items()}
    check_values_kept(tensors, str(folder), "no values to save")
    for name, other in two_names(root, layers).items():
        warnings.warn(f"{name!r} and {other!r} are one module: read by PEFT, the adapter would be on the first only.", stacklevel=2)
    base = base_identity(root, extras) | buffer_digests(root, extras) if fingerprint.is_readable(root) else None
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

    Examples:
        >>> model = load_adapter(model, "runs/legal/adapter")  # a folder of PEFT's too, or a checkpoint
        >>> load_adapter(model, "runs/leagl/adapter")
        Traceback (most recent call last):
        lightning_lora.storage.regular_files.WrongPath: runs/leagl/adapter: there is no such adapter folder or checkpoint.
    """
    _, root = adapter_root(model)
    check_not_flattened(root)
    adapter, report, tensors, brought = checked_adapter(root, path, check_base=check_base, allow_nonfinite=allow_nonfinite)
    around, modules = {clean_name(name): t for name, t in model.state_dict(keep_vars=True).items()}, dict(model.named_modules())
    outside = {} if root is model else adapter.outside
    beside = {name: value for name, value in outside.items() if not isinstance(value, Tensor) and name.rpartition(".")[0] in modules}
    states: list[tuple[nn.Module, Any]] = []
    for values, there in ((adapter.extra_state, dict(root.named_modules())), (beside, modules)):
        if stateless := [name for name in values if not takes_extra_state(there.get(name.rpartition(".")[0]))]:
            raise ValueError(f"{path} has extra state under {stateless[0]!r}: there is no module here that takes it.")
        states += [(there[name.rpartition(".")[0]], value) for name, value in values.items()]
    adapter.check_intact(str(path))
    with ExitStack() as undo:
        undo.callback(restore_flags, [(parameter, parameter.requires_grad) for parameter in root.parameters()])
        undo.callback(note_brought, root, brought_names(root))
        if layers := adapted_layers(root):
            check_same(root, layers, report, adapter.config, str(path))
            undo.callback(remerging(root))
            unmerge_layers(root)
        else:
            inject(root, adapter.config, report)
            undo.callback(unload_lora, root)
        mine = {clean_name(name): tensor for name, tensor in root.state_dict(keep_vars=True).items()}
        made = {name: tensors.pop(name) for name in made_by_user(root) if name in tensors}
        new = [(local_tensor(mine[name]), local_shard(tensor, mine[name])) for name, tensor in tensors.items()]
        new += [(around[name], value) for name, value in outside.items() if name in around and _fits(value, around[name])]
        undo.callback(_write, [(place, place.detach().clone()) for place, _ in new])
        _write(new)
        note_brought(root, brought)
        for module, value in states:
            if has_extra_state(module):
                undo.callback(module.set_extra_state, deepcopy(module.get_extra_state()))
            module.set_extra_state(value)
        if made:
            root.load_state_dict({name: made.get(clean_name(name), tensor) for name, tensor in root.state_dict().items()})
        undo.pop_all()
    for _, layer in lora_layers(root):
        data_came(layer)
    return model


@torch.no_grad()
def _write(values: list[tuple[Tensor, Tensor]]) -> None:
    for place, value in values:
        place.detach().copy_(value)


def _fits(value: Any, place: Any) -> bool:
    return isinstance(value, Tensor) and isinstance(place, Tensor) and value.shape == place.shape


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
    if unread := [fqn for fqn, layer in layers.items() if not layer.peft_reads]:
        what = type(layers[unread[0]]).lora_base.__name__
        warnings.warn(f"PEFT 0.21 cannot adapt {unread[0]!r} ({what}): load_adapter reads this folder, PEFT does not.", stacklevel=3)
    return beside_experts(fields, expert_family(model), called, modules)
