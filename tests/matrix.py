"""``make matrix``: what works under which strategy, printed by running it, two processes on the CPU.

Every cell is a run compared with a single process. The last line counts: ``N passed, N refused, 0 failed``.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.distributed.pool import Pool
from tests.distributed.runs import REFUSED, STRATEGIES, refuse, run

CELLS = ("train", "checkpoint", "resume", "cross-resume", "merge", "grad-checkpoint")
SIGNS = {"passed": "✓", "refused": "refused", "failed": "FAILED"}


class Matrix:
    """Runs the cells; the single-process run that they are held against is made once."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        self.pool, self.folder = pool, folder
        self.whole = run("single", str(folder / "whole"), 4, save=True, test=True)
        self.half = run("single", str(folder / "half"), 2, save=True)
        self.halves: dict[str, dict[str, Any]] = {}

    def start(self, name: str, folder: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """One run; what its first process returned."""
        where = str(self.folder / folder)
        return run(name, where, *args, **kwargs) if name == "single" else self.pool.run(_run, name, (where, *args), kwargs)[0]

    def train(self, name: str) -> None:
        """Losses, adapters and moments as in one process."""
        self.halves[name] = self.start(name, name, 2, save=True)
        self._same(self.halves[name], self.half)

    def checkpoint(self, name: str) -> None:
        """Adapter only, to the element."""
        assert self.halves[name]["saved"] == self.half["saved"], self.halves[name]["saved"]

    def resume(self, name: str) -> None:
        """From its own checkpoint, step-exact."""
        self._resumed(self.start(name, "rest", 4, ckpt=str(self.folder / name / "last.ckpt")))

    def cross_resume(self, name: str) -> None:
        """From a single process, and on a single process from it."""
        self._resumed(self.start(name, "rest", 4, ckpt=str(self.folder / "half/last.ckpt")))
        self._resumed(self.start("single", "rest", 4, ckpt=str(self.folder / name / "last.ckpt")))

    def merge(self, name: str) -> None:
        """At the end of fit, the merged weights those of one process."""
        result, wanted = (self.start(n, "merge", 2, merge=True) for n in (name, "single"))
        assert result["merged"]
        _close(result["base"], wanted["base"])

    def grad_checkpoint(self, name: str) -> None:
        """Both modes; the losses of a run without."""
        for mode in ("non-reentrant", "reentrant"):
            self._same(self.start(name, "checkpointing", 2, checkpointing=mode), self.half)

    def _resumed(self, result: dict[str, Any]) -> None:
        self._same({**result, "losses": self.half["losses"] + result["losses"]}, self.whole)

    def _same(self, result: dict[str, Any], wanted: dict[str, Any]) -> None:
        assert torch.tensor(result["losses"]).allclose(torch.tensor(wanted["losses"]), rtol=0, atol=1e-6), (
            result["losses"],
            wanted["losses"],
        )
        for part in ("adapters", "moments"):
            _close(result[part], wanted[part])


def _close(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys(), mine.keys() ^ theirs.keys()
    worst = max((mine[name] - theirs[name]).abs().max().item() for name in mine)
    assert worst < 1e-6, worst


def _run(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return run(name, *args, **kwargs)


def main(names: list[str] | None = None) -> int:
    """Print the table; the exit code is the number of failed cells."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    counts: Counter[str] = Counter()
    print(f"| strategy | {' | '.join(CELLS)} |\n|---|{'---|' * len(CELLS)}")
    pool = Pool(2)
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(pool, Path(folder))
        for name in names or [*STRATEGIES, *REFUSED]:
            row = []
            for cell in CELLS:
                try:
                    if name in REFUSED:
                        refuse(name, folder)
                        row.append("refused")
                    else:
                        getattr(matrix, cell.replace("-", "_"))(name)
                        row.append("passed")
                except Exception as error:  # whatever it is, it is this cell's result, and counted
                    row.append("failed")
                    print(f"{name}, {cell}: {type(error).__name__}: {error}", file=sys.stderr)
            counts.update(row)
            print(f"| {name} | {' | '.join(SIGNS[cell] for cell in row)} |", flush=True)
    pool.close()
    print(f"{counts['passed']} passed, {counts['refused']} refused, {counts['failed']} failed")
    return counts["failed"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
