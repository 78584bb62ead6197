"""Run the trials of a study, many at a time, and write one JSON line for each.

    python -m benchmarks.quality.run retention --out retention.jsonl --workers 12
    python -m benchmarks.quality.run retention ablation sweeps --out all.jsonl --workers 12 --seconds 500
    python -m benchmarks.quality.run retention --out dry.jsonl --most-steps 2                # a dry run, on a CPU

Trials that are in the file are not run again, so a run that was stopped goes on. Workers are processes that stay; small models are bound by
launches, so a dozen share one GPU, and several GPUs are shared evenly. The first run fetches models and data (`bases.py`, `tasks.py`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import math
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks.quality.bases import NAMES, load_base
from benchmarks.quality.prose import load_prose
from benchmarks.quality.tasks import SOURCES, load_task, quality_cache
from benchmarks.quality.trial import Trial, run_trial

#: Study → the module with its function ``trials(records)``, which returns all trials that can be named so far.
STUDIES = {
    "retention": "benchmarks.quality.retention",
    "ablation": "benchmarks.quality.ablation",
    "sweeps": "benchmarks.quality.sweeps",
    "family": "benchmarks.quality.family",
    "forgetting": "benchmarks.quality.forgetting",
}
ASK = 2.0  # seconds until the plan is asked again, which takes a while; what it names first runs first
Plan = Callable[[dict[str, dict[str, Any]]], list[Trial]]


def start_worker(number: Any = None) -> None:
    """Make a worker quiet, and one thread wide. ``number`` counts the workers, which take turns in taking a GPU."""
    import torch

    if number is not None and torch.cuda.device_count() > 1:
        with number.get_lock():
            number.value += 1
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number.value % torch.cuda.device_count())

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_lora", "transformers", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    torch.set_num_threads(1)


def read_records(file: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a file by their trial's key, but those with an error, which run again, and a last line that was cut off."""
    records = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["error"] is None:
            records[record["key"]] = record
    return records


def run(
    plan: Plan, out: Path, pool: Any, workers: int, deadline: float = float("inf"), most_steps: int | None = None
) -> dict[str, dict[str, Any]]:
    """Run what the plan names and the file lacks, until nothing is left or the deadline has passed. Return all records.

    Args:
        plan: Names the trials that can be named, given the records so far.
        out: The file. It gets a line as soon as a trial is done.
        pool: An executor.
        workers: How many trials run at a time.
        deadline: On `time.monotonic`'s clock; no trial begins after it.
        most_steps: Stops each trial.
    """
    records, running = read_records(out), {}
    futures: dict[Future[dict[str, Any]], Trial] = {}
    left: list[Trial] = []
    asked = -math.inf
    with out.open("a", encoding="utf-8") as file:
        while True:
            free = workers - len(futures)
            if len(left) < free or time.monotonic() - asked > ASK:
                asked = time.monotonic()
                left = [trial for trial in plan(records) if trial.key not in records and trial.key not in running]
            now, left = (left[:free], left[free:]) if time.monotonic() < deadline else ([], left)
            for trial in now:
                running[trial.key] = trial
                futures[pool.submit(run_trial, trial, most_steps)] = trial
            if not futures:
                return records
            done, _ = wait(futures, return_when=FIRST_COMPLETED)
            for future in done:
                trial, record = futures.pop(future), future.result()
                del running[trial.key]
                records[trial.key] = record
                file.write(json.dumps(record) + "\n")
                file.flush()
                print(said(record, len(records)), flush=True)


def said(record: dict[str, Any], count: int) -> str:
    """Return a record on one line."""
    found = record["error"] or " ".join(f"{k}={v:.4g}" for k, v in {**record["val"], **(record["test"] or {})}.items() if v is not None)
    names = " ".join(str(record[name]) for name in ("study", "task", "base", "method", "split", "seed", "lr"))
    return f"{count} {names} {json.dumps(record['config'])}: {found} ({record['seconds']:.1f} s)"


def plan_of(studies: Sequence[str], only: str = "") -> Plan:
    """Return the plan of several studies; ``only`` must be in a trial's key."""
    modules = [importlib.import_module(STUDIES[name]) for name in studies]
    return lambda records: [trial for module in modules for trial in module.trials(records) if only in trial.key]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", choices=list(STUDIES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no trial after this time")
    parser.add_argument("--most-steps", type=int, help="stop each trial after so many steps: a dry run, whose records say so")
    parser.add_argument("--only", default="", help="run the trials whose key contains this text")
    options = parser.parse_args(argv)
    deadline = time.monotonic() + options.seconds
    for name in SOURCES:
        load_task(name)
    for name in NAMES:
        load_base(name)
    load_prose(quality_cache())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, spawn, start_worker, (spawn.Value("i", 0),)) as pool:
        records = run(plan_of(options.studies, only=options.only), options.out, pool, options.workers, deadline, options.most_steps)
    failed = [record for record in records.values() if record["error"] and record["split"] == "test"]
    print(f"{len(records)} records, {len(failed)} trials that report failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
