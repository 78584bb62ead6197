"""What a sweep leaves in its folder beside the trials' own: ``sweep.json``, by which it goes on, and ``sweep.csv``; and what it finds."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lora.storage.atomic_files import write_atomic
from lightning_lora.trials.one_run import Mode, Outcome

RECORD, TABLE = "sweep.json", "sweep.csv"
COMPLETE = "complete"
LARGER = ("accuracy", "f1", "bleu", "rouge1", "rouge2", "rougeL", "margin")  # the package's metrics whose larger values are better


class Records:
    """The record of a sweep.

    Args:
        folder: the sweep's folder.
        described: trial → what its run has, by which a folder's trials are known again.

    Attributes:
        next: trial → commands to type next, where it was started by one.

    Raises:
        ValueError: the folder holds another sweep, or cannot be read.
    """

    def __init__(self, folder: Path, described: dict[str, str]) -> None:
        self.folder, self.described = folder, described
        self.next: dict[str, list[str]] = {}
        self._before = self._read()
        for name, text in described.items():
            if name in self._before and self._before[name]["described"] != text:
                raise ValueError(f"folder {folder} holds another sweep: its trial {name!r} has other settings; name another folder")
        if others := sorted(self._before.keys() - described.keys()):
            raise ValueError(f"folder {folder} holds another sweep, with the trial {others[0]!r}; name another folder")

    def restore(self, outcome: Outcome) -> bool:
        """Set an outcome to what an earlier call has left of it, compared by what this call names. Return True if it is complete."""
        known = self._before.get(outcome.name, {})
        for key in ("steps", "last", "seen", "folder"):
            if key in known:
                setattr(outcome, key, known[key])
        if outcome.monitor:
            outcome.compare_by(outcome.monitor, outcome.mode)
        else:
            outcome.compare_by(known.get("monitor", ""), known.get("mode", outcome.mode))
        if known.get("status") != COMPLETE:
            return False
        outcome.status = COMPLETE
        self.next[outcome.name] = known["next"]
        return True

    def write(self, outcomes: Sequence[Outcome]) -> None:
        """Write both files, each in one step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            each.name: {**asdict(each), "described": self.described[each.name], "next": self.next.get(each.name, [])} for each in outcomes
        }
        write_atomic(self.folder / RECORD, json.dumps(content, indent=1, default=str).encode())
        text = io.StringIO()
        header, rows = table(outcomes)
        csv.writer(text).writerows([header, *rows])
        write_atomic(self.folder / TABLE, text.getvalue().encode())

    def _read(self) -> dict[str, Any]:
        file = self.folder / RECORD
        if not file.exists():
            if self.folder.exists() and not self.folder.is_dir():
                raise ValueError(f"folder {self.folder} is a file; name a folder")
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise ValueError(f"folder {self.folder} is not empty and holds no sweep; name another folder")
            return {}
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"folder {self.folder}: {RECORD} is damaged ({error}); name another folder") from error
        if not isinstance(content, dict) or not all(isinstance(each, dict) and "described" in each for each in content.values()):
            raise ValueError(f"folder {self.folder}: {RECORD} is no record of a sweep; name another folder")
        return content


def warn_of_unlogged(monitor: str | None, outcomes: Sequence[Outcome]) -> None:
    """Warn if the value that trials are compared by was logged by none, as one whose name is misspelt."""
    if monitor is not None and not any(monitor in outcome.seen for outcome in outcomes):
        there = dict.fromkeys(name for outcome in outcomes for name in outcome.seen)
        rank_zero_warn(f"monitor={monitor!r} was not logged; there are {', '.join(there) or 'none'}.")


def mode_of(monitor: str) -> Mode:
    """Return "max" for a value of which larger is better, as far as its name says so."""
    return "max" if monitor.rpartition("_")[2] in LARGER else "min"


def last_checkpoint(name: str, folder: Path) -> Path | None:
    """Return the newest checkpoint in a trial's folder, None if there is none. Say which, if the trial has begun before."""
    found = sorted(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    if folder.exists():
        rank_zero_info(f"{name} {f'resumes {found[-1]}' if found else 'has no checkpoint, and starts again'}.")
    return found[-1] if found else None


def check_one_trained(outcomes: Sequence[Outcome]) -> None:
    """Raise RuntimeError if every trial failed."""
    if all(outcome.status == "failed" for outcome in outcomes):
        raise RuntimeError(f"every trial failed; the first: {outcomes[0].error}")


def best_of(outcomes: Sequence[Outcome]) -> Outcome | None:
    """Return the complete trial with the best value; of equals the first."""
    done = [each for each in outcomes if each.status == COMPLETE and each.best is not None]
    if not done:
        return None
    return min(done, key=lambda each: (each.best or 0.0) * (1 if each.mode == "min" else -1))


def table(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[Any]]]:
    """Return a header and a row for each trial."""
    names = list(dict.fromkeys(name for each in outcomes for name in each.settings))
    monitor = next((each.monitor for each in outcomes if each.monitor), "value")
    header = ["trial", *names, f"best {monitor}", "at step", "steps", "status", "folder"]
    rows = [
        [
            each.name,
            *[each.settings.get(name, "") for name in names],
            "" if each.best is None else each.best,
            *(each.best_step, each.steps),
            each.status + (f": {each.error}" if each.error else ""),
            each.folder,
        ]
        for each in outcomes
    ]
    return header, rows
