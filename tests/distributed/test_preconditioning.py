"""Preconditioned gradients of sharded factors, against one process: every placement in float64, and runs under the strategies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from lightning_lora import LoRAConfig, apply_lora, apply_preconditioner
from lightning_lora.optim.gram import Pair, precondition
from lightning_lora.utils.sharding import full_tensor
from tests.distributed.nets import CONFIG, adapter_tensors, fill_adapters, make_data, make_net
from tests.distributed.runs import run
from tests.distributed.test_lightning import start
from tests.distributed.wrappers import wrapped_and_adapted

# Shapes of A and B, and the rows of B of each product: a linear, two layers of a grouped convolution's shape, slices of unequal rows.
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "linear": ((3, 7), (5, 3), (5,)),
    "groups": ((6, 2, 3, 3), (10, 3, 1, 1), (5, 5)),
    "slices": ((6, 7), (9, 3), (5, 4)),
}


def pairs(shape: str, mesh: Any = None, where: Any = ((), ())) -> list[Pair]:
    """Three layers of equal shapes, with gradients; sharded as asked for A and for B."""
    generator, found = torch.Generator().manual_seed(1), []
    A_shape, B_shape, rows = SHAPES[shape]
    for _ in range(3):
        factors = []
        for sizes, placements in ((A_shape, where[0]), (B_shape, where[1])):
            value, grad = (torch.randn(sizes, generator=generator, dtype=torch.float64) for _ in range(2))
            if mesh is not None:
                value, grad = (distribute_tensor(tensor, mesh, placements, src_data_rank=None) for tensor in (value, grad))
            factors.append(nn.Parameter(value))
            factors[-1].grad = grad
        found.append(Pair(factors[0], factors[1], rows, 0.5, (True, True)))
    return found


def gradients(made: list[Pair]) -> list[torch.Tensor]:
    precondition(made, 1e-3)
    return [full_tensor(factor.grad).clone() for pair in made for factor in (pair.A, pair.B) if factor.grad is not None]


def sharded(shape: str, axes: list[tuple[int | None, ...]]) -> tuple[list[torch.Tensor], dict[str, int]]:
    """The gradients of factors cut along these axes, one entry per mesh dimension; and the collectives."""
    sizes = (2,) * len(axes[0])
    mesh = init_device_mesh("cpu", sizes)
    where = [tuple(Replicate() if axis is None else Shard(axis) for axis in own) for own in axes]
    made = pairs(shape, mesh, where)
    with CommDebugMode() as mode:
        precondition(made, 1e-3)
    counts = {str(name).split(".")[-1]: number for name, number in mode.get_comm_counts().items()}
    assert all(factor.grad is not None and factor.grad.placements == factor.placements for pair in made for factor in (pair.A, pair.B))  # type: ignore[attr-defined]
    return [full_tensor(factor.grad).clone() for pair in made for factor in (pair.A, pair.B)], counts  # type: ignore[arg-type]


@pytest.mark.parametrize("axes", [(0, 0), (1, 0), (0, 1), (1, 1), (None, 0), (None, None)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_placement_gives_the_gradients_of_one_process(pool: Any, shape: str, axes: tuple[int | None, int | None]) -> None:
    """Sizes that two ranks do not divide, a rank of three included."""
    wanted = gradients(pairs(shape))
    for mine, _ in pool.run(sharded, shape, [(axes[0],), (axes[1],)]):
        for a, b in zip(mine, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_collectives_are_few_and_small(pool: Any) -> None:
    """FSDP2 cuts both along their first axis: A and its gradient are gathered, B's Gram matrix is summed; once for all layers."""
    for _, counts in pool.run(sharded, "linear", [(0,), (0,)]):
        assert sum(counts.values()) == 3 and {name for name in counts if "gather" in name} and {name for name in counts if "reduce" in name}
    for _, counts in pool.run(sharded, "linear", [(1,), (0,)]):
        assert sum(counts.values()) == 2 and not {name for name in counts if "gather" in name}


