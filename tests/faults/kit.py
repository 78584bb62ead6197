"""What the fault tests share: a small net, and what a refusal is held to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters
from tests.conftest import snapshot

row = pytest.mark.row


def case(number: int, name: str, *values: Any) -> Any:
    """One case of a parametrized test, of one row of the table."""
    return pytest.param(*values, marks=row(number), id=f"row{number:02}_{name}")


CONFIG = LoRAConfig(rank=2, alpha=4, target_modules=["q_proj", "v_proj"])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.norm = nn.Linear(width, width), nn.Linear(width, width, bias=False), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.q_proj(x).tanh() * self.v_proj(x))


class Net(nn.Module):
    """An embedding, two blocks, and a head that may be tied to the embedding."""

    def __init__(self, width: int = 12, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 16, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def projections(model: Net) -> list[nn.Module]:
    return [module for layer in model.layers for module in (layer.q_proj, layer.v_proj)]


IDS = torch.arange(8).reshape(2, 4)


def net(seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**kwargs).to(dtype)


def adapted(config: LoRAConfig = CONFIG, seed: int = 0, std: float = 0.1, **kwargs: Any) -> Net:
    """A net whose adapters do something, as after training."""
    model = apply_lora(net(seed, **kwargs), config=config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in get_lora_parameters(model):
            parameter.normal_(std=std, generator=generator)
    return model


class Int8Linear(nn.Linear):
    """A quantized linear: its weight is whole numbers, unpacked in the forward pass."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, bias=False)
        self.weight = nn.Parameter(torch.randint(-127, 128, (width, width), dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) / 127)


def disk_bits(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@contextmanager
def refused(*said: str, model: nn.Module | None = None, error: type[Exception] = ValueError, folder: Path | None = None) -> Iterator[None]:
    """What runs inside raises this type, or a subclass of our own, with these texts, and changes nothing in the model or on the disk."""
    model_before, disk_before = model and snapshot(model), folder and disk_bits(folder)
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error or type(caught.value).__module__.startswith("lightning_lora.")  # no JSONDecodeError
    for text in said:
        assert text in str(caught.value), f"{text!r} is not in {caught.value}"
    assert (model and snapshot(model)) == model_before
    assert (folder and disk_bits(folder)) == disk_before


def known(number: int, why: str) -> Any:
    """A mark for a fault of a row that is not mended yet. The test states what is right; that it passes is an error then."""
    return pytest.mark.xfail(strict=True, reason=f"row {number}: {why}")


class Crash(Exception):
    pass


STEPS = ("fsync", "replace", "unlink")


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> list[int]:
    """Let the step-th of the calls that change the disk fail; returns the counter."""
    count = [0]

    def wrap(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == step:
                raise error
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    return count
