"""``pull_frozen``: what is frozen is read from the other ranks' memory, as FSDP2 would have gathered it, whatever happens to it."""

from __future__ import annotations

import re
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from lightning_lora import LoRAConfig, apply_lora, merge_lora, unload_lora
from lightning_lora.experimental import pulling_group
from lightning_lora.experimental.pull_frozen import average, release
from lightning_lora.experimental.pulling_group import PullingGroup
from lightning_lora.strategies import LoRAFSDP2Strategy
from lightning_lora.strategies.fsdp2 import shard_blocks
from lightning_lora.utils.sharding import full_tensor, local_shard, local_tensor, reshard
from tests.distributed.nets import CONFIG, Block, Net, fill_adapters, make_data, make_net, train
from tests.distributed.pool import Pool
from tests.distributed.test_wrapping import fsdp2_pulled, tensor_parallel


def sharded(config: LoRAConfig = CONFIG, make: Any = make_net) -> Any:
    model = fsdp2_pulled(apply_lora(make(), config=config))
    fill_adapters(model)
    return model


def alone(config: LoRAConfig = CONFIG, make: Any = make_net) -> Any:
    model = apply_lora(make(), config=config)
    fill_adapters(model)
    return model


def group_of(unit: Any) -> PullingGroup:
    group = unit._get_fsdp_state()._fsdp_param_group
    assert type(group) is PullingGroup
    return group


def resident(unit: Any) -> set[str]:
    """The sizes of the parameters that are unsharded in memory."""
    full = [p for p in group_of(unit).fsdp_params if any(t.untyped_storage().size() for t in p.all_gather_outputs)]
    return {"large" if p.all_gather_outputs[0].nbytes >= pulling_group.SMALL else "small" for p in full}


def step(model: nn.Module) -> torch.Tensor:
    x, y = (part.chunk(dist.get_world_size())[dist.get_rank()] for part in make_data())
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def traffic() -> dict[str, int]:
    model = sharded()
    step(model)
    with CommDebugMode() as mode:
        step(model)
    return {str(operation).split(".")[-1]: count for operation, count in mode.get_comm_counts().items()}


def test_a_step_gathers_nothing(pool: Any) -> None:
    for counts in pool.run(traffic):
        assert counts == {"allreduce_": 3}  # a barrier before and after the forward pass, and the gradients


def memory() -> list[set[str]]:
    model, found = sharded(), []
    shards = [parameter for name, parameter in model.named_parameters() if "lora_" not in name]
    assert all(isinstance(shard, DTensor) for shard in shards)
    model.layers[0].fc2.register_forward_hook(lambda *_: found.append(resident(model.layers[0])))
    step(model)
    found += [resident(model.layers[0]), resident(model)]
    assert [p for name, p in model.named_parameters() if "lora_" not in name] == shards  # between steps the model shows its shards
    reshard(model)
    return [*found, resident(model.layers[0]), resident(model)]


def test_what_is_resident_when(pool: Any) -> None:
    for in_forward, block, outside, *freed in pool.run(memory):
        assert in_forward == outside == {"small", "large"}
        assert block == {"small"}
        assert freed == [set(), set()]


def writes(how: str) -> list[list[float]]:
    """Losses of a model whose frozen weights are written to between steps, and those of one process."""
    return [losses(model, how, [False, True, how == "merged"]) for model in (sharded(), alone())]


def losses(model: nn.Module, how: str, inference: list[bool], skips: tuple[set[int], ...] = ()) -> list[float]:
    """Of the global batch, pass after pass; after each the frozen weights are written to."""
    spread = hasattr(model, "unshard")
    rank, world = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
    x, y = (part.chunk(world)[rank] for part in make_data())
    found = []
    for index, without_gradient in enumerate(inference):
        if skips:
            model.skip = skips[index]
        trains = not without_gradient and any(p.requires_grad for p in model.parameters())
        with torch.set_grad_enabled(trains):
            loss = F.cross_entropy(model(x), y)
        if trains:
            loss.backward()
        shared = loss.detach().clone()
        if spread:
            dist.all_reduce(shared)
        found.append(shared.item() / world)
        change(model, how, index)
    return found


@torch.no_grad()
def change(model: nn.Module, how: str, seed: int) -> None:
    reference = make_net().state_dict()
    values = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed + i)) * 0.3
        for i, (name, tensor) in enumerate(reference.items())
    }
    if how == "merged":
        if seed == 1:
            merge_lora(model)
        return
    if how == "loaded":  # FSDP2 has its hooks there
        mine = {
            name: DTensor.from_local(local_shard(values[name], p), p.device_mesh, p.placements) if isinstance(p, DTensor) else values[name]
            for name, p in model.state_dict().items()
            if name in values
        }
        model.load_state_dict(mine, strict=False, assign=seed == 1)
        return
    for name, parameter in model.named_parameters():
        if name in values:
            shard = local_shard(values[name], parameter)
            if how == "assigned" and isinstance(parameter, DTensor):
                parameter.copy_(DTensor.from_local(shard, parameter.device_mesh, parameter.placements))
            else:
                local_tensor(parameter).copy_(shard)


