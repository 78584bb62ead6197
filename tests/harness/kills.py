"""Kill processes that save, and see what they leave: at each file operation in turn, or by SIGKILL at random moments.

What a fresh process finds after each must be whole. ``python -m tests.harness.kills --kills 200 --seed 1 --folder /somewhere`` prints what
was done and found, per scenario.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lora.storage import folders

#: Every function of ``os`` by which the package changes what is on the disk.
OPERATIONS = ("open", "mkdir", "rename", "replace", "link", "unlink", "rmdir", "fsync", "chmod")


FAILED = 77  # exit code of a child that raised


@dataclass(frozen=True)
class Scenario:
    """What is done, given the number of the try; and a check of what is there, which returns which of two versions that is: 0 or 1."""

    act: Callable[[int], object]
    check: Callable[[], int]


class Killed(BaseException):
    """In place of a kill, and of all that a killed process no longer does to the disk."""


@contextmanager
def operations(before: Callable[[int], object]) -> Iterator[list[str]]:
    """Call ``before`` ahead of each call that changes the disk, with the number of the call. The first is 1.

    Yields:
        The names of the calls.
    """
    called: list[str] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            before(len(called))
            return real(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for module, name in [*((os, name) for name in OPERATIONS), (folders, "exchange")]:
            real = getattr(module, name)
            setattr(module, name, wrap(name, real))
            stack.callback(setattr, module, name, real)
        yield called


@contextmanager
def killed_at(operation: int) -> Iterator[list[str]]:
    """Raise right before the ``operation``-th call that changes the disk, and at every one after that: no clean-up is done either.

    Yields:
        The names of the calls.
    """

    def stop(number: int) -> None:
        if number >= operation:
            raise Killed

    with operations(stop) as called, suppress(Killed):
        yield called


def kill_at_each_operation(scenario: Scenario, versions: tuple[int, int] = (0, 1)) -> list[int]:
    """Kill a writer of the second version over the first one before its first operation, its second, and so on, till none is left.

    Returns:
        What was found after each. The next writer, of the second version, is not hindered.
    """
    seen: list[int] = []
    while True:
        scenario.act(versions[0])
        with killed_at(len(seen) + 1) as called:
            scenario.act(versions[1])
        seen.append(scenario.check())
        scenario.act(versions[1])
        assert scenario.check() == versions[1]
        if len(called) < len(seen):
            return seen


def in_a_child(action: Callable[[], int | None]) -> int:
    """Fork. The child's exit code is what the action returns. Return the child's number."""
    child = os.fork()
    if child:
        return child
    code = FAILED
    try:
        code = action() or 0
    except BaseException as error:
        os.write(2, f"in the child: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def result(child: int) -> int:
    """Wait for a child, and return its exit code."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code != FAILED
    return code


def kill_at_random(scenario: Scenario, kills: int, seed: int) -> Counter[int]:
    """Kill children that act over and over, each after another delay. Return how often each version was found.

    All is done in children: a process that has started threads cannot fork safely.
    """
    chance, seen = random.Random(seed), Counter[int]()
    begun = time.perf_counter()
    assert result(in_a_child(lambda: (scenario.act(0), 0)[1])) == 0
    once = time.perf_counter() - begun
    for number in range(kills):

        def forever(number: int = number) -> None:
            for turn in range(10**9):
                scenario.act(number + turn)

        child = in_a_child(forever)
        time.sleep(chance.uniform(0, 3 * once))
        os.kill(child, signal.SIGKILL)
        assert result(child) == -signal.SIGKILL, "the child ended before it was killed"
        seen[result(in_a_child(scenario.check))] += 1
    return seen


def main() -> None:
    from tests.harness.scenarios import SCENARIOS, resumed_fits

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="per scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name, make in SCENARIOS.items():
            begun = time.perf_counter()
            seen = kill_at_random(make(Path(folder, name)), args.kills, args.seed)
            counts = ", ".join(f"{count} × {found}" for found, count in sorted(seen.items()))
            print(f"{name}: {args.kills} kills in {time.perf_counter() - begun:.0f} s, found {counts}", flush=True)
        begun = time.perf_counter()
        kills, steps = resumed_fits(Path(folder, "fit"), args.kills, args.seed)
        print(f"fit: {kills} kills in {time.perf_counter() - begun:.0f} s, {steps} steps, each loss that of an uninterrupted run")


if __name__ == "__main__":
    main()
