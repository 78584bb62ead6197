"""Write an adapter so that a server loads it and computes the same: ``export_adapter``.

Most servers know one rank and one scaling for all layers (:mod:`lightning_lora.adapter_io.one_rank`). What a server cannot compute
(:mod:`lightning_lora.adapter_io.export_targets`) is refused by name: it would load, and answer differently.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from lightning_lora.adapter_io.export_targets import MERGE, PARTS, TARGETS, Target
from lightning_lora.adapter_io.files import CONFIG, LONGEST, AdapterFolder, check_free, encoded, read_raw
from lightning_lora.adapter_io.fingerprint import PACKED
from lightning_lora.adapter_io.model_card import CARD, model_card
from lightning_lora.adapter_io.one_rank import FileLayer, layers_of, one_rank
from lightning_lora.adapter_io.save_load import save_adapter
from lightning_lora.storage.atomic_files import write_atomic
from lightning_lora.storage.folder_commit import commit
from lightning_lora.storage.regular_files import read_regular
from lightning_lora.utils.sharding import on_first_rank

GENERATION = "generation_config.json"  # transformers' name
_TOKENS = ("embed_tokens", "word_embeddings", "wte")


def export_adapter(
    source: nn.Module | str | Path,
    folder: str | Path,
    *,
    target: str = "peft",
    base: str | None = None,
    component: str | None = None,
    data: str | None = None,
    metrics: Mapping[str, float] | None = None,
    tokenizer: Any = None,
    stops: Sequence[int] = (),
    labels: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Write an adapter as a server loads it, with a model card (``README.md``).

    ``peft`` keeps the adapter as it is. For the others every layer gets one rank, and differing scalings (rsLoRA, ``rank_pattern``,
    ``alpha_pattern``) are multiplied into B. The exported folder is an adapter that ``load_adapter`` and PEFT read too, except that of
    ``diffusers``.

    Args:
        source: an adapted model, or an adapter folder (ours or PEFT's).
        folder: created if it does not exist.
        target: ``peft``, ``vllm``, ``sglang``, ``llama.cpp`` or ``diffusers``.
        base: the base model's hub id or folder; default: the one that the adapter names.
        component: part of a diffusers pipeline, such as ``unet`` or ``transformer``; default: by the base's class.
        data: what the adapter was trained on, for the card.
        metrics: name → value, for the card.
        tokenizer: a Hugging Face tokenizer to write beside the adapter; the card names its chat template to the server.
        stops: tokens with which the tokenizer's chat template ends an answer. If one is not its end token, at which servers stop, they
            are in ``generation_config.json``, with what the base's says, and the card names them to the server.
        labels: names of the labels of a classification head, in order, for the card: the base has to be loaded with as many.
        overwrite: replace the adapter and the card in a folder that is not empty; its other files stay.

    Returns:
        The folder.

    Raises:
        ValueError: the adapter has a part that the target does not load, the source is no adapter, or the folder is not empty.

    Examples:
        >>> folder = export_adapter("runs/legal/adapter", "served", target="vllm", base="owner/model")
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: choose one of {', '.join(TARGETS)}.")
    folder = Path(folder)

    def write(path: Path) -> None:
        template, end = bool(getattr(tokenizer, "chat_template", None)), getattr(tokenizer, "eos_token_id", None)
        ends = [stop for stop in stops if stop != end]  # the first of them is not the tokenizer's
        ends += [end] if ends and end is not None else []
        card = partial(
            model_card, target=target, folder=folder.name, data=data, metrics=metrics or {}, template=template, ends=ends, labels=labels
        )
        files = _files(path, target, base, component, ends, card)
        with commit(folder, next(reversed(files)), lambda: check_free(folder, overwrite)) as staged:
            if tokenizer is not None:
                tokenizer.save_pretrained(staged)
            for name, content in files.items():
                write_atomic(staged / name, content)

    on_first_rank(lambda: check_free(folder, overwrite))
    with _as_folder(source) as path:
        on_first_rank(lambda: write(path))
    return folder


def _generation(base: str | None, ends: Sequence[int]) -> bytes:
    """Return the content of a ``generation_config.json`` with these end tokens: the base's, if it is a folder that has one."""
    file = Path(base or "", GENERATION)
    said = json.loads(read_regular(file, LONGEST)) if base and file.is_file() else {}
    own = said.get("eos_token_id")
    ids = {*(own if isinstance(own, list) else [] if own is None else [own]), *ends}
    return (json.dumps(said | {"eos_token_id": sorted(ids)}, indent=2) + "\n").encode()


@contextmanager
def _as_folder(source: nn.Module | str | Path) -> Iterator[Path]:
    """Yield an adapter folder: the source, or one that its adapter is saved to for the moment."""
    if isinstance(source, nn.Module):
        with tempfile.TemporaryDirectory() as saved:
            yield save_adapter(source, Path(saved) / "adapter")
        return
    if Path(source).is_file():
        raise ValueError(
            f"source={str(source)!r} is a file; give an adapter folder, or load the checkpoint into its model (load_adapter) and give that."
        )
    yield Path(source)


