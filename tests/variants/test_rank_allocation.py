"""The rank allocator on plain models: the schedule, the choice, the regularizer's gradient, its state. Against PEFT: tests/parity."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.layers import lora_layers
from lightning_lora.variants.rank_allocation import RankAllocator, steps_of
from tests.conftest import ConvNet, TinyModel, fill

TARGETS = ["q_proj", "v_proj", "mlp"]  # of TinyModel, six modules


def model(rank=4, **fields):
    torch.manual_seed(0)
    return fill(apply_lora(TinyModel().double(), LoRAConfig(rank=rank, target_modules=TARGETS, variant="adalora", **fields)))


def batch(seed):
    ids = torch.randint(11, (6, 5), generator=torch.Generator().manual_seed(seed))
    return ids, ids.roll(1, 1)


def loss_of(net, seed):
    ids, labels = batch(seed)
    return F.cross_entropy(net(ids).flatten(0, 1), labels.flatten())


def train(net, allocator, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, step).backward()
        allocator.regularize()
        optimizer.step()
        allocator.after_step()


def adamw(net):
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.02)


def alive(net):
    return {name: int(layer.lora_E.count_nonzero()) for name, layer in lora_layers(net)}


# The schedule.


def test_the_budget_is_the_papers_cubic():
    allocator = RankAllocator(model(), target_rank=2, total_steps=30, tinit=5, tfinal=5)
    budgets = [allocator.budget(step) for step in range(31)]
    assert budgets[:6] == [24] * 6 and budgets[25:] == [12] * 6
    # equation 12, with its b(0) = 24, b(T) = 12, t_i = 5, T − t_i − t_f = 20
    assert budgets[5:26] == [int(12 + 12 * (1 - (t - 5) / 20) ** 3) for t in range(5, 26)]
    assert budgets == sorted(budgets, reverse=True)


@pytest.mark.parametrize(("tinit", "tfinal", "deltaT"), [(0, 0, 1), (3, 4, 1), (2, 3, 4), (0, 0, 50)])
def test_the_budget_is_met_exactly(tinit, tfinal, deltaT):
    net = model()
    allocator = RankAllocator(net, target_rank=2, total_steps=14, tinit=tinit, tfinal=tfinal, deltaT=deltaT)
    optimizer = adamw(net)
    for step in range(1, 20):  # five steps longer than the schedule
        train(net, allocator, optimizer, [step])
        if step >= 14 - tfinal or (step > tinit and step % deltaT == 0):
            assert sum(alive(net).values()) == allocator.budget(step)
        if step == 14 - tfinal:
            found = alive(net)
    assert found == alive(net) and sum(found.values()) == 12  # and they stand still from there on


def test_equal_scores_do_not_break_the_budget():
    """A model where nothing has a gradient: PEFT would prune all triplets, since all lie at its threshold."""
    net = model()
    allocator = RankAllocator(net, target_rank=2, total_steps=4)
    for _ in range(4):
        allocator.after_step()
    assert sum(alive(net).values()) == 12


def test_ranks_at_the_start_may_differ():
    net = model(rank_pattern={"mlp": 6})
    allocator = RankAllocator(net, target_rank=4, total_steps=3)
    assert (allocator.start, allocator.target) == (4 * 4 + 2 * 6, 24)
    train(net, allocator, adamw(net), range(1, 4))
    assert sum(alive(net).values()) == 24


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_rank": 4}, "target_rank=4 is not below the rank at the start, 4 on average"),
        ({"tinit": 5, "tfinal": 5}, "tinit=5 and tfinal=5 leave none of the 10 optimizer steps.*never change"),
        ({"total_steps": 1, "tfinal": 1}, "leave none of the 1 optimizer steps"),
    ],
)
def test_a_schedule_that_could_not_prune_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RankAllocator(model(), **{"target_rank": 2, "total_steps": 10, **fields})


def test_a_model_without_adalora_is_refused():
    with pytest.raises(ValueError, match=r"TinyModel has no AdaLoRA layers.*variant='adalora'"):
        RankAllocator(apply_lora(TinyModel()), target_rank=2, total_steps=10)


@pytest.mark.parametrize(("value", "steps"), [(0, 0), (7, 7), (0.0, 0), (0.1, 20), (0.999, 200)])
def test_steps_may_be_a_share(value, steps):
    assert steps_of("tinit", value, 200) == steps


@pytest.mark.parametrize("value", [-1, 1.0, 1.5, -0.1, float("nan"), float("inf"), True])
def test_steps_out_of_range(value):
    with pytest.raises(ValueError, match=f"tinit={value!r}: give a whole number of optimizer steps, or a share"):
        steps_of("tinit", value, 200)


# Scores.


def test_scores_are_the_definition():
    net = model()
    allocator = RankAllocator(net, target_rank=2, total_steps=10, beta1=0.6, beta2=0.9, orth_reg_weight=0.0)
    parameters = {f"{name}.{part}": p for name, layer in lora_layers(net) for part, p in layer.lora_parameters().items()}
    mean = spread = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for step in range(3):
        net.zero_grad()
        loss_of(net, step).backward()
        now = {name: (p * p.grad).abs() for name, p in parameters.items()}
        allocator.after_step()
        mean = {name: 0.6 * mean[name] + 0.4 * now[name] for name in now}
        spread = {name: 0.9 * spread[name] + 0.1 * (now[name] - mean[name]).abs() for name in now}
    entry = {name: mean[name] * spread[name] for name in now}
    for name, layer in lora_layers(net):
        expected = [
            entry[f"{name}.lora_E"][i, 0] + entry[f"{name}.lora_A"][i].mean() + entry[f"{name}.lora_B"][:, i].mean() for i in range(4)
        ]
        torch.testing.assert_close(allocator.scores()[name], torch.stack(expected), rtol=1e-10, atol=0)
        keep = allocator.keep[name]
        assert torch.equal(layer.lora_E.flatten() != 0, keep)
    flat, kept = torch.cat(list(allocator.scores().values())), torch.cat(list(allocator.keep.values()))
    assert flat[kept].min() > flat[~kept].max()


def test_a_module_left_out_of_a_batch_has_no_sensitivity_in_it():
    net = model()
    allocator = RankAllocator(net, target_rank=2, total_steps=10)
    loss_of(net, 1).backward()
    layer = dict(lora_layers(net))["layers.0.mlp"]
    layer.lora_A.grad = layer.lora_B.grad = layer.lora_E.grad = None
    allocator.after_step()
    assert not allocator.scores()["layers.0.mlp"].any() and allocator.scores()["layers.1.mlp"].all()
    assert not layer.lora_E.any()  # the lowest of all, so pruned first


# The regularizer.


def orthogonality(net):
    """Equation 4, to be differentiated by autograd."""
    total = 0.0
    for _, layer in lora_layers(net):
        A, B = layer.lora_A.flatten(1), layer.lora_B.flatten(1)
        eye = torch.eye(layer.rank, dtype=A.dtype)
        total = total + (A @ A.T - eye).square().sum() + (B.T @ B - eye).square().sum()
    return total


@pytest.mark.parametrize("scale", [1.0, 512.0])
def test_its_gradient_is_that_of_the_papers_loss(scale):
    ours, theirs = model(), model()
    (loss_of(ours, 1) * scale).backward()
    RankAllocator(ours, target_rank=2, total_steps=10, orth_reg_weight=0.3).regularize(scale)
    ((loss_of(theirs, 1) + 0.3 * orthogonality(theirs)) * scale).backward()
    grads = [{n: p.grad for n, p in net.named_parameters() if p.requires_grad} for net in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_of_convolutions_too_and_without_a_gradient_of_the_loss():
    config = LoRAConfig(rank=4, target_modules=["conv"], variant="adalora")
    ours = fill(apply_lora(ConvNet().double(), config))
    theirs = copy.deepcopy(ours)
    RankAllocator(ours, target_rank=2, total_steps=10, orth_reg_weight=0.3).regularize()
    (0.3 * orthogonality(theirs)).backward()
    grads = [{n: p.grad for n, p in net.named_parameters() if n.endswith(("lora_A", "lora_B"))} for net in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_without_weight_it_touches_nothing():
    net = model()
    RankAllocator(net, target_rank=2, total_steps=10, orth_reg_weight=0.0).regularize()
    assert all(p.grad is None for p in net.parameters())


def test_it_makes_the_factors_orthogonal():
    net = model()
    allocator = RankAllocator(net, target_rank=2, total_steps=400, orth_reg_weight=0.1)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.02)
    before = orthogonality(net).item()
    for _ in range(200):
        optimizer.zero_grad()
        allocator.regularize()
        optimizer.step()
    assert orthogonality(net).item() < 1e-3 < 1.0 < before


# State.


@pytest.mark.parametrize("stop", [1, 4, 9, 11, 12])  # before, in and after the pruning
def test_a_copy_that_takes_up_the_state_goes_on_to_the_bit(stop):
    plan = {"target_rank": 2, "total_steps": 14, "tinit": 2, "tfinal": 3, "deltaT": 2}
    net = model()
    whole = RankAllocator(net, **plan)
    optimizer = adamw(net)
    train(net, whole, optimizer, range(1, stop + 1))
    again = copy.deepcopy(net)
    allocator, other = RankAllocator(again, **plan), adamw(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    allocator.load_state_dict(whole.state_dict())
    train(net, whole, optimizer, range(stop + 1, 17))
    train(again, allocator, other, range(stop + 1, 17))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert allocator.step == 16 and sum(alive(again).values()) == 12


def test_state_of_something_else_is_refused():
    state = RankAllocator(model(), target_rank=2, total_steps=10).state_dict()
    with pytest.raises(ValueError, match=r"total_steps=20 here, the checkpoint's schedule has 10, 0 of them done.*pass total_steps=10"):
        RankAllocator(model(), target_rank=2, total_steps=20).load_state_dict(state)
    other = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(rank=4, target_modules=["0"], variant="adalora"))
    with pytest.raises(ValueError, match="of other layers"):
        RankAllocator(other, target_rank=2, total_steps=10).load_state_dict(state)