@pytest.mark.parametrize("axes", [((0, None), (0, 0)), ((0, 1), (0, None)), ((None, 0), (None, 0))], ids=["colwise", "rowwise", "hybrid"])
def test_two_mesh_dimensions(pool4: Any, axes: Any) -> None:
    wanted = gradients(pairs("linear"))
    for mine, _ in pool4.run(sharded, "linear", list(axes)):
        for a, b in zip(mine, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def first_gradients(model: nn.Module, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    """Of a preconditioned step, as the optimizer sees them."""
    x, y = (part.chunk(world)[rank] for part in make_data())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    apply_preconditioner(optimizer, model, "riemannian", damping=1e-3)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return adapter_tensors(model, lambda p: p.grad)


def wrapped_gradients(name: str, order: str) -> dict[str, torch.Tensor]:
    return first_gradients(*wrapped_and_adapted(name, order))


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    model = apply_lora(make_net(), config=CONFIG)
    fill_adapters(model)
    return first_gradients(model)


@pytest.mark.parametrize(("name", "order"), [("ddp", "before"), ("fsdp2", "before"), ("fsdp2", "after"), ("tp", "before"), ("tp", "after")])
def test_every_wrapper_gives_the_gradients_of_one_process(pool: Any, alone: dict[str, torch.Tensor], name: str, order: str) -> None:
    for mine in pool.run(wrapped_gradients, name, order):
        assert mine.keys() == alone.keys()
        for key, gradient in alone.items():
            torch.testing.assert_close(mine[key], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item(), msg=key)


@pytest.mark.parametrize("order", ["before", "after"])
def test_fully_sharded_tensor_parallelism(pool4: Any, alone: dict[str, torch.Tensor], order: str) -> None:
    for mine in pool4.run(wrapped_gradients, "2d", order):
        for key, gradient in alone.items():
            torch.testing.assert_close(mine[key], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item(), msg=key)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run("single", str(tmp_path_factory.mktemp("single")), 2, precondition="riemannian")


@pytest.mark.parametrize("name", ["ddp", "fsdp2 after", "lora_fsdp2", "lora_fsdp2 pulled", "tp after"])
def test_strategies_train_as_one_process_does(pool: Any, single: dict[str, Any], tmp_path: Path, name: str) -> None:
    for rank in start(pool, name, str(tmp_path), 2, precondition="riemannian"):
        assert rank["losses"] == pytest.approx(single["losses"], abs=1e-3)


def test_flattened_factors_are_refused_by_name(pool: Any, tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"precondition='riemannian' needs the matrices A and B, which strategy=CPUFSDPStrategy flattens"
    ):
        start(pool, "fsdp full", str(tmp_path), 1, precondition="riemannian")


def in_experts(shared_outer: bool) -> float:
    """The largest difference of an FSDP2-sharded mixture's preconditioned gradients from a plain one's."""
    from torch.distributed.fsdp import fully_shard

    from tests.layers.experts import tiny_qwen3_moe

    found, options = [], {"experts": {"shared_outer": shared_outer}}
    for wrap in (False, True):
        config = LoRAConfig(rank=2, target_modules=["experts"], kind_options=options)
        model = apply_lora(tiny_qwen3_moe(torch.float64), config=config)
        fill_adapters(model)
        if wrap:
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        apply_preconditioner(optimizer, model, "riemannian", damping=1e-3)
        model(torch.arange(12).view(2, 6)).logits.square().mean().backward()
        optimizer.step()
        found.append(adapter_tensors(model, lambda p: p.grad))
    plain, mine = found
    return max(((mine[name] - plain[name]).abs().max() / plain[name].abs().max()).item() for name in plain)


@pytest.mark.parametrize("shared_outer", [False, True])
def test_sharded_experts(pool: Any, shared_outer: bool) -> None:
    assert all(apart < 1e-9 for apart in pool.run(in_experts, shared_outer))
