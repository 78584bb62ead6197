"""``merge_certificate``: state what a merge keeps of an adapter, in numbers that can be checked again later.

The certificate is written into the folder of a merged model as ``merge_certificate.json``. It identifies the base and the adapter, so both
can be compared with the files that they came from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_lora.adapter_io.exported import export_layers
from lightning_lora.adapter_io.extras import brought_tensors, extra_tensors
from lightning_lora.adapter_io.fingerprint import base_identity
from lightning_lora.adapter_io.integrity import seal
from lightning_lora.adapter_io.peft_names import PREFIX, our_name
from lightning_lora.layers.base import LoRALayer, lora_layers
from lightning_lora.layers.rounding import Rounding, check_limit, check_lost
from lightning_lora.model.merge import roundings
from lightning_lora.model.probe import OutputDifference, Probe, probe_merge
from lightning_lora.storage.atomic_files import write_atomic
from lightning_lora.utils.names import adapter_root, clean_name
from lightning_lora.utils.sharding import full_tensor

CERTIFICATE = "merge_certificate.json"
FORMAT_VERSION = 1
PACKAGES = ("lightning-lora", "torch", "transformers", "bitsandbytes", "torchao")


@dataclass(frozen=True)
class MergeCertificate:
    """What a merge keeps of an adapter.

    Attributes:
        base: the base's identity, as adapter files store it: ``fingerprint``, ``class``, ``name``.
        adapter: checksum of the adapter; ``lightning-lora inspect`` prints it for a folder.
        layers: module name → what rounding lost, None if other code merged; a layer with several weights has an entry for each.
        probe: output → how far the merged model's is from the unmerged model's; None without a probe.
        versions: package → version, of those that computed this.

    Examples:
        >>> model = load_adapter(model, "runs/legal/adapter")
        >>> certificate: MergeCertificate = merge_certificate(model)
        >>> certificate.check(max_lost=0.01)  # an error if rounding would lose more
        >>> {rounding.dtype for rounding in certificate.layers.values()}
        {'float32'}
    """

    base: dict[str, Any]
    adapter: str
    layers: dict[str, Rounding | None]
    probe: dict[str, OutputDifference] | None
    versions: dict[str, str]

    def check(self, max_lost: float | None) -> None:
        """Raise ValueError with the worst layer's name if rounding loses more than this share of an update. None allows any."""
        check_limit(max_lost)
        check_lost(self.layers, max_lost)

    def to_dict(self) -> dict[str, Any]:
        """Return the certificate as plain types, as the JSON has it. Shares are between 0 and 1; ``lost`` may exceed 1."""
        shown = ("dtype", "survives", "lost", "unchanged", "entries")
        layers = {name: each and {field: getattr(each, field) for field in shown} for name, each in self.layers.items()}
        dtypes = sorted({each.dtype for each in self.layers.values() if each is not None})
        return {
            "format_version": FORMAT_VERSION,
            "base": self.base,
            "adapter": {"checksum": self.adapter},
            "dtype": dtypes[0] if len(dtypes) == 1 else dtypes,
            "layers": layers,
            "probe": None if self.probe is None else {name: asdict(difference) for name, difference in self.probe.items()},
            "versions": self.versions,
        }

    def write(self, folder: Path) -> None:
        """Write the JSON into a folder."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        write_atomic(folder / CERTIFICATE, text.encode())

    def __str__(self) -> str:
        """Return :func:`summary`."""
        return summary(self.to_dict())


def summary(certificate: Mapping[str, Any]) -> str:
    """Return one line on a certificate's JSON: the worst layer, and the largest difference of an output."""
    lost = {name: each["lost"] for name, each in certificate["layers"].items() if each is not None}
    worst = max(lost, key=lambda name: lost[name], default=None)
    line = "no merge was measured" if worst is None else f"rounding loses at most {lost[worst]:.2%} of an update ({worst})"
    differ = {name: each["max_relative"] for name, each in (certificate["probe"] or {}).items()}
    output = max(differ, key=lambda name: differ[name], default=None)
    return line if output is None else f"{line}; output {output!r} differs by at most {differ[output]:.2e} of its largest entry"


def merge_certificate(model: nn.Module, *, probe: Probe | None = None) -> MergeCertificate:
    """Measure what a merge of a model's adapters keeps of them. The model is the same afterwards, to the bit.

    For a merged model these are the numbers of its merge. For any other, each weight's merge is computed and discarded. Quantized weights
    are then measured as if they were dequantized; merge with ``quantized="requantize"`` first to certify that.

    Args:
        model: an adapted model or a LightningModule around one. On a sharded model every rank calls this.
        probe: what to compare outputs on, before and after the merge, in evaluation mode: a batch for the model (a tensor, a tuple of
            arguments, or a mapping of keyword arguments) or a function of the model that returns its outputs. Default: no comparison. A
            merged model must be one that :func:`~lightning_lora.unmerge_lora` can unmerge.

    Returns:
        The certificate. Print it, or call its ``check`` or ``to_dict``.

    Raises:
        ValueError: the model has no adapters or cannot be merged, a merged weight does not fit its dtype, or the probe's outputs are not
            comparable.

    Examples:
        >>> model = load_adapter(model, "runs/legal/adapter")
        >>> certificate = merge_certificate(model, probe=batch)
        >>> max(rounding.lost for rounding in certificate.layers.values()) < 1e-5  # in fp32
        True
    """
    _, root = adapter_root(model)
    layers = {clean_name(name): layer for name, layer in lora_layers(root)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layers to certify; call apply_lora(model, config=...) first.")
    for name, layer in layers.items():
        if not layer.merged and (reason := layer.merge_refusal("dequantize")):
            raise ValueError(f"{name!r} cannot be merged: {reason}.")
    measured = {clean_name(name): each for name, each in roundings(root).items()}
    for name, rounding in measured.items():
        if rounding is not None and math.isinf(rounding.lost):
            raise ValueError(f"{name!r}: its merged weight does not fit {rounding.dtype}: load the base in bfloat16 or float32.")
    config = next(layer for layer in layers.values() if layer.low_rank).lora_config
    extras = extra_tensors(root, config, layers) | brought_tensors(root)
    checksum = _adapter_checksum(layers, extras)
    compared = None if probe is None else probe_merge(model, probe)
    return MergeCertificate(base_identity(root, extras), checksum, measured, compared, _versions())


def _adapter_checksum(layers: Mapping[str, LoRALayer], extras: Mapping[str, Tensor]) -> str:
    """Return :meth:`AdapterFile.checksum` of what ``save_adapter`` would write. Collective on sharded models.

    Args:
        layers: FQN → adapted layer.
        extras: FQN → tensor that belongs to the adapter beside A and B.
    """
    exported, config = export_layers(dict(layers))
    tensors = {our_name(f"{PREFIX}{fqn}.{part}", ""): tensor for fqn, each in exported.items() for part, tensor in each.tensors.items()}
    whole = {name: full_tensor(tensor.detach()) for name, tensor in (tensors | dict(extras)).items()}
    return seal({"config": config.to_dict()}, whole)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an extra that is not installed
            continue
    return found
