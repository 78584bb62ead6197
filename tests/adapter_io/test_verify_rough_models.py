"""``verify_lora`` on models that are rough: inputs that are quantized or changed in place, memory of the first batch, NaN, a compiler."""

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, quantize_base, verify_lora
from lightning_lora.adapter_io.verify import LOOSEST
from lightning_lora.model.verify_checks import GRADIENTS, IDENTITY, LAYERS, MODEL
from lightning_lora.ops.float8 import emulated
from tests.adapter_io.test_verify import ALL, Squared, failed, no_refusals, of, with_layer
from tests.sweep.archs import build

__all__ = ["no_refusals"]  # a fixture


def test_a_base_that_quantizes_its_inputs_is_allowed_that_much_and_told():
    model, inputs = build("llama")
    quantize_base(model, "fp8")
    with emulated():
        checks = of(verify_lora(model, ALL, batch=inputs))
        assert failed(checks.values()) == set(), checks
        assert (
            1e-3 < checks[MODEL].measured < 0.2 < checks[MODEL].tolerance == LOOSEST and "quantizes its inputs too" in checks[LAYERS].advice
        )
        assert checks[IDENTITY].tolerance < 1e-3, "what is computed alike is compared as ever"


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_int8_of_bitsandbytes():
    model, inputs = build("llama")
    quantize_base(model, "int8")
    checks = of(verify_lora(model, ALL, batch=inputs))
    assert failed(checks.values()) == set() and checks[LAYERS].tolerance == pytest.approx(3 * 2**-3.5), checks


def test_a_layer_that_is_not_linear_is_found_beside_one_that_quantizes_its_inputs(no_refusals):
    model = with_layer(Squared(8, 8))
    quantize_base(model, "fp8", targets=["0"])
    with emulated():
        checks = of(verify_lora(model, LoRAConfig(rank=2, target_modules=["0", "1", "3"]), batch=torch.randn(5, 8)))
    assert checks[LAYERS].status == "failed" and checks[LAYERS].advice.startswith("1: ")


class Rough(nn.Module):
    """Changes its input in place, and keeps something of its first batch."""

    def __init__(self):
        super().__init__()
        self.fc, self.first = nn.Linear(8, 4), None

    def forward(self, x):
        x.mul_(2)
        self.first = x.detach().mean() if self.first is None else self.first
        return self.fc(x) - self.first


def test_a_model_that_changes_its_batch_and_remembers_the_first():
    x = torch.randn(5, 8)
    kept = x.clone()
    assert failed(verify_lora(Rough(), LoRAConfig(rank=2, target_modules=["fc"]), batch={"x": x})) == set()
    assert torch.equal(x, kept)


def test_a_compiled_model():
    model = torch.compile(nn.Sequential(nn.Linear(8, 4)), backend="eager")
    assert failed(verify_lora(model, LoRAConfig(rank=2, target_modules=["0"]), batch=torch.randn(5, 8))) == set()


def test_a_gradient_that_is_not_finite_is_named_as_that():
    class Divides(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(x) / 0

    config = LoRAConfig(rank=2, target_modules=["fc"])
    checks = of(verify_lora(Divides(), config, batch=torch.randn(5, 8), loss=lambda model: model(torch.ones(1, 8)).sum()))
    assert "NaN or infinity in the gradients of fc" in checks[GRADIENTS].advice
