"""`inspect` of a model and of an adapter or a checkpoint: what would be adapted in the one, what is in the other."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora import LoRAConfig, find_targets
from lightning_lora.adapter_io.files import CONFIG, TENSORS, AdapterFile, read_adapter
from lightning_lora.adapter_io.metadata import META
from lightning_lora.cli.console import print_json, print_pairs, print_table
from lightning_lora.cli.task_file import read_task
from lightning_lora.cli.tuned import content_of, is_checkpoint
from lightning_lora.storage.sharded_checkpoint import REST
from lightning_lora.tasks.base import TASK
from lightning_lora.tasks.hf import skeleton
from lightning_lora.utils.patterns import starred


def is_adapter(path: str) -> bool:
    """True if a path names an adapter folder or a checkpoint: a file, or a folder of shards."""
    return path.endswith(".ckpt") or any(Path(path, file).is_file() for file in (CONFIG, TENSORS, REST))


def inspect_adapter(path: str, as_json: bool) -> None:
    """Print an adapter's config and tensors, or what a checkpoint without an adapter holds.

    Layers that differ only in their number share a line.
    """
    if is_checkpoint(path) and (whole := content_of(path)) is not None and META not in whole:
        _inspect_weights(path, whole, as_json)
        return
    adapter = read_adapter(path)
    adapter.check_intact(path)
    tensors = _described(adapter.tensors)
    facts: dict[str, Any] = {"adapter": path, "base": base_name(adapter), **_counted(adapter.tensors)}
    facts["checksum"] = adapter.checksum()  # a merge certificate has it too
    if as_json:
        print_json(facts | {"config": adapter.config.to_dict(), "tensors": tensors})
        return
    changed = {name: value for name, value in adapter.config.to_dict().items() if value or name in ("rank", "alpha")}
    print_pairs(facts | changed)
    print()
    _print_grouped(adapter.tensors)


def _inspect_weights(path: str, content: dict[str, Any], as_json: bool) -> None:
    """Print what a checkpoint without an adapter holds.

    Raises:
        ValueError: It holds no weights.
    """
    state = content.get("state_dict")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise ValueError(f"{path} holds neither an adapter nor weights")
    task = read_task(path)
    what = "all weights of a full fine-tune, no adapter" if TASK in content else "a module's weights, no adapter"
    facts: dict[str, Any] = {"checkpoint": path, "holds": what, "class": task.auto_class, "labels": list(task.labels)}
    facts |= {name: content[key] for name, key in (("epoch", "epoch"), ("step", "global_step")) if key in content} | _counted(tensors)
    if as_json:
        print_json(facts | {"tensors": _described(tensors)})
        return
    print_pairs({name: value for name, value in facts.items() if value not in (None, [])})
    if TASK in content:
        print(f"\nas a model's folder: lightning-lora merge MODEL {shlex.quote(path)} OUT")
    print()
    _print_grouped(tensors)


def _described(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: {"shape": list(tensor.shape), "dtype": _dtype(tensor)} for name, tensor in tensors.items()}


def _counted(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {"tensors": len(tensors), "parameters": sum(tensor.numel() for tensor in tensors.values())}


def _print_grouped(tensors: Mapping[str, Tensor]) -> None:
    groups = Counter((starred(name), str(tuple(tensor.shape)), _dtype(tensor)) for name, tensor in tensors.items())
    print_table(("tensor", "shape", "dtype", "count"), [(*group, count) for group, count in groups.items()])


def inspect_model(path: str, gguf_file: str | None, lora: LoRAConfig, as_json: bool) -> None:
    """Print what a config would adapt in a model. No weights are loaded."""
    report = find_targets(skeleton(path, gguf_file, auto_class=None), lora)
    if not as_json:
        print(report)
        return
    targets = [{"name": t.fqn, "type": t.type_name, "shape": t.shape, "rank": t.rank, "alpha": t.alpha} for t in report.targets]
    print_json(
        {"model": path, "parameters": report.total, "adapter_parameters": report.parameters, "targets": targets}
        | {
            "token_rows": {t.fqn: list(t.spec.rows) for t in report.rows},
            "trained_in_full": report.saved,
            "passed_over": report.passed_over,
            "left_out": report.left_out,
        }
    )


def base_name(adapter: AdapterFile) -> str | None:
    """Return the name of the model that an adapter was trained on, None if its file does not say."""
    return (adapter.base or {}).get("name") or (adapter.fields or {}).get("base_model_name_or_path")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
