"""A sweep's record: what it restores is compared by what the later call names."""

import json

import pytest

from lightning_lora.trials import Outcome
from lightning_lora.trials.records import Records, mode_of

SEEN = {"loss": {"min": [1.0, 4], "max": [3.0, 2]}, "f1": {"min": [0.1, 2], "max": [0.5, 4]}}


@pytest.mark.parametrize(
    ("named", "monitor", "best", "step"),
    [(("", "min"), "loss", 1.0, 4), (("loss", "min"), "loss", 1.0, 4), (("loss", "max"), "loss", 3.0, 2), (("f1", "max"), "f1", 0.5, 4)],
)
def test_a_complete_trial_is_compared_anew(named, monitor, best, step, tmp_path):
    before = Outcome("a", {"rank": 2}, status="complete", seen=SEEN)
    before.compare_by("loss", "min")
    Records(tmp_path / "sweep", {"a": "rank: 2"}).write([before])
    outcome = Outcome("a", {"rank": 2})
    outcome.monitor, outcome.mode = named
    assert Records(tmp_path / "sweep", {"a": "rank: 2"}).restore(outcome)
    assert (outcome.status, outcome.monitor, outcome.best, outcome.best_step) == ("complete", monitor, best, step)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"a": {"status": "complete"}})])
def test_a_damaged_record_is_named_with_its_folder(content, tmp_path):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ValueError, match=r"^folder .*: sweep\.json is (damaged|no record)"):
        Records(tmp_path, {})


def test_the_mode_of_a_name():
    assert [mode_of(name) for name in ("val_accuracy", "f1", "val_loss", "val_perplexity", "")] == ["max", "max", "min", "min", "min"]
