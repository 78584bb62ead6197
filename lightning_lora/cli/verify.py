"""``lightning-lora verify``: check a run's own model, data and strategy in minutes, before it trains for hours."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_lora.cli.console import print_json, print_table
from lightning_lora.cli.messages import one_line
from lightning_lora.cli.tuned import content_of
from lightning_lora.cli.verify_runs import MANY, ONE, START, STEPS, OneProcess, ShortRun
from lightning_lora.model.trial_values import precision
from lightning_lora.model.verify_checks import Check

FOLDER = "LIGHTNING_LORA_VERIFY"  # set for the processes that the strategy starts
STRATEGY = "the strategy equals one process"


def verify(words: Sequence[str], as_json: bool = False) -> int:
    """Verify a run. Print a table of the checks.

    Args:
        words: the options of ``fit``.
        as_json: print JSON.

    Returns:
        0 if every check passed or does not apply, else 1.

    Raises:
        ValueError: an option is wrong, or the run is refused; then there is nothing to verify.
    """
    shared = os.environ.get(FOLDER)
    if shared:  # one of the strategy's processes
        ShortRun(words, Path(shared)).start()
        return 0
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("verify starts the strategy's processes itself; start it once, without torchrun or srun")
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        checks = _checks(words, Path(folder))
    failed, missing = (sum(check.status == status for check in checks) for status in ("failed", "not run"))
    passed = sum(check.status == "passed" for check in checks)
    if as_json:
        print_json({"checks": [asdict(check) for check in checks], "passed": passed, "failed": failed, "not_run": missing})
    else:
        shown = [[each.name, each.status, _number(each.measured), _number(each.tolerance)] for each in checks]
        print_table(("check", "", "measured", "allowed"), shown)
        for check in checks:
            if check.advice:
                print(f"{check.name}: {check.status}: {check.advice.rstrip('.')}.")
        print(f"{passed} passed, {failed} failed, {missing} not run")
    return int(not all(check.ok for check in checks))


def _checks(words: Sequence[str], folder: Path) -> list[Check]:
    one = OneProcess(words, folder)
    one.start()
    rows = one.checks.rows
    if one.alone:
        return [*rows, Check(STRATEGY, "not needed", advice="the run is one process")]
    if one.unavailable:
        return [*rows, Check(STRATEGY, "not run", advice=one.unavailable)]
    eps = max(precision(one.model, set()), _compute_eps(str(one.trainer.precision)))
    del one  # its model; the strategy needs the memory
    os.environ[FOLDER] = str(folder)
    try:
        ShortRun(words, folder).start()
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        return [*rows, Check(STRATEGY, "failed", advice=one_line(error))]
    finally:
        del os.environ[FOLDER]
    return [*rows, _equal(_state(folder / START), _state(folder / ONE), _state(folder / MANY), eps)]


def _equal(start: dict[str, Tensor], one: dict[str, Tensor], many: dict[str, Tensor], eps: float) -> Check:
    """Compare what two steps changed. Optimizers such as Adam divide by the gradient's size, so rounding in small entries shows as steps;
    8·√eps leaves room for that, and a gradient that is not averaged is off by more than a half.
    """
    limit = min(8 * math.sqrt(eps), 0.4)
    if one.keys() != many.keys():
        return Check(STRATEGY, "failed", math.inf, limit, f"{sorted(one.keys() ^ many.keys())[0]!r} is trained by one of them only")
    moved = {name: value.double() - start[name].double() for name, value in one.items()}
    apart = {name: (many[name].double() - value.double()).norm() for name, value in one.items()}
    step = math.sqrt(sum(float(value.norm()) ** 2 for value in moved.values()))
    if not step > 0:
        return Check(STRATEGY, "not run", advice=f"{STEPS} steps changed nothing: is the learning rate 0 at the start (a warm-up)?")
    measured = math.sqrt(sum(float(value) ** 2 for value in apart.values())) / step
    measured = measured if math.isfinite(measured) else math.inf
    worst = max(apart, key=lambda name: float(apart[name]))
    advice = (
        f"after {STEPS} steps on the same batches {worst} differs most: a loss that is not the mean over its rows, random numbers or rows"
        " that depend on the rank, or parameters that the strategy does not reduce"
    )
    passed = measured <= limit
    return Check(STRATEGY, "passed" if passed else "failed", measured, limit, "" if passed else advice)


def _state(path: Path) -> dict[str, Tensor]:
    """Return the parameters of a checkpoint."""
    content: Mapping[str, Any] = content_of(str(path)) or {}
    return {name: value for name, value in content["state_dict"].items() if isinstance(value, Tensor) and value.is_floating_point()}


def _compute_eps(precision_name: str) -> float:
    names = {"bf16": torch.bfloat16, "16": torch.float16, "transformer": torch.bfloat16, "64": torch.float64}
    dtype = next((dtype for name, dtype in names.items() if precision_name.startswith(name)), torch.float32)
    return torch.finfo(dtype).eps


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
