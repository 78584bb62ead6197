"""The class of the document's walkthrough, put together from its three pieces, is the reference of `LoRALinear`."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRALinear
from tests.document import run, teach

WALKTHROUGH_CLASS = """\
class LoRALinear(NexusModule):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        bias: bool = True,
    ):
        # Frozen base layer
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.linear.weight.requires_grad = False

        # Trainable low-rank matrices
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))

        # Scaling
        self.scaling = alpha / rank

        # Dropout on adapter path
        self.lora_dropout = nn.Dropout(p=dropout)
"""

WALKTHROUGH_FORWARD = """\
def forward(self, x: torch.Tensor) -> torch.Tensor:
    # Base output (frozen)
    base_output = self.linear(x)

    # LoRA adapter path
    lora_input = self.lora_dropout(x)
    lora_output = F.linear(
        F.linear(lora_input, self.lora_A),
        self.lora_B
    )

    # Combine with scaling
    return base_output + lora_output * self.scaling
"""

WALKTHROUGH_MERGE = """\
def merge_weights(self) -> None:
    with torch.no_grad():
        # Compute ΔW = (α/r) * B @ A
        delta_w = (self.lora_B @ self.lora_A) * self.scaling

        # Add to frozen weight
        self.linear.weight.data += delta_w

    self.merged = True
"""


class NexusModule(nn.Module):
    """The document's base class, whose `__init__` its subclass does not call."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "NexusModule":
        module = super().__new__(cls)
        nn.Module.__init__(module)
        return module


def document_class() -> type[nn.Module]:
    """The walkthrough's class with the forward and merge_weights that follow it."""
    cls = run(WALKTHROUGH_CLASS, NexusModule=NexusModule)["LoRALinear"]
    cls.forward = run(WALKTHROUGH_FORWARD)["forward"]
    cls.merge_weights = run(WALKTHROUGH_MERGE)["merge_weights"]
    return cls


def pair(dropout: float = 0.0, bias: bool = True) -> tuple[LoRALinear, Any]:
    """Ours and the document's, with the same weights and an adapter that does something."""
    ours = teach(LoRALinear(12, 20, rank=4, alpha=10.0, dropout=dropout, bias=bias))
    theirs = document_class()(12, 20, rank=4, alpha=10.0, dropout=dropout, bias=bias)
    theirs.linear.load_state_dict(ours.linear.state_dict())
    with torch.no_grad():
        theirs.lora_A.copy_(ours.lora_A)
        theirs.lora_B.copy_(ours.lora_B)
    return ours, theirs


@pytest.mark.parametrize("bias", [True, False])
def test_walkthrough_constructor(bias: bool) -> None:
    arguments = {"in_features": 12, "out_features": 20, "bias": bias}
    ours, theirs = LoRALinear(**arguments), document_class()(**arguments)
    for layer in (ours, theirs):
        assert layer.lora_A.shape == (8, 12) and layer.lora_B.shape == (20, 8)
        assert layer.lora_A.requires_grad and layer.lora_B.requires_grad
        assert not layer.linear.weight.requires_grad
        assert layer.linear.weight.shape == (20, 12) and (layer.linear.bias is None) is not bias
        assert not layer.lora_B.any()
        assert layer.scaling == 2.0
        assert type(layer.lora_dropout) is nn.Dropout and layer.lora_dropout.p == 0.0
    assert type(ours.linear) is nn.Linear


@pytest.mark.parametrize("bias", [True, False])
def test_walkthrough_forward(bias: bool) -> None:
    """Output and both gradients, the document's forward on its own class and on our layer."""
    ours, theirs = pair(bias=bias)
    x = torch.randn(5, 12)
    forward = run(WALKTHROUGH_FORWARD)["forward"]
    torch.testing.assert_close(forward(ours, x), ours(x))
    torch.testing.assert_close(theirs(x), ours(x))
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours.lora_A.grad, theirs.lora_A.grad)
    torch.testing.assert_close(ours.lora_B.grad, theirs.lora_B.grad)


def test_walkthrough_forward_drops_the_adapters_input_only() -> None:
    """With p = 1/2 every output is the base's plus twice some of the inputs' shares, in the document's forward and in ours."""
    ours, _ = pair(dropout=0.5)
    x = torch.zeros(2000, 12)
    x[:, 3] = 1.0  # one input: it is there, doubled, or not
    base, share = ours.linear(x[0]), ours.lora_delta()[:, 3]
    for y in (ours(x), run(WALKTHROUGH_FORWARD)["forward"](ours, x)):
        kept = (y - base).abs().amax(1) > 1e-6
        assert 0.45 < kept.float().mean() < 0.55
        torch.testing.assert_close(y[kept], (base + 2 * share).expand(int(kept.sum()), 20))


def test_walkthrough_merge() -> None:
    """`merge_weights` of the document on our layer leaves it as our own does: same weight, merged, adapter no longer applied."""
    ours, theirs = pair()
    document = copy.deepcopy(ours)
    x = torch.randn(5, 12)
    expected = ours(x)
    run(WALKTHROUGH_MERGE)["merge_weights"](document)
    ours.merge_weights()
    theirs.merge_weights()
    assert document.merged and ours.merged
    torch.testing.assert_close(document.weight, ours.weight)
    torch.testing.assert_close(theirs.linear.weight, ours.linear.weight)
    torch.testing.assert_close(document(x), expected)
    torch.testing.assert_close(ours(x), expected)
