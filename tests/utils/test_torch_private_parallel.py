"""What happens when a private name of torch's wrappers is gone, and what they keep."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import nn

from lightning_lora.utils import torch_private_parallel


class Several(nn.Module):
    """A unit of FSDP2 over several meshes: torch 2.13 has no single group in it."""

    def _get_fsdp_state(self) -> Several:
        return self

    @property
    def _fsdp_param_group(self) -> None:
        raise AssertionError("Expected at most 1 param group for backward compatibility")


@pytest.mark.parametrize("unit", [Several(), nn.Linear(1, 1)], ids=["several", "elsewhere"])
def test_a_group_of_fsdp2_that_is_not_there_is_told(unit: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"no single parameter group in {type(unit).__name__}, .* a model that is not wrapped"):
        torch_private_parallel.fsdp2_group(unit)


def test_what_ddp_ignores_already_is_kept() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    for names in (["1.bias"], ["0.weight", "1.bias"]):
        torch_private_parallel.ddp_ignores(model, names)
    assert model._ddp_params_and_buffers_to_ignore == ["1.bias", "0.weight"]


@pytest.mark.parametrize(("version", "replaced"), [("2.11.0+cu130", True), ("2.13.0", False)])
def test_fsdp2_shards_integers_on_every_torch(version: str, replaced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch 2.11 itself `tests/distributed/test_quantized.py` trains so."""
    module = import_module("torch.distributed.fsdp._fully_shard._fsdp_param")
    monkeypatch.setattr(module, "nn", nn)
    monkeypatch.setattr(torch, "__version__", version)
    for _ in range(2):
        torch_private_parallel.let_fsdp2_shard_integers()
    assert (module.nn is not nn) == replaced and module.nn.Module is nn.Module
    if replaced:
        made = [module.nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.uint8, torch.bfloat16)]
        assert all(type(parameter) is nn.Parameter for parameter in made)
        assert [parameter.requires_grad for parameter in made] == [False, True]
        assert not module.nn.Parameter(torch.zeros(2), requires_grad=False).requires_grad