def _files(
    source: Path,
    target: str,
    base: str | None,
    component: str | None,
    ends: Sequence[int],
    card: Callable[[dict[str, Any], dict[str, Any] | None], str],
) -> dict[str, bytes]:
    """Return name → content of the exported files. The last is the one that is read first."""
    rules, adapter = TARGETS[target], read_raw(source)
    adapter.fields["base_model_name_or_path"] = base = base or adapter.fields.get("base_model_name_or_path") or None
    if base is None:
        warnings.warn(f"{source} does not name its base, so nothing that loads the export can find it; pass base=...", stacklevel=4)
    if rules.components:
        component = component or _component(adapter, rules, str(source))
    elif component is not None:
        raise ValueError(f"component={component!r}: {target} loads no pipelines; leave it out.")
    layers = _checked(adapter, target, str(source))
    if not rules.own_format:
        adapter = one_rank(adapter, layers, rules, component)
    files = {CARD: card(adapter.fields, adapter.base).encode()} | ({GENERATION: _generation(base, ends)} if ends else {})
    if component:
        return files | {rules.file: safetensors.torch.save(adapter.tensors, {"format": "pt"})}
    return files | {rules.file: encoded(adapter), CONFIG: (json.dumps(adapter.fields, indent=2, sort_keys=True) + "\n").encode()}


def is_loaded_by(target: str, folder: str | Path) -> bool:
    """Return True if a target loads what an adapter folder has."""
    try:
        _checked(read_raw(folder), target, str(folder))
    except ValueError:
        return False
    return True


def _checked(adapter: AdapterFolder, target: str, where: str) -> dict[str, FileLayer]:
    """Return the layers of an adapter, none if its files stay as they are. Raise ValueError if the target computes something else."""
    rules = TARGETS[target]
    if packed := (adapter.base or {}).get(PACKED):
        raise ValueError(
            f"{where}: init='loftq' belongs to quantized weights ({packed}), and {target} would add it to others. Merge it where these are:"
            " quantize_base(model, how, lora=config), load_adapter(model, folder) and export_merged; then serve that folder."
        )
    if rules.own_format:
        return {}
    layers, others = layers_of(adapter.tensors, adapter.fields, where)
    _check(target, rules, adapter.fields, layers, others, where)
    return layers


def _check(target: str, rules: Target, fields: dict[str, Any], layers: dict[str, FileLayer], others: list[str], where: str) -> None:
    """Raise ValueError if the adapter has a part that the target does not load."""
    for part, name in _parts(fields, layers, others):
        if part not in rules.takes:
            raise ValueError(f"{where}: {name!r} has {PARTS[part]}, which {target} does not load; {MERGE}.")
    for fqn in layers:
        if not rules.names.search(fqn):
            raise ValueError(f"{where}: {target} does not look at {fqn!r} (it reads names with {rules.names.pattern!r}); {MERGE}.")
    if rules.ranks and (rank := max(layer.rank for layer in layers.values())) > rules.ranks[-1]:
        raise ValueError(f"{where}: rank {rank} is above the largest that {target} serves, {rules.ranks[-1]}; {MERGE}.")


def _parts(fields: dict[str, Any], layers: dict[str, FileLayer], others: list[str]) -> Iterator[tuple[str, str]]:
    """Yield each part of :data:`PARTS` that the adapter has, with a name that has it."""
    if fields.get("peft_type", "LORA") != "LORA":
        yield "vera", fields["peft_type"]
    if fields.get("target_parameters"):
        yield "parameter", fields["target_parameters"][0]
    yield from (("base" if ".base_layer.weight" in name else "saved", name) for name in others)
    for fqn, layer in layers.items():
        if "magnitude_vector" in layer.tensors:
            yield "dora", fqn
        if layer.embedding:
            yield "token_embedding" if fqn.rpartition(".")[2] in _TOKENS else "embedding", fqn
        elif layer.tensors["A"].ndim != 2:
            yield "conv", fqn
        elif fields.get("fan_in_fan_out"):
            yield "transposed", fqn


def _component(adapter: AdapterFolder, rules: Target, where: str) -> str:
    """Return the part of a pipeline that the base's class is."""
    mapping = adapter.fields.get("auto_mapping") or {}
    name = str((adapter.base or {}).get("class") or mapping.get("base_model_class") or "")
    found = next((component for part, component in rules.components.items() if part in name), None)
    if found is None:
        raise ValueError(
            f"{where}: component is not set, and the base's class ({name or 'not known'}) does not tell it; pass component=... such as"
            f" {', '.join(rules.components.values())}."
        )
    return found
