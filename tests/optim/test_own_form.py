"""Optimizers around another one, whose state dict is of a form of its own: saved as it is, beside the parameters' order."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_lora import LoRACallback, get_lora_parameters
from lightning_lora.optim.state import holds_nan, load_by_name, state_by_name
from tests.lit import CONFIG, LitNet, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class SlowWeights(Optimizer):
    """Lookahead (arXiv:1907.08610): every third step goes half the way from where the last such step ended."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.optimizer, self.param_groups, self.state = inner, inner.param_groups, defaultdict(dict)
        self.slow, self.steps = [p.detach().clone() for p in self._parameters()], 0

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        self.steps += 1
        if self.steps % 3 == 0:
            for slow, parameter in zip(self.slow, self._parameters(), strict=True):
                parameter.copy_(slow.lerp_(parameter, 0.5))
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"slow": self.slow, "steps": self.steps, "inner": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.slow, self.steps = [slow.clone() for slow in state["slow"]], state["steps"]
        self.optimizer.load_state_dict(state["inner"])
        self.param_groups = self.optimizer.param_groups


class Lit(LitNet):
    def configure_optimizers(self) -> Any:
        return SlowWeights(AdamW(list(get_lora_parameters(self)), lr=1e-2))


class Plain(LitNet):
    def configure_optimizers(self) -> Any:
        return AdamW(list(get_lora_parameters(self)), lr=1e-2)


def fit(folder: Path, module: LitNet, epochs: int, ckpt: Path | None = None) -> Any:
    torch.manual_seed(0)
    run = trainer(folder, LoRACallback(CONFIG, merge_on_fit_end=False), max_epochs=epochs, limit_val_batches=0)
    run.fit(module, ckpt_path=ckpt)
    return run


def test_a_run_resumes_to_the_bit_and_only_with_the_same_kind(tmp_path: Path) -> None:
    whole, half, rest = Lit(), Lit(), Lit()
    fit(tmp_path, whole, 4)
    fit(tmp_path, half, 2).save_checkpoint(tmp_path / "half.ckpt")
    fit(tmp_path, rest, 4, tmp_path / "half.ckpt")
    assert half.losses + rest.losses == whole.losses
    with pytest.raises(ValueError, match=r"half\.ckpt.*another form than AdamW: resume with the same"):
        fit(tmp_path, Plain(), 4, tmp_path / "half.ckpt")
    fit(tmp_path, Plain(), 2).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"plain\.ckpt.*another form than SlowWeights: resume with the same"):
        fit(tmp_path, Lit(), 4, tmp_path / "plain.ckpt")


def test_another_order_is_refused_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    parameters = list(model.parameters())
    saved = state_by_name(SlowWeights(AdamW(parameters)), model)
    assert saved["params"] == [["0.weight", "0.bias", "1.weight", "1.bias"]]
    other = SlowWeights(AdamW(parameters[::-1]))
    before = [slow.clone() for slow in other.slow]
    with pytest.raises(ValueError, match=r"SlowWeights keeps its state by the parameters' order.*\['1\.bias', '1\.weight'"):
        load_by_name(other, model, saved)
    assert all(torch.equal(a, b) for a, b in zip(other.slow, before, strict=True))


def test_nan_in_it_is_found() -> None:
    model = nn.Linear(2, 2)
    optimizer = SlowWeights(AdamW(model.parameters()))
    assert holds_nan(state_by_name(optimizer, model)) == []
    optimizer.slow[1].fill_(float("nan"))
    assert holds_nan(state_by_name(optimizer, model)) == ["an optimizer that keeps it in a form of its own"]
