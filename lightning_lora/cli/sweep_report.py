"""What ``sweep`` prints: the table, the best trial, what to type next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lightning_lora.cli.console import print_table
from lightning_lora.trials import Outcome
from lightning_lora.trials.records import COMPLETE, Records, best_of, table


def report_of(records: Records, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the trials, the best of them and what to type next."""
    best = best_of(outcomes)
    return {
        "folder": str(records.folder),
        "trials": [{key: value for key, value in asdict(each).items() if key not in ("mode", "seen")} for each in outcomes],
        "best": None if best is None else best.name,
        "next": [] if best is None else records.next.get(best.name, []),
    }


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


def without_value(outcomes: Sequence[Outcome]) -> str | None:
    """Return why no trial is the best, None if one is or none is complete."""
    done = [each for each in outcomes if each.status == COMPLETE]
    if not done or any(each.best is not None for each in done):
        return None
    there = ", ".join(sorted({name for each in done for name in each.last}))
    return (
        f"no complete trial has a value {done[0].monitor!r}; there are {there}. Name one with --monitor, or validate before the run ends."
    )
