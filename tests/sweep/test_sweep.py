"""No architecture has a dead adapter, a wrong merge or a crash under all-linear. A dozen here; all with `-m slow`."""

import operator

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, find_targets
from lightning_lora.model import merge, suitability
from tests.sweep.archs import build, names
from tests.sweep.check import faults

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' advice on tiny configurations

QUICK = [
    "bart",
    "bert",
    "deberta-v2",
    "falcon",
    "gpt2",
    "llama4_text",
    "mamba",
    "mobilebert",
    "phimoe",
    "qwen3_next",
    "swin",
    "t5",
    "wavlm",
]
PASSED_OVER = {
    "mamba": {"x_proj", "dt_proj", "out_proj"},
    "mamba2": {"out_proj"},
    "wavlm": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "llama4_text": {"router"},
    "phimoe": {"router"},
    "llama": set(),
    "bert": set(),
}


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names()])
def test_all_linear_is_right(name):
    model, inputs = build(name)
    assert faults(model, inputs) == []


@pytest.mark.parametrize("name", PASSED_OVER)
def test_what_is_passed_over(name):
    report = find_targets(build(name)[0], LoRAConfig(target_modules="all-linear"))
    assert {fqn.rpartition(".")[2] for fqn in report.passed_over} == PASSED_OVER[name]


def test_the_list_is_long():
    assert len(names()) == len(set(names())) >= 100 and set(QUICK) <= set(names())


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.a, self.b = layer, nn.Linear(8, 8)

    def forward(self, x):
        return self.b(self.a(x))


class Reads(Net):
    def forward(self, x):
        return self.b(x) @ operator.attrgetter("a.weight")(self)  # hidden from the reader


class Scaled(nn.Linear):
    def forward(self, x):
        return 0.9 * super().forward(x)


class Crashes(nn.Linear):
    def forward(self, x):
        if self.training:
            raise RuntimeError("not in training")
        return super().forward(x)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: Reads(nn.Linear(8, 8)), ["dead adapter: a", "wrong merge"]),
        (lambda: Net(Scaled(8, 8)), ["wrong merge"]),
        (lambda: Net(Crashes(8, 8)), ["crash in training: not in training"]),
    ],
)
def test_the_check_sees_faults(build, expected, monkeypatch):
    monkeypatch.setattr(suitability, "why_not_linear", lambda *args: None)
    monkeypatch.setattr(merge, "why_no_longer_linear", lambda layer: None)
    torch.manual_seed(0)
    found = faults(build().eval(), {"x": torch.randn(3, 8)})
    assert len(found) == len(expected) and all(text.startswith(start) for text, start in zip(found, expected, strict=True))
