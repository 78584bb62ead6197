"""Which modules a model's repeated blocks are: the same answer for compiling and for sharding."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torchmetrics import MeanMetric, MetricCollection

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.utils.blocks import repeated_blocks


class Block(nn.Module):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.fc, self.inner = nn.Linear(8, 8), inner or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(self.fc(x).relu())


def several(number: int) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(number))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nn.ModuleDict({"b": several(2)}), ["b.0", "b.1"]),
        (nn.Sequential(Block(), Block(), Block()), ["0", "1", "2"]),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2, enable_nested_tensor=False), ["layers.0", "layers.1"]),
        (nn.ModuleDict({"e": several(3), "d": several(2)}), ["e.0", "e.1", "e.2", "d.0", "d.1"]),  # all lists, not the longest one
        (nn.ModuleDict({"b": several(2), "head": several(1)}), ["b.0", "b.1"]),
        (nn.ModuleList([checkpoint_wrapper(Block()) for _ in range(2)]), ["0._checkpoint_wrapped_module", "1._checkpoint_wrapped_module"]),
        (nn.ModuleList([Block(nn.Sequential(Block(), Block())) for _ in range(2)]), ["0", "1"]),
        (nn.ModuleList([several(2) for _ in range(2)]), ["0.0", "0.1", "1.0", "1.1"]),
        (nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), []),
        (nn.Sequential(Block(), nn.ReLU()), []),
        (several(1), []),
        (nn.ModuleList([MetricCollection([MeanMetric()]) for _ in range(2)]), []),  # one a validation set
    ],
)
def test_the_outermost_elements_of_every_list_of_equals(model: nn.Module, names: list[str]) -> None:
    assert [name for name, _ in repeated_blocks(model)] == names
    assert all(model.get_submodule(name) is block for name, block in repeated_blocks(model))


def test_a_block_in_two_lists_comes_once() -> None:
    blocks = several(2)
    assert len(repeated_blocks(nn.ModuleDict({"a": blocks, "b": nn.ModuleList([blocks[1], blocks[0]])}))) == 2


def test_never_a_block_inside_a_block_whichever_list_comes_first() -> None:
    parts = several(2)
    model = nn.ModuleDict({"parts": parts, "blocks": nn.ModuleList(Block(part) for part in parts)})
    assert [name for name, _ in repeated_blocks(model)] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("adapted", [False, True])
def test_a_hugging_face_model_names_them_itself(adapted: bool) -> None:
    """Also a list of one, and though their class is another once they share work."""
    config = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_heads": 2, "vocab_size": 32}
    model: nn.Module = transformers.T5ForConditionalGeneration(transformers.T5Config(num_layers=2, num_decoder_layers=1, **config))
    if adapted:
        apply_lora(model, config=LoRAConfig(rank=2, target_modules=["q", "v"]))
    names = ["encoder.block.0", "encoder.block.1", "decoder.block.0"]
    assert [name for name, _ in repeated_blocks(model)] == names
    assert [name for name, _ in repeated_blocks(nn.ModuleDict({"net": model, "mine": several(3)}))] == [f"net.{name}" for name in names]
