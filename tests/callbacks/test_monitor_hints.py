"""The seven hints: each is given for a run that shows its mistake, and none for a sound run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_lora.callbacks.monitor_hints import Findings, LayerRow, hints
from lightning_lora.callbacks.monitor_history import QUANTITIES, History

ROW = LayerRow("a", 8, 2.0, torch.float32, 10.0, 0.5, 0.05, 2.0, 3.0, (0.4, 0.3) + (0.0,) * 6, 8, ("lora_A", "lora_B"))
SOUND = Findings([ROW], History(["a"]), (), (), (), {}, "SingleDeviceStrategy", 1, 100)


def history(ratios: dict[int, float], losses: Any = ()) -> History:
    made = History(["a"], losses=list(losses))
    for step, ratio in ratios.items():
        made.add(step, [[ratio] + [1.0] * (len(QUANTITIES) - 1)])
    return made


def row(**fields: Any) -> Findings:
    return replace(SOUND, rows=[replace(ROW, **fields)])


CASES = {
    "Rank too low": [(row(suggested=16), "1 of 1 layers use all of their rank (a)")],
    "Base not frozen": [(replace(SOUND, changed_base=["w"]), "1 frozen parameters changed: w")],
    "Scaling or learning rate": [
        (row(ratio=0.9), "large"),
        (row(ratio=1e-5), "small"),
        (row(spectrum=(math.nan,)), "NaN"),
        (row(rank=64, scaling=0.1), "rslora"),
        (replace(SOUND, history=history({0: 0.0, 50: 0.025, 100: 0.05})), "2.0 times"),
    ],
    "Merging": [(row(dtype=torch.bfloat16, ratio=2e-3), "rounding loses about 81% of a's update")],
    "Targets that do not train": [(row(moved=()), "1 of 1 layers did not change"), (row(spectrum=(0.0,)), "1 still add nothing (a)")],
    "Overfitting": [(replace(SOUND, history=history({}, [(10, {"val_loss": 1.0}), (20, {"val_loss": 1.5})])), "lowest at step 10")],
}


@pytest.mark.parametrize(("title", "found", "said"), [(title, *case) for title, cases in CASES.items() for case in cases])
def test_a_mistake_is_told(title: str, found: Findings, said: str) -> None:
    (hint,) = (hint for hint in hints(found) if hint.title == title)
    assert hint.look and said in hint.text


def test_a_sound_run_has_seven_quiet_lines() -> None:
    told = hints(replace(SOUND, history=history({0: 0.0, 50: 0.045, 100: 0.05}, [(50, {"val_loss": 1.1}), (100, {"val_loss": 1.0})])))
    assert len(told) == 7 and not [hint for hint in told if hint.look]


def test_rounding_loss_is_that_of_a_merge() -> None:
    """The estimate for bf16 against rounding itself, at three sizes of the update."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1 << 16, generator=generator).bfloat16().double()
    for ratio in (0.01, 0.03, 0.1):
        update = ratio * torch.randn(1 << 16, generator=generator, dtype=torch.float64)
        lost = float(((weight + update).bfloat16().double() - weight - update).norm() / update.norm())
        (hint,) = (hint for hint in hints(row(dtype=torch.bfloat16, ratio=ratio)) if hint.title == "Merging")
        assert float(hint.text.split("about ")[1].split("%")[0]) / 100 == pytest.approx(lost, rel=0.35, abs=0.01)


def hint(found: Findings, title: str) -> str:
    (one,) = (each for each in hints(found) if each.title == title)
    assert not one.look
    return one.text


def test_a_negative_loss_at_its_lowest_is_no_overfitting() -> None:
    falls = [(10, {"val_loss": -0.5}), (20, {"val_loss": -1.0})]
    assert "at or near its lowest: -1" in hint(replace(SOUND, history=history({}, falls)), "Overfitting")
    rises = replace(SOUND, history=history({}, falls[::-1]))
    assert next(each for each in hints(rises) if each.title == "Overfitting").look


def test_a_quantized_base_is_not_called_wide() -> None:
    assert "merging into it is a choice" in hint(row(dtype=None), "Merging")
    assert "wide enough" in hint(row(), "Merging")


def test_a_weight_that_was_not_read_is_told() -> None:
    assert "1 layer is of a sharded quantized weight" in hint(row(weight_norm=math.nan, ratio=math.nan), "Model parallelism")
