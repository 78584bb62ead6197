"""Each weight of a module with several is tried on its own."""

import torch
from torch import nn

from lightning_lora import registry
from lightning_lora.layers.linearity import why_not_linear
from tests.layers.experts import LoRAExperts


def test_each_of_several_weights_is_tried():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Parameter(torch.zeros(2, 6, 4)), nn.Parameter(torch.zeros(2, 3, 6))

        def forward(self, x):
            return x @ self.gate_up_proj.mT @ self.down_proj.mT

    class Bypass(Pair):
        def forward(self, x):
            return x @ self.gate_up_proj.mT @ self._parameters["down_proj"].mT  # not what the kind puts in its place

    class Again(Pair):
        def forward(self, x):
            return super().forward(x) + 1

    class LoRAPair(LoRAExperts):
        @classmethod
        def example_input(cls, module, generator):
            return torch.randn(2, 3, module.gate_up_proj.shape[-1], generator=generator, dtype=torch.float64)

    registry.register_kind(Pair, name="test_pair")(LoRAPair)
    try:
        assert why_not_linear(Pair()) is None and why_not_linear(Again()) is None
        assert why_not_linear(Bypass()).startswith("its forward does more than multiply by its weight")
    finally:
        del registry.KINDS[registry.qualified_name(Pair)], registry.KIND_NAMES["test_pair"]