@pytest.mark.parametrize("how", ["written", "assigned", "loaded", "merged"])
def test_what_is_written_is_what_others_read(pool: Any, how: str) -> None:
    for mine, wanted in pool.run(writes, how):
        assert mine == pytest.approx(wanted, abs=1e-6)
        assert how == "merged" or len({round(loss, 4) for loss in wanted}) == 3


class Wide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.layers, self.head = nn.Linear(8, width), nn.ModuleList(Block(width) for _ in range(5)), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def with_and_without(device: str) -> list[tuple[list[torch.Tensor], dict[str, torch.Tensor]]]:
    """Losses and adapters of FSDP2 as it is and of one that pulls; frozen weights are written to between the steps."""
    found = []
    rank, world = dist.get_rank(), dist.get_world_size()
    rows, width = (16, 32) if device == "cpu" else (4096, 1024)  # a block takes a GPU longer than its launch
    x, y = (part.chunk(world)[rank].to(device) for part in make_data(rows * world))
    for pulls in (False, True):
        torch.manual_seed(5)
        model = apply_lora(Wide(width), config=CONFIG)
        fill_adapters(model)
        mesh = init_device_mesh(device, (world,))
        shard_blocks(nn.ModuleDict({"net": model}), mesh, pull_frozen=pulls)
        model.to(device)
        if pulls:
            average(model, mesh.get_group())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for _ in range(6):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            with torch.no_grad():
                for parameter in model.parameters():
                    if not parameter.requires_grad:
                        local_tensor(parameter).mul_(1.01)
        found.append((losses, {name: full_tensor(p.detach()).cpu() for name, p in model.named_parameters() if p.requires_grad}))
    return found


