"""Folders of models, compared file by file, and a merge by hand in float64 to compare with."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightning_lora.adapter_io.certificate import CERTIFICATE
from lightning_lora.layers.base import LoRALayer, lora_layers


class Conv(nn.Module):
    """A model of one convolution, the same each time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


def merged_by_hand(base: nn.Module, adapted: nn.Module) -> nn.Module:
    """A deep copy of the base with W + s·B·A in each adapted weight, computed in float64; of shared weights each gets its own."""
    model = copy.deepcopy(base)
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for name, layer in lora_layers(adapted):
        module: Any = model.get_submodule(name)
        for parameter, part in layer.by_weight().items():
            weight = getattr(module, parameter)
            merged = by_hand(weight.detach(), part)
            if uses[id(weight)] > 1:
                setattr(module, parameter, nn.Parameter(merged))
            else:
                weight.data.copy_(merged)
    return model


def by_hand(weight: Tensor, layer: LoRALayer) -> Tensor:
    A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    if weight.ndim == 3 and A.ndim == 2:  # experts: one pair after the other
        A, B = A.unflatten(0, (len(weight), -1)), B.unflatten(0, (len(weight), -1))
    update = B @ A
    update = update if update.shape == weight.shape and not layer.transposed else update.mT
    return (weight.double() + layer.scaling * update).to(weight.dtype)


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            found.update({name: reader.get_tensor(name) for name in reader.keys()})  # noqa: SIM118 (not a dict)
    return found


def metadata(folder: Path) -> dict[str, Any]:
    return {file.name: safe_open(file, framework="pt").metadata() for file in folder.glob("*.safetensors")}


def differences(found: Path, wanted: Path) -> list[str]:
    """What differs between two folders, in words: names of files, bytes of the side files, tensors by name, dtype, shape and value.

    The certificate of a merge is left out: ``save_pretrained`` writes none.
    """
    names = [{file.name for file in folder.iterdir()} - {CERTIFICATE} for folder in (found, wanted)]
    words = [f"files: {sorted(names[0] ^ names[1])[:4]}"] if names[0] != names[1] else []
    both = sorted(name for name in names[0] & names[1] if not name.endswith(".safetensors"))
    words += [f"{name} differs" for name in both if not same(found / name, wanted / name)]
    words += ["metadata differs"] if metadata(found) != metadata(wanted) else []
    mine, theirs = tensors(found), tensors(wanted)
    words += [f"names: {sorted(mine.keys() ^ theirs.keys())[:4]}"] if mine.keys() != theirs.keys() else []
    for name in mine.keys() & theirs.keys():
        if (mine[name].dtype, mine[name].shape) != (theirs[name].dtype, theirs[name].shape):
            words.append(f"{name}: {mine[name].dtype} {tuple(mine[name].shape)}")
        elif not torch.allclose(mine[name].double(), theirs[name].double(), rtol=one_step(mine[name].dtype), atol=1e-6):
            words.append(f"{name}: off by {float((mine[name].double() - theirs[name].double()).abs().max()):.1e}")
    return words


def one_step(dtype: torch.dtype) -> float:
    """Sums in two orders may round to neighbours: in half precision they are up to eps apart."""
    return max(1e-6, torch.finfo(dtype).eps) if dtype.is_floating_point else 0.0


def same(found: Path, wanted: Path) -> bool:
    read = (lambda file: json.loads(file.read_text())) if found.suffix == ".json" else Path.read_bytes
    return bool(read(found) == read(wanted))
