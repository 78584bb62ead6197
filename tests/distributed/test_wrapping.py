"""Plain torch, no Lightning: LoRA before and after every wrapper, against one process."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel as DDP

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, merge_lora, unload_lora
from lightning_lora.layers import lora_layers
from lightning_lora.utils.gradient_reducer import GradientReducer
from tests.distributed.nets import CONFIG, clean, fill_adapters, make_data, make_net, reference, same_on_all_ranks, train
from tests.distributed.wrappers import BOTH, WRAPPERS, check_merge, check_training, fsdp1, wrapped_and_adapted


@pytest.mark.parametrize(
    ("name", "order"),
    [*BOTH, ("fsdp2 used", "after"), ("fsdp2 linears", "before"), ("fsdp2 linears", "after")],
)
def test_trains_as_one_process_does(pool: Any, name: str, order: str) -> None:
    for errors in pool.run(check_training, name, order):
        assert errors["gradient"] < 1e-6 and errors["adapter"] < 1e-6, errors


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["2d", "fsdp1 hybrid"])
def test_trains_on_two_dimensions(pool4: Any, name: str, order: str) -> None:
    for errors in pool4.run(check_training, name, order):
        assert errors["gradient"] < 1e-6 and errors["adapter"] < 1e-6, errors


def reduced() -> list[torch.Tensor]:
    """Gradients in float64, after a backward pass that raised."""

    class Raising(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError

    ours, theirs = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    GradientReducer([ours], [None])
    loss = Raising.apply(theirs).sum()
    with pytest.raises(ArithmeticError):
        (loss + ours.sum()).backward()
    assert ours.grad is not None
    ours.grad = None
    (ours * (dist.get_rank() + 1e-12)).sum().backward()
    mean = torch.full_like(ours, sum(range(dist.get_world_size())) / dist.get_world_size() + 1e-12)
    return [ours.grad, mean.detach()]


def test_gradients_are_averaged_exactly_and_after_an_error(pool: Any) -> None:
    for mine, wanted in pool.run(reduced):
        torch.testing.assert_close(mine, wanted, rtol=1e-15, atol=0)


def count(name: str, order: str | None) -> dict[str, int]:
    wrap = WRAPPERS[name][0]
    model = wrap(make_net()) if order is None else wrapped_and_adapted(name, order)[0]
    x = make_data()[0][:4]
    model(x).sum().backward()
    with CommDebugMode() as mode:
        model(x).sum().backward()
    counts: dict[str, int] = {}
    for operation, number in mode.get_comm_counts().items():
        counts[str(operation).split(".")[-1]] = counts.get(str(operation).split(".")[-1], 0) + number
    return counts


def test_fsdp2_collectives(pool: Any) -> None:
    plain, before, after = (pool.run(count, "fsdp2", order)[0] for order in (None, "before", "after"))
    gathers = lambda counts: sum(n for name, n in counts.items() if "all_gather" in name or "allgather" in name)  # noqa: E731
    others = lambda counts: sum(counts.values()) - gathers(counts)  # noqa: E731
    assert gathers(before) == gathers(plain) and others(before) <= others(plain), (plain, before)
    assert gathers(after) == gathers(plain) and others(after) <= 1, (plain, after)


@pytest.mark.parametrize(
    ("name", "order"),
    BOTH,
)
def test_merge_and_unmerge(pool: Any, name: str, order: str) -> None:
    for result in pool.run(check_merge, name, order):
        assert result["difference"] < 1e-5 and result["exact"] < 1e-6 and result["back"], result


def unload_and_apply_again(name: str, order: str) -> dict[str, Any]:
    model, rank, world = wrapped_and_adapted(name, order)
    train(model, 1, rank, world)  # wrappers know by now what they hold
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    dropped = [weakref.ref(parameter) for parameter in get_lora_parameters(model)]
    unload_lora(model)
    if "fsdp1" not in name:  # which does not forget what it ignores
        gc.collect()
        assert not any(parameter() is not None for parameter in dropped)
        model.load_state_dict(model.state_dict())
    assert all(isinstance(module, FSDPModule) for module in units)
    x = make_data()[0]
    with torch.no_grad():
        base, out = make_net()(x), model(x)
        names = [n for n, _ in model.named_parameters() if "lora_" in n]
    apply_lora(model, config=CONFIG)
    fill_adapters(model)
    grads, adapters = train(model, 3, rank, world)
    wanted_grads, wanted = reference()
    assert grads.keys() == wanted_grads.keys() and same_on_all_ranks(adapters)
    errors = [(out - base).abs().max().item(), *((adapters[n] - wanted[n]).abs().max().item() for n in wanted)]
    return {"left": names, "error": max(errors)}


@pytest.mark.parametrize(("name", "order"), [*BOTH[1:], ("fsdp2 linears", "before"), ("fsdp2 linears", "after")])
def test_unloaded_adapters_stay_away_and_new_ones_train(pool: Any, name: str, order: str) -> None:
    """FSDP2 registers the parameters that it lists at every forward pass."""
    for result in pool.run(unload_and_apply_again, name, order):
        assert result["left"] == [] and result["error"] < 1e-5, result


def refuse_flattened(merged: bool) -> str:
    model = FSDP(apply_lora(make_net(), config=CONFIG), use_orig_params=True, device_id=torch.device("cpu"))
    if merged:
        merge_lora(model)
    with pytest.raises(ValueError, match=r"FSDP1 flattened lora_A .* ignored_states=replicated_parameters") as error:
        unload_lora(model, merged="drop" if merged else None)
    assert len(get_lora_parameters(model)) == 16
    assert all(layer.merged is merged for _, layer in lora_layers(model))
    return str(error.value)


@pytest.mark.parametrize("merged", [False, True])
def test_unloading_what_fsdp1_flattened_is_refused(pool: Any, merged: bool) -> None:
    assert len(set(pool.run(refuse_flattened, merged))) == 1


def refuse_emptied(order: str) -> str:
    """The base's parameters are none of FSDP2's."""
    model = make_net() if order == "after" else apply_lora(make_net(), config=CONFIG)
    base = {parameter for name, parameter in model.named_parameters() if "lora_" not in name}
    for layer in model.layers:
        fully_shard(layer, ignored_params=base)
    adapters = len(get_lora_parameters(model))
    with pytest.raises(ValueError, match="FSDP2 shards nothing") as error:
        apply_lora(model, config=CONFIG) if order == "after" else unload_lora(model)
    assert len(get_lora_parameters(model)) == adapters
    model(make_data()[0])
    return str(error.value)


@pytest.mark.parametrize(("order", "where"), [("before", "'layers.0'"), ("after", "'layers.0.q'")])
def test_units_that_are_left_with_nothing_are_refused(pool: Any, order: str, where: str) -> None:
    assert all(message.startswith(where) for message in pool.run(refuse_emptied, order))


class Headed(nn.Module):
    """Blocks and, in the root unit, a layer that keeps its weights from a forward pass to the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.out = make_net(), nn.LazyLinear(4)
        self.out(self.net(make_data()[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.net(x))


def adapted_between_passes(grad: bool) -> dict[str, tuple[bool, bool]]:
    """What trains after LoRA came to a model that FSDP2 had already run, and what has a gradient."""
    model = Headed()
    for layer in model.net.layers:
        fully_shard(layer)
    fully_shard(model)
    with nullcontext() if grad else torch.no_grad():
        model(make_data()[0])  # without a backward pass: the root stays gathered
    apply_lora(model, config=CONFIG)
    model(make_data()[0]).square().sum().backward()
    return {clean(name): (p.requires_grad, p.grad is not None) for name, p in model.named_parameters()}


@pytest.mark.parametrize("grad", [True, False])
def test_what_fsdp2_keeps_gathered_is_frozen_too(pool: Any, grad: bool) -> None:
    for found in pool.run(adapted_between_passes, grad):
        assert found["out.weight"] == found["out.bias"] == (False, False)
        assert found == {name: ("lora_" in name, "lora_" in name) for name in found}


def refuse_ddp() -> str:
    model = DDP(make_net())
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="DistributedDataParallel") as error:
        apply_lora(model, config=CONFIG)
    assert [p.requires_grad for p in model.parameters()] == flags and not list(get_lora_parameters(model))
    return str(error.value)


def test_after_ddp_is_refused(pool: Any) -> None:
    assert "before wrapping" in pool.run(refuse_ddp)[0]


def trainable_elements() -> tuple[int, int]:
    model = wrapped_and_adapted("fsdp1", "before")[0]
    flat = sum(module._handle.flat_param.numel() for module in FSDP.fsdp_modules(model) if module._handle.flat_param.requires_grad)
    return flat + sum(p.numel() for p in get_lora_parameters(model)), sum(p.numel() for p in get_lora_parameters(model))


def test_fsdp1_gradients_are_the_adapters_only(pool: Any) -> None:
    for trains, adapters in pool.run(trainable_elements):
        assert trains == adapters


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


def refuse_to_untie(name: str) -> str:
    model = apply_lora(Tied(), LoRAConfig(rank=2, target_modules=["head"]))
    model = fsdp1(model) if name == "fsdp1" else fully_shard(model)
    if name == "fsdp2 used":
        model(torch.tensor([1]))  # FSDP2 keeps the root's weights gathered then
    with pytest.raises(ValueError, match=r"head.weight is tied to .*embed.weight, and its wrapper .* in a single process") as error:
        merge_lora(model, untie=True)
    assert not any(layer.merged or layer.lora_state.shares_weight for _, layer in lora_layers(model))
    return str(error.value)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2 used", "fsdp1"])
def test_a_tied_weight_that_a_wrapper_holds_is_not_untied(pool: Any, name: str) -> None:
    assert len(set(pool.run(refuse_to_untie, name))) == 1
