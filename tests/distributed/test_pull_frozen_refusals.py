"""What ``pull_frozen`` cannot share is refused at the start."""

from __future__ import annotations

import re
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_lora import apply_lora
from lightning_lora.experimental import pulling_group
from lightning_lora.strategies import LoRAFSDP2Strategy
from lightning_lora.strategies.fsdp2 import shard_blocks
from tests.distributed.nets import CONFIG, make_data, make_net
from tests.distributed.pulled import group_of, sharded


def refuse_to_share() -> list[str]:
    """A failure is the same at every attempt, and changes nothing."""
    model, found = sharded(), []
    with patch.object(pulling_group, "shared_memory", side_effect=RuntimeError("no room")):
        for _ in range(3):
            with pytest.raises(RuntimeError) as error:
                model(make_data()[0])
            found.append(str(error.value))
    for param in group_of(model).fsdp_params:
        param.param_dtype = torch.bfloat16
    with pytest.raises(ValueError, match=r"pull_frozen: embed\.weight is a Tensor that FSDP2 converts"):
        model(make_data()[0])
    return found


def test_what_cannot_be_shared_is_an_error(pool: Any) -> None:
    assert pool.run(refuse_to_share) == [["no room"] * 3] * 2


def refused() -> str:
    model = nn.ModuleDict({"net": make_net()})
    with pytest.raises(ValueError, match=r"nothing in 'net\.layers\.0' is frozen: apply LoRA") as error:
        shard_blocks(model, init_device_mesh("cpu", (dist.get_world_size(),)), pull_frozen=True)
    return str(error.value)


def test_nothing_frozen_is_refused(pool: Any) -> None:
    assert all(pool.run(refused))


@pytest.mark.parametrize("version", ["2.12.1", "2.15.0+cu130", "3.0.0"])
def test_a_torch_that_it_was_not_tested_with_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    told = rf"tested with torch 2\.11, 2\.13, 2\.14; this is torch {re.escape(version)}\. Leave it out"
    with pytest.raises(ValueError, match=told):
        LoRAFSDP2Strategy(pull_frozen=True)
    with pytest.raises(ValueError, match=told):
        shard_blocks(nn.ModuleDict({"net": apply_lora(make_net(), config=CONFIG)}), None, pull_frozen=True)  # type: ignore[arg-type]
    LoRAFSDP2Strategy()


def test_several_hosts_are_refused() -> None:
    strategy = LoRAFSDP2Strategy(pull_frozen=True)
    strategy.num_nodes = 2
    with pytest.raises(ValueError, match=r"pull_frozen=True reads other GPUs' memory, within one host; num_nodes is 2"):
        strategy.setup_environment()


def shard_twice() -> str:
    module = nn.Module()
    module.net = apply_lora(make_net(), config=CONFIG)
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    shard_blocks(module, mesh["data_parallel"])
    strategy = LoRAFSDP2Strategy(pull_frozen=True)
    strategy._lightning_module, strategy._device_mesh = module, mesh  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"reshard_after_forward=True, pull_frozen=True: Module is sharded already") as error:
        strategy.setup(None)  # type: ignore[arg-type]
    return str(error.value)


def test_options_for_a_model_that_is_sharded_already_are_refused(pool: Any) -> None:
    assert all(pool.run(shard_twice))
