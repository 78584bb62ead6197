"""Kill one or both processes of FSDP2 fits, and resume the fits: every loss must be that of an uninterrupted run, to the bit.

``python -m tests.harness.rank_kills --kills 100 --seed 0 --folder /somewhere`` kills at random moments: half of the fits write shards,
half one file. It then kills each process before each call of a save that changes the disk.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from lightning_lora.strategies.checkpoint_io import DurableCheckpointIO, found, read
from tests.harness.ranks import WORLD, Fit, Processes

WHO = ((0,), (1,), (0, 1))  # which processes are killed, in turn


def losses(log: Path) -> list[list[str]]:
    """Return pairs of rank and step, and loss."""
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def uninterrupted(root: Path, steps: int, shards: bool, name: str = "whole") -> dict[str, str]:
    """Return the losses of a run by rank and step."""
    codes, _ = Processes(Fit(str(root / name), steps, shards, str(root / f"{name}.log"))).end()
    curve = dict(losses(root / f"{name}.log"))
    assert codes == [0] * WORLD and len(curve) == WORLD * steps
    return curve


def same_losses(log: Path, expected: dict[str, str]) -> int:
    """Compare every loss that was computed, again after a kill too. Return how many there are."""
    lines = losses(log)
    assert {step for step, _ in lines} == set(expected), f"{log}: steps are missing"
    different = [step for step, loss in lines if expected[step] != loss]
    assert not different, f"{log}: {different}"
    return len(lines)


def check_left(fit: Fit) -> None:
    """Check that a finished fit has left its checkpoint, which is whole and the last, and nothing else."""
    assert os.listdir(fit.folder) == ["last.ckpt"], os.listdir(fit.folder)
    assert step_in(fit) == fit.steps


def step_in(fit: Fit) -> int:
    """Return the step of the checkpoint that a resumed run would read."""
    return int(read(DurableCheckpointIO(), found(f"{fit.folder}/last.ckpt"))["global_step"])


def kill_at_random(root: Path, kills: int, seed: int, shards: bool, steps: int = 12) -> tuple[Counter[str], int, float]:
    """Kill processes of fits at random moments, and resume each fit from its last checkpoint until it is done.

    Returns:
        How often which processes were killed; how many losses were compared; the longest time in seconds that a process took to end after
        the other one was killed.
    """
    root.mkdir(parents=True)
    expected, begun = uninterrupted(root, steps, shards), time.perf_counter()
    assert uninterrupted(root, steps, shards, "again") == expected
    once = time.perf_counter() - begun  # of the second run: the first one waits for the server's imports
    chance, killed, compared, longest, run = random.Random(seed), Counter[str](), 0, 0.0, 0
    while killed.total() < kills:
        run += 1
        fit = Fit(str(root / f"run{run}"), steps, shards, str(root / f"run{run}.log"))
        done = False
        while not done:
            processes = Processes(fit)
            who = WHO[killed.total() % len(WHO)]
            done = killed.total() >= kills or processes.wait(chance.uniform(0, once))
            if not done:
                processes.kill(who)
                killed[" and ".join(map(str, who))] += 1
            codes, seconds = processes.end()
            assert not done or codes == [0] * WORLD, [processes.error(rank) for rank in range(WORLD)]
            longest = max(longest, seconds)
        compared += same_losses(Path(fit.log), expected)
        check_left(fit)
    return killed, compared, longest


def kill_in_a_save(
    root: Path, rank: int, shards: bool, expected: dict[str, str], numbers: Iterable[int] | None = None, steps: int = 3
) -> list[int]:
    """Kill a process before its first call of the second save that changes the disk, before its second one, and so on till none is left.

    The other process must end with an error that names it. The fit must resume from what is left.

    Args:
        root: where to write.
        rank: of the process that is killed.
        shards: write shards, else one file.
        expected: losses of an uninterrupted run.
        numbers: of the calls; default: all.
        steps: of a fit.

    Returns:
        The step of the checkpoint that was found after each.
    """
    seen: list[int] = []
    for number in itertools.count(1) if numbers is None else numbers:
        name = f"rank{rank}.{number}"
        fit = Fit(str(root / name), steps, shards, str(root / f"{name}.log"), rank, number, step=2)
        processes = Processes(fit)
        codes, _ = processes.end()
        if codes == [0] * WORLD:  # there are no more calls
            check_left(fit)
            break
        assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1, codes
        said = processes.error(1 - rank)
        assert re.search(rf"Rank {rank} (ended|did not raise|raised first)", said), said
        seen.append(step_in(fit))
        assert Processes(replace(fit, rank=-1)).end()[0] == [0] * WORLD
        same_losses(Path(fit.log), expected)
        check_left(fit)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: a temporary folder")
    args = parser.parse_args()
    kinds = {"shards": True, "one file": False}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name, shards in kinds.items():
            begun = time.perf_counter()
            killed, compared, longest = kill_at_random(Path(folder, name), args.kills // 2, args.seed, shards)
            which = ", ".join(f"{count} of rank {rank}" for rank, count in sorted(killed.items()))
            print(
                f"{name}: {killed.total()} kills ({which}) in {time.perf_counter() - begun:.0f} s, {compared} losses, each that of an"
                f" uninterrupted run; the other process ended within {longest:.1f} s",
                flush=True,
            )
        for name, shards in kinds.items():
            root = Path(folder, f"save {name}")
            root.mkdir()
            expected = uninterrupted(root, 3, shards)
            for rank in range(WORLD):
                begun = time.perf_counter()
                seen = kill_in_a_save(root, rank, shards, expected)
                print(
                    f"{name}, rank {rank} killed in a save: {len(seen)} kills in {time.perf_counter() - begun:.0f} s,"
                    f" {seen.count(1)} found the old checkpoint, {seen.count(2)} the new; the other process named rank {rank} each time",
                    flush=True,
                )


if __name__ == "__main__":
    main()