def test_trains_as_fsdp2_does(pool: Any) -> None:
    for plain, pulled in pool.run(with_and_without, "cpu"):
        torch.testing.assert_close(pulled, plain, rtol=0, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs that reach each other's memory")
def test_trains_as_fsdp2_does_on_gpus() -> None:
    gpus = Pool(2, "cuda")
    try:
        for plain, pulled in gpus.run(with_and_without, "cuda"):
            torch.testing.assert_close(pulled, plain, rtol=1e-5, atol=1e-5)
    finally:
        gpus.close()


class Skipping(nn.Module):
    """Which blocks run, and in which order, is not what their list says."""

    skip: frozenset[int] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.late = nn.ModuleList(Block() for _ in range(2))
            self.embed, self.layers, self.head = nn.Linear(8, 16), nn.ModuleList(Block() for _ in range(4)), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for index, layer in enumerate([*self.layers, *self.late]):
            x = x if index in self.skip else layer(x)
        return self.head(x)


SKIPS: dict[str, tuple[tuple[set[int], ...], list[bool]]] = {
    "none": ((set(),) * 4, [True] * 4),
    "asked for, not used": ((set(), {2}, set(), {0, 1}, set()), [False, True, True, False, False]),
    "never asked for": ((set(), {1, 2, 3}, set(), set()), [False] * 4),
}


def skipping(which: str) -> list[list[float]]:
    skips, inference = SKIPS[which]
    return [losses(model, "written", inference, skips) for model in (sharded(make=Skipping), alone(make=Skipping))]


@pytest.mark.parametrize("which", SKIPS)
def test_blocks_that_do_not_run(pool: Any, which: str) -> None:
    for mine, wanted in pool.run(skipping, which):
        assert mine == pytest.approx(wanted, abs=1e-6)


def save_and_skip() -> set[str]:
    model = sharded(make=Skipping)
    step(model)
    model.state_dict()  # frees what stayed
    for skip in ({1, 2, 3}, set()):
        model.skip = skip
        step(model)
    model.skip = {2}
    with torch.no_grad():
        model(make_data()[0])
    return resident(model.layers[2])


def test_nothing_waits_for_a_later_pass(pool: Any) -> None:
    assert pool.run(save_and_skip) == [set(), set()]


def most_resident(checkpointing: str | None) -> int:
    """How many blocks are whole at once."""
    Net.checkpointing = checkpointing
    model = fsdp2_pulled(apply_lora(type("Deep", (Net,), {"__init__": deep})(), config=CONFIG))
    most = 0

    def look(*_: Any) -> None:
        nonlocal most
        most = max(most, sum("large" in resident(layer) for layer in model.layers))

    for layer in model.layers:
        layer.fc2.register_forward_hook(look)
        layer.fc2.register_full_backward_hook(look)
    for _ in range(2):
        step(model)
    assert not any("large" in resident(layer) for layer in model.layers)
    return most


def deep(self: Any) -> None:
    nn.Module.__init__(self)
    self.embed, self.layers, self.head = nn.Linear(8, 16), nn.ModuleList(Block() for _ in range(6)), nn.Linear(16, 4)


@pytest.mark.parametrize("checkpointing", [None, "non-reentrant", "reentrant"])
def test_two_blocks_at_a_time(pool: Any, checkpointing: str | None) -> None:
    assert pool.run(most_resident, checkpointing) == [2, 2]


class Tied(Net):
    """What is embedded is what is predicted, by one weight that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)
        self.embed.weight = nn.Parameter(torch.randn(16, 8, generator=torch.Generator().manual_seed(2)))
        self.out = nn.Linear(8, 16, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) @ self.out(torch.eye(8, device=x.device)[:4]).T[:8]


def tied() -> tuple[Any, Any]:
    both = []
    for wrapped in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model: Any = apply_lora(Tied(), config=CONFIG)
        model.embed.weight.requires_grad_()
        model = fsdp2_pulled(model) if wrapped else model
        fill_adapters(model)
        rank, world = (dist.get_rank(), dist.get_world_size()) if wrapped else (0, 1)
        train(model, 3, rank, world)
        both.append({name: full_tensor(p).detach().clone() for name, p in model.named_parameters()})
    return both[0], both[1]


def test_a_tied_weight_that_trains(pool: Any) -> None:
    for mine, wanted in pool.run(tied):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-6)


def unloaded() -> list[str]:
    model = sharded(LoRAConfig(rank=4, target_modules=["q", "fc1"], variant="lora_fa"))
    step(model)
    unload_lora(model)
    with torch.no_grad():
        model(make_data()[0])
    return [name for name, _ in model.named_parameters() if "lora_" in name]


def test_unloaded_adapters_stay_away(pool: Any) -> None:
    assert pool.run(unloaded) == [[], []]


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
    with pytest.raises(ValueError, match=r"pull_frozen=True, but embed\.weight is a Tensor that FSDP2 converts"):
        model(make_data()[0])
    return found


def test_what_cannot_be_shared_is_an_error(pool: Any) -> None:
    assert pool.run(refuse_to_share) == [["no room"] * 3] * 2


def moved(releases: bool) -> tuple[list[bool], list[torch.Tensor]]:
    """Losses of a model that is put elsewhere and written to there, as Lightning does after ``fit``, and of one that is not moved."""
    losses, gone = [], [True]
    for moves in (True, False):
        model = sharded()
        step(model)
        if moves:
            reshard(model)
            model._apply(torch.clone)
            if releases:
                release(model)
                gone = [group_of(unit).sources is None and not resident(unit) for unit in (model, *model.layers)]
                model._apply(torch.clone)
        change(model, "written", 0)
        losses.append(step(model))
    return gone, losses


@pytest.mark.parametrize("releases", [True, False])
def test_a_model_that_moves_is_shared_anew(pool: Any, releases: bool) -> None:
    for gone, (mine, wanted) in pool.run(moved, releases):
        assert all(gone) and mine == wanted


def inference_first() -> tuple[Any, Any]:
    model = sharded()
    with torch.inference_mode():
        model(make_data()[0])
    return train(model, 2, dist.get_rank(), dist.get_world_size())[1], train(alone(), 2)[1]


def test_training_after_inference(pool: Any) -> None:
    for mine, wanted in pool.run(inference_first):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-6)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 5), nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Uneven(nn.Module):
    """Widths that two ranks do not share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers, self.head = nn.Linear(8, 7), nn.Sequential(*(Odd() for _ in range(3))), nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embed(x)))


def make_uneven() -> Uneven:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Uneven()


UNEVEN = LoRAConfig(rank=2, target_modules=["up", "down"], modules_to_save=["head"])


def uneven() -> tuple[Any, Any, list[bool]]:
    model, other = sharded(UNEVEN, make_uneven), alone(UNEVEN, make_uneven)
    train(model, 3, dist.get_rank(), dist.get_world_size())
    train(other, 3)
    found, wanted = ({name: full_tensor(p).detach().clone() for name, p in each.named_parameters()} for each in (model, other))
    return found, wanted, [param.sharded_param.requires_grad for param in group_of(model)._gathered]


def test_uneven_pieces_and_a_head_that_trains(pool: Any) -> None:
    for mine, wanted, gathered in pool.run(uneven):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-6)
        assert gathered == [True, True]  # the head's weight and bias


def test_two_dimensions(pool4: Any) -> None:
    for mine, wanted in pool4.run(over_tensor_parallel):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-6)


def over_tensor_parallel() -> tuple[Any, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = tensor_parallel(apply_lora(make_net(), config=CONFIG), mesh["tp"])
    shard_blocks(nn.ModuleDict({"net": model}), mesh["dp"], pull_frozen=True)
    average(model, mesh["dp"].get_group())
    fill_adapters(model)
    return train(model, 3, dist.get_rank() // 2, 2)[1], train(alone(), 3)[1]


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
