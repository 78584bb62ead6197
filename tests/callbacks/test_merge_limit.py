"""``merge_max_lost``: the merge at the end of a fit is refused if rounding would lose too much of an update."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from lightning_lora import LoRACallback, merge_certificate, merge_lora
from lightning_lora.layers.base import lora_layers
from tests.callbacks.lora_runs import checkpoint_in, fit
from tests.lit import CONFIG, LitNet


def test_a_merge_that_loses_too_much_is_refused_after_the_last_checkpoint(tmp_path: Path) -> None:
    module = LitNet()
    callback = LoRACallback(CONFIG, merge_max_lost=1e-4)
    with pytest.raises(ValueError, match=r"'net\.fc[12]' loses .* more than max_lost=0\.0001 \(2 of 2 weights do\)"):
        fit(tmp_path, module, 1, lora=callback, callbacks=(checkpoint_in(tmp_path),), precision="bf16-true")
    assert (tmp_path / "last.ckpt").is_file()
    assert not any(layer.merged for _, layer in lora_layers(module))
    assert max(each.lost for each in merge_certificate(merge_lora(module)).layers.values() if each) > 1e-4
    module = LitNet()
    lora = LoRACallback(CONFIG, merge_max_lost=0.9)
    fit(tmp_path, module, 1, lora=lora, precision="bf16-true")
    assert all(layer.merged for _, layer in lora_layers(module))


@pytest.mark.parametrize("limit", [-1, "all", True, float("nan")])
def test_a_limit_is_a_number(limit: Any) -> None:
    with pytest.raises(ValueError, match=r"merge_max_lost=.* must be a share of an update"):
        LoRACallback(CONFIG, merge_max_lost=limit)


def test_a_limit_of_no_merge_is_refused() -> None:
    with pytest.raises(ValueError, match=r"merge_max_lost=0\.3 limits the merge .* merge_on_fit_end=False has none"):
        LoRACallback(CONFIG, merge_max_lost=0.3, merge_on_fit_end=False)


@pytest.mark.filterwarnings("ignore:.*no optimizer")
@pytest.mark.parametrize("case", ["no batches", "no rows", "no optimizer"])
def test_a_fit_that_trains_nothing_says_so(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = LitNet()
    if case == "no optimizer":
        monkeypatch.setattr(module, "configure_optimizers", lambda: None)
    elif case == "no rows":
        monkeypatch.setattr(module, "train_dataloader", lambda: [])
    limit = {"limit_train_batches": 0} if case == "no batches" else {}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(tmp_path, module, 1, lora=LoRACallback(CONFIG, check_gradients=False), **limit)
    assert sum("fit ended without a step of an optimizer" in str(each.message) for each in found) == 1


def test_a_second_fit_of_a_trainer_that_is_done_says_so(tmp_path: Path) -> None:
    first, second = LitNet(), LitNet()
    run = fit(tmp_path, first, 1)
    with pytest.warns(UserWarning, match=r"fit ended without a step .* max_epochs reached by an earlier fit of this Trainer"):
        run.fit(second)
    assert first.losses and not second.losses
