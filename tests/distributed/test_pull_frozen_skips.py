"""``pull_frozen`` where blocks do not run: no rank waits, and two blocks at most are resident."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import apply_lora
from tests.distributed.nets import CONFIG, Block, Net, make_data
from tests.distributed.pulled import alone, losses, resident, sharded, step
from tests.distributed.wrappers import fsdp2_pulled


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
