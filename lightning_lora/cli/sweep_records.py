"""What a sweep leaves in its folder beside the trials' own: ``sweep.json``, by which it goes on, and ``sweep.csv``; and the table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_lora.cli.console import print_table
from lightning_lora.storage.atomic_files import write_atomic
from lightning_lora.trials import Outcome

RECORD, TABLE = "sweep.json", "sweep.csv"
COMPLETE = "complete"


class Records:
    """The record of a sweep.

    Args:
        folder: the sweep's folder.
        described: trial → what its run has, by which a folder's trials are known again.

    Attributes:
        next: trial → commands to type next.

    Raises:
        ValueError: the folder holds another sweep, or cannot be read.
    """

    def __init__(self, folder: Path, described: dict[str, str]) -> None:
        self.folder, self.described = folder, described
        self.next: dict[str, list[str]] = {}
        self._before = self._read()
        for name, text in described.items():
            if name in self._before and self._before[name]["described"] != text:
                raise ValueError(f"--folder {folder} holds another sweep: its trial {name!r} has other options; name another folder")
        if others := sorted(self._before.keys() - described.keys()):
            raise ValueError(f"--folder {folder} holds another sweep, with the trial {others[0]!r}; name another folder")

    def restore(self, outcome: Outcome) -> bool:
        """Set an outcome to what an earlier call has left of it, compared by what this call names. Return True if it is complete."""
        known = self._before.get(outcome.name, {})
        for key in ("steps", "last", "seen", "folder"):
            if key in known:
                setattr(outcome, key, known[key])
        same = outcome.monitor in ("", known.get("monitor"))
        monitor, mode = (known.get("monitor", ""), known.get("mode", outcome.mode)) if same else (outcome.monitor, outcome.mode)
        outcome.compare_by(monitor, mode)
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

    def report(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Return the trials, the best of them and what to type next."""
        best = best_of(outcomes)
        return {
            "folder": str(self.folder),
            "trials": [{key: value for key, value in asdict(each).items() if key not in ("mode", "seen")} for each in outcomes],
            "best": None if best is None else best.name,
            "next": [] if best is None else self.next.get(best.name, []),
        }

    def _read(self) -> dict[str, Any]:
        file = self.folder / RECORD
        if not file.exists():
            if self.folder.exists() and not self.folder.is_dir():
                raise ValueError(f"--folder {self.folder} is a file; name a folder")
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise ValueError(f"--folder {self.folder} is not empty and holds no sweep; name another folder")
            return {}
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is damaged ({error}); name another folder") from error
        if not isinstance(content, dict) or not all(isinstance(each, dict) and "described" in each for each in content.values()):
            raise ValueError(f"{file} is no record of a sweep; name another folder")
        return content


def best_of(outcomes: Sequence[Outcome]) -> Outcome | None:
    """Return the complete trial with the best value; of equals the first."""
    done = [each for each in outcomes if each.status == COMPLETE and each.best is not None]
    if not done:
        return None
    return min(done, key=lambda each: (each.best or 0.0) * (1 if each.mode == "min" else -1))


def without_value(outcomes: Sequence[Outcome]) -> str | None:
    """Return why no trial is the best, None if one is or none is complete."""
    done = [each for each in outcomes if each.status == COMPLETE]
    if not done or any(each.best is not None for each in done):
        return None
    there = ", ".join(sorted({name for each in done for name in each.last}))
    return (
        f"no complete trial has a value {done[0].monitor!r}; there are {there}. Name one with --monitor, or validate before the run ends."
    )


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


def print_report(report: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Print the table, the best trial, and commands to type next."""
    print()
    print_table(*table(outcomes))
    if unknown := without_value(outcomes):
        print(f"\nbest: none, for {unknown}")
    if report["best"] is not None:
        print(f"\nbest: {report['best']}\n\nnext:")
        for command in report["next"]:
            print(f"  {command}")
