"""A new variant is one class: LoRA-XS (arXiv:2405.17604, equation 2), written here, goes through everything that the package does.

``W + s·B·R·A``: A and B are frozen singular vectors of the weight, only the r×r core R trains. Nothing else in the package knows of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_lora import LoRALayer, apply_lora, load_adapter, merge_lora, register_variant, save_adapter, unload_lora, unmerge_lora
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.factors import Exported
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.registry import VARIANTS
from tests.layers.kinds import CASES


class LoRAXS(LoRALayer):
    lora_R: nn.Parameter

    @classmethod
    def parameter_shapes(cls, module: Any, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        return {**super().parameter_shapes(module, spec), "lora_R": (spec.rank, spec.rank)}

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        super().check(module, spec)
        A, B = cls.adapter_shapes(module, spec)
        if (A[0], B[1]) != (spec.rank, spec.rank):
            raise ValueError("variant='lora_xs' mixes all rows of A, and here they belong to groups; exclude it")

    def init_adapter(self, spec: LayerSpec) -> None:
        super().init_adapter(spec)
        self.lora_A.requires_grad_(False)
        self.lora_B.requires_grad_(False)

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        U, S, Vh = torch.linalg.svd(self.to_matrix(self.base_weight()).flatten(0, -2).to(self.lora_A.dtype), full_matrices=False)
        nn.init.zeros_(self.lora_R)
        self.lora_A.copy_(Vh[: self.rank].reshape(self.lora_A.shape))
        self.lora_B.copy_((U[:, : self.rank] * S[: self.rank]).reshape(self.lora_B.shape))

    def update_factors(self) -> tuple[Tensor, Tensor]:
        return (self.lora_R @ self.lora_A.flatten(1)).view(self.lora_A.shape), self.lora_B

    def exported(self) -> Exported:
        return replace(super().exported(), config=replace(self.lora_config, variant="plain"))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_variant("lora_xs")(LoRAXS)
    yield
    del VARIANTS["lora_xs"]


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


def test_groups_are_refused_by_its_own_check() -> None:
    with pytest.raises(ValueError, match=r"'0' .*variant='lora_xs' mixes all rows of A, and here they belong to groups"):
        filled("conv2d-groups")
