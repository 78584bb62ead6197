"""LoRA-XS (arXiv:2405.17604, equation 2): ``W + s·B·R·A`` with frozen singular vectors of the weight, where only the core R trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lightning_lora
from lightning_lora import apply_lora, load_adapter, merge_lora, save_adapter, unload_lora, unmerge_lora
from lightning_lora.config import LoRAConfig
from tests.layers.kinds import CASES


def filled(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any, Tensor]:
    """A model of one adapted layer whose core is random, the layer, and an input."""
    case = CASES[kind]
    model = nn.Sequential(case.base(dtype))
    apply_lora(model, LoRAConfig(rank=case.rank, target_modules=["0"], variant="lora_xs"))
    layer: Any = model[0]
    with torch.no_grad():
        layer.lora_R.normal_()
    return model, layer, case.x(dtype)


KINDS = ["linear", "hf-conv1d", "embedding", "conv2d"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_and_its_gradient(kind: str) -> None:
    model, layer, x = filled(kind, torch.float64)
    case, base = CASES[kind], CASES[kind].base(torch.float64)
    A = (layer.lora_R @ layer.lora_A.flatten(1)).view(layer.lora_A.shape)
    with torch.no_grad():
        base.weight += layer.scaling * case.product(layer, A, layer.lora_B)
    assert_close(model(x), base(x), rtol=1e-9, atol=1e-9)
    model(x).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["0.lora_R"]


@pytest.mark.parametrize("kind", KINDS)
def test_merges_unmerges_and_unloads(kind: str) -> None:
    model, layer, x = filled(kind)
    before, bits = model(x), layer.weight.clone()
    assert_close(merge_lora(model)(x), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(unmerge_lora(model)[0].weight, bits)
    assert type(unload_lora(model)[0]) is type(CASES[kind].base())


@pytest.mark.parametrize("kind", KINDS)
def test_its_file_is_the_plain_lora_that_it_computes(kind: str, tmp_path: Any) -> None:
    model, _, x = filled(kind)
    save_adapter(model, tmp_path / "adapter")
    assert_close(load_adapter(nn.Sequential(CASES[kind].base()), tmp_path / "adapter")(x), model(x), rtol=1e-4, atol=1e-4)


def test_it_starts_from_the_largest_singular_vectors() -> None:
    model = apply_lora(nn.Sequential(nn.Linear(9, 6)), LoRAConfig(rank=6, alpha=6, target_modules=["0"], variant="lora_xs"))
    layer: Any = model[0]
    assert_close(layer.lora_B @ layer.lora_A, layer.weight)  # all six: the weight itself
    assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(6), rtol=1e-5, atol=1e-5)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_R"] and layer.adds_nothing()


def test_a_base_that_comes_later_gives_the_start() -> None:
    base = nn.Sequential(nn.Linear(9, 6))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(9, 6))
    apply_lora(model, LoRAConfig(rank=2, target_modules=["0"], variant="lora_xs")).to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model.load_state_dict(base.state_dict(), strict=False)
    wanted: Any = apply_lora(base, LoRAConfig(rank=2, target_modules=["0"], variant="lora_xs"))[0]
    assert_close(model[0].lora_B @ model[0].lora_A, wanted.lora_B @ wanted.lora_A)


@pytest.mark.parametrize(
    ("module", "config", "match"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), {"rank": 2}, "split into groups"),
        (nn.Linear(9, 3), {"rank": 4}, r"with rank=4 is above min\(in, out\)=3"),
        (nn.Linear(9, 3), {"rank": 2, "init": "gaussian"}, "init='gaussian' and variant='lora_xs'"),
        (nn.Embedding(9, 3, padding_idx=0), {"rank": 2}, "row of padding_idx=0"),
    ],
)
def test_what_is_refused(module: nn.Module, config: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        apply_lora(nn.Sequential(module), LoRAConfig(target_modules=["0"], variant="lora_xs", **config))


@pytest.mark.parametrize("folder", ["layers", "callbacks"])
def test_a_variant_is_one_file(folder: str) -> None:
    """VeRA shares its factors across layers and LoRA-XS has a core between them; no layer and no callback knows of either."""
    files = sorted((Path(lightning_lora.__file__).parent / folder).glob("*.py"))
    assert len(files) > 10
    assert not [file.name for file in files if re.search(r"\b(vera|lora[-_]?xs)\b", file.read_text(), re.IGNORECASE)]
