"""`inspect` of a model and of an adapter: what would be adapted in the one, what is in the other."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora import LoRAConfig, find_targets
from lightning_lora.adapter_io.files import CONFIG, TENSORS, AdapterFile, read_adapter
from lightning_lora.cli.console import print_json, print_pairs, print_table
from lightning_lora.storage.sharded_checkpoint import REST
from lightning_lora.tasks.hf import skeleton
from lightning_lora.utils.patterns import starred


def is_adapter(path: str) -> bool:
    """True if a path names an adapter folder or a checkpoint: a file, or a folder of shards."""
    return path.endswith(".ckpt") or any(Path(path, file).is_file() for file in (CONFIG, TENSORS, REST))


def inspect_adapter(path: str, as_json: bool) -> None:
    """Print an adapter's config and tensors. Layers that differ only in their number share a line."""
    adapter = read_adapter(path)
    adapter.check_intact(path)
    tensors = {name: {"shape": list(tensor.shape), "dtype": _dtype(tensor)} for name, tensor in adapter.tensors.items()}
    parameters = sum(tensor.numel() for tensor in adapter.tensors.values())
    facts: dict[str, Any] = {"adapter": path, "base": base_name(adapter), "tensors": len(tensors), "parameters": parameters}
    facts["checksum"] = adapter.checksum()  # a merge certificate has it too
    if as_json:
        print_json(facts | {"config": adapter.config.to_dict(), "tensors": tensors})
        return
    changed = {name: value for name, value in adapter.config.to_dict().items() if value or name in ("rank", "alpha")}
    print_pairs(facts | changed)
    print()
    groups = Counter((starred(name), str(tuple(tensor.shape)), _dtype(tensor)) for name, tensor in adapter.tensors.items())
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
