"""Steps of a LightningModule and hooks: what multiplies by a weight reads it; what logs it, or adds it to a loss, does not."""

import pytest
import torch.nn.functional as F
from torch import nn

from lightning_lora.utils.weight_reads import weight_reads
from tests.utils.test_weight_reads import Base, names


class Steps(Base):
    """Steps that multiply by a weight, and steps that log it or add it to a loss."""

    def forward(self, x):
        return self.a(x) + self.b(x)

    def training_step(self, x):
        return self(x).mean() + self.b.weight.abs().sum()

    def validation_step(self, x):
        weight = self.a.weight
        return F.linear(x, weight.t()) + self.b.weight.norm()


def test_steps_are_read_for_products():
    assert names(Steps) == {"a"}


@pytest.mark.parametrize(("register", "read"), [("register_forward_hook", True), ("register_forward_pre_hook", True), (None, False)])
def test_hooks_are_read_for_products(register, read):
    def multiplies(layer, given, *output):
        return given[0] @ layer.weight

    def logs(layer, given, *output):
        Base.norm = layer.weight.norm()

    model = nn.Sequential(nn.Linear(2, 2))
    getattr(model[0], register or "register_forward_hook")(multiplies if read else logs)
    assert weight_reads(model) == ({model[0]: "multiplies"} if read else {})
