"""What the gated MLP's kernels do at each rank, and their tiles.

Up to rank 32 the adapters' updates and sums are done while the big tensors are in registers. Those hold no wider sums: up to 64 the sums
are products of the library that follow. Above, updates take longer inside than beside the pass, which is elementwise then. The library's
sums run near the memory's speed at small ranks and near the matrix units' at wide ones, but each reads a big tensor again.
"""

from __future__ import annotations

from typing import NamedTuple

from lightning_lora.ops.triton_low_rank import Tiles


class Plan(NamedTuple):
    """What the kernels do at a rank, apart from the elementwise pass.

    Attributes:
        BR: a power of two that holds the rank; 16, the least that a tensor core takes, if the kernels multiply nothing.
        updates: they compute the updates.
        sums: they compute the sums.
    """

    BR: int
    updates: bool
    sums: bool

    @property
    def options(self) -> dict[str, int]:
        """Return the keyword arguments of a launch."""
        return {"BR": self.BR, "UPDATES": self.updates, "SUMS": self.sums}


PLANS = {16: Plan(16, True, True), 32: Plan(32, True, True), 64: Plan(64, True, False)}  # by the largest rank
WIDE = Plan(16, False, False)  # of ranks above

# By kernel and rank. Those without dropout and scales are the fastest of a search on an H200 (benchmarks/README.md, "Every rank"), and so
# are all of rank 16. Drawing random numbers or applying scales leaves fewer registers for prefetched data.
TILES = {
    "forward, 16": Tiles(64, 128, num_stages=2),
    "forward, 16, dropping": Tiles(64, 64, num_stages=3),
    "forward, 16, scaled": Tiles(64, 128, num_stages=2),
    "forward, 32": Tiles(64, 128, num_stages=2),
    "forward, 32, dropping": Tiles(64, 64, num_stages=3),
    "forward, 32, scaled": Tiles(64, 128, num_stages=2),
    "forward, 64": Tiles(64, 64, num_stages=3),
    "forward, 64, dropping": Tiles(64, 64, num_stages=2),
    "forward, 64, scaled": Tiles(64, 64, num_stages=2),
    "forward, wide": Tiles(16, 256, num_stages=1),
    "backward, 16": Tiles(64, 64, num_stages=3),
    "backward, 16, dropping": Tiles(64, 64, num_stages=2),
    "backward, 16, scaled": Tiles(64, 64, num_stages=2),
    "backward, 32": Tiles(64, 32, num_stages=3),
    "backward, 32, dropping": Tiles(64, 64, num_stages=2),
    "backward, 32, scaled": Tiles(64, 64, num_stages=2),
    "backward, 64": Tiles(32, 64, num_stages=3),
    "backward, 64, dropping": Tiles(32, 64, num_stages=2),
    "backward, 64, scaled": Tiles(32, 64, num_stages=2),
    "backward, wide": Tiles(16, 256, num_stages=1),
}


def plan_of(rank: int) -> Plan:
    """Return the plan for adapters of at most this rank."""
    return next((plan for most, plan in PLANS.items() if rank <= most), WIDE)


def tiles_name(kernel: str, plan: Plan, drop: bool, scaled_sum: bool = False) -> str:
    """Return a kernel's name in the table of tiles."""
    if plan is WIDE:
        return f"{kernel}, wide"
    return f"{kernel}, {plan.BR}" + (", dropping" if drop else ", scaled" if scaled_sum else "")


def tiles_of(kernel: str, plan: Plan, drop: bool, scaled_sum: bool = False) -> Tiles:
    """Return the table's tiles."""
    return TILES[tiles_name(kernel, plan, drop, scaled_sum)]
