"""Rows of a tied embedding that train: every strategy against one process, resumed where the base's rows are others, merged at the end."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from lightning_lora import LoRAConfig, apply_lora, merge_lora, unmerge_lora
from lightning_lora.strategies.fsdp2 import tensor_parallel
from lightning_lora.utils.sharding import full_tensor
from tests.distributed.nets import Block
from tests.distributed.runs import STRATEGIES, LitFSDP2, LitShared, run
from tests.distributed.wrappers import fsdp2

ROWS = [17, 3, 18]
CONFIG = LoRAConfig(rank=2, alpha=4, target_modules=["q", "v"], trainable_token_indices=ROWS)


class TokenNet(nn.Module):
    """19 rows: uneven on two processes. The last two are new, and random in each run."""

    def __init__(self, new: float = 0.0) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(19, 16), nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 19, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            self.embed.weight.mul_(0.3)
            self.embed.weight[17:] += new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed((x.abs() * 12).long().clamp(max=18))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def make(new: float = 0.0) -> TokenNet:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return TokenNet(new)


class LitTokens(LitShared):
    new = 0.0

    def __init__(self, late: bool = False) -> None:
        super().__init__(late=True)
        self.net = make(self.new)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        ids = (batch[0].abs() * 12).long().clamp(max=18)
        return self.noted(F.cross_entropy(self.net(batch[0])[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", self.training_step(batch, batch_idx), sync_dist=True)


class LitTokensFSDP2(LitTokens, LitFSDP2):
    pass


def fit(name: str, folder: str, new: float = 0.0, **how: Any) -> dict[str, Any]:
    module = LitTokensFSDP2 if name.startswith("fsdp2") else LitTokens
    with patch.dict(STRATEGIES, {name: (STRATEGIES[name][0], module)}), patch.object(LitTokens, "new", new):
        return run(name, folder, config=CONFIG, **how)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fit("single", str(tmp_path_factory.mktemp("alone")), save=True, merge=True)


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)


def test_one_process(alone: dict[str, Any]) -> None:
    """Only the rows train and are saved, with one moment for both uses of the weight; the merge writes them and nothing else."""
    assert alone["saved"]["names"] == alone["trained"] == sorted(alone["moments"]) == sorted(alone["adapters"])
    rows, weight, base = alone["adapters"]["net.embed.lora_rows"], alone["base"]["net.embed.weight"], make().embed.weight
    assert torch.equal(weight[ROWS], rows)
    others = [row for row in range(19) if row not in ROWS]
    assert torch.equal(weight[others], base[others])
    assert not torch.isclose(rows, base[ROWS]).all(1).any()


@pytest.mark.parametrize("name", ["ddp", "lora_fsdp2", "lora_fsdp2 pulled", "fsdp2 full", "fsdp2 DCP", "fsdp full"])
def test_every_strategy_trains_what_one_process_trains(name: str, pool: Any, alone: dict[str, Any], tmp_path: Path) -> None:
    for result in pool.run(fit, name, str(tmp_path), 0.0):
        torch.testing.assert_close(result["losses"], alone["losses"], rtol=1e-5, atol=1e-6)
        close(result["adapters"], alone["adapters"])
        assert result["trained"] == alone["trained"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(("first", "second"), [("lora_fsdp2", "single"), ("single", "lora_fsdp2"), ("ddp", "fsdp2 full")])
def test_a_run_goes_on_elsewhere_on_a_base_with_other_new_rows(
    first: str, second: str, pool: Any, alone: dict[str, Any], tmp_path: Path
) -> None:
    def go(name: str, new: float, **how: Any) -> dict[str, Any]:
        args = (name, str(tmp_path), new)
        return fit(*args, **how) if name == "single" else pool.run(partial(fit, **how), *args)[0]

    go(first, 5.0, epochs=1, save=True)
    result = go(second, -3.0, epochs=2, ckpt=str(tmp_path / "last.ckpt"), merge=True)
    # Rows 17 and 18 start at 5 here, so only the second epoch of a run that starts so is the reference.
    whole = fit("single", str(tmp_path / "whole"), 5.0, epochs=2, merge=True)
    torch.testing.assert_close(result["losses"], whole["losses"][len(whole["losses"]) // 2 :], rtol=1e-4, atol=1e-5)
    close(result["adapters"], whole["adapters"])
    torch.testing.assert_close(result["base"]["net.embed.weight"], whole["base"]["net.embed.weight"], rtol=1e-4, atol=1e-5)


def after_sharding() -> tuple[float, bool]:
    x = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    alone, model = apply_lora(make(), config=CONFIG), apply_lora(fsdp2(make()), config=CONFIG)
    base = full_tensor(model.embed.weight).clone()
    for each in (alone, model):
        each.embed.lora_rows.data += 1
        each(x.chunk(dist.get_world_size())[dist.get_rank()] if each is model else x).square().mean().backward()
    difference = (full_tensor(model.embed.lora_rows.grad) - alone.embed.lora_rows.grad).abs().max().item()
    with torch.no_grad():
        wanted = alone(x)
        merge_lora(model)
        difference = max(difference, (model(x) - wanted).abs().max().item())
        unmerge_lora(model)
    return difference, torch.equal(full_tensor(model.embed.weight), base)


def test_a_model_that_is_sharded_already(pool: Any) -> None:
    for difference, back in pool.run(after_sharding):
        assert difference < 1e-5 and back


def refused() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = parallelize_module(make(), mesh, {"embed": RowwiseParallel(input_layouts=torch.distributed.tensor.Replicate())})
    with pytest.raises(ValueError, match=r"'embed'.*on a tensor-parallel base .*is not supported"):
        apply_lora(model, config=CONFIG)
    assert not any("lora_" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match=r"tensor_parallel_size > 1: 'embed' has rows that train"):
        tensor_parallel(apply_lora(make(), config=CONFIG), mesh)


def test_a_split_embedding_is_refused(pool: Any) -> None:
    pool.run(refused)
