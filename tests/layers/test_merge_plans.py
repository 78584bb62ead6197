"""Merging and unmerging are all or nothing: with a failure at operation after operation, nothing changes, and the next try is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import apply_lora, merge_lora, unmerge_lora
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import lora_layers
from lightning_lora.model.merge import unmerged
from tests.conftest import as_bits, fill
from tests.layers.experts import registered, tiny_qwen3_moe
from tests.quantized import QUANTIZERS, packed_stack

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.utils._python_dispatch")


@pytest.fixture(autouse=True)
def with_the_kind():
    with registered():
        yield


class FailsAt(TorchDispatchMode):
    """Raises out of memory instead of the n-th operation; with ``every`` also instead of each later one."""

    def __init__(self, n: int, every: bool = False) -> None:
        super().__init__()
        self.left, self.every = n, every

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0 or (self.every and self.left < 0):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return func(*args, **(kwargs or {}))


def net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 5), nn.Embedding(4, 3), nn.Conv2d(2, 3, 2)).to(dtype)


def tied() -> nn.Module:
    torch.manual_seed(2)
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False), "other": nn.Linear(4, 4)})
    model["head"].weight = model["embed"].weight
    return model


def experts() -> nn.Module:
    return nn.ModuleDict({"experts": tiny_qwen3_moe().get_submodule("model.layers.0.mlp.experts"), "last": nn.Linear(3, 3)})


Case = tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]  # model, fields of the config, how to merge
CASES: dict[str, Case] = {
    "fp32": (lambda: net(torch.float32), {}, {}),
    "bf16": (lambda: net(torch.bfloat16), {}, {}),
    "for good": (lambda: net(torch.float32), {}, {"reversible": False}),
    "dora": (lambda: net(torch.float32), {"variant": "dora"}, {}),
    "pissa": (lambda: net(torch.float32)[:1], {"init": "pissa"}, {}),
    "tied": (tied, {"target_modules": ["embed", "head", "other"]}, {"untie": True}),
    "experts": (experts, {"target_modules": ["experts", "last"]}, {}),
    "experts dora": (experts, {"target_modules": ["experts", "last"], "variant": "dora"}, {}),
    **{
        f"{name} {how}": (lambda name=name: packed_stack(name), {"target_modules": ["up", "down"]}, {"quantized": how})
        for name in QUANTIZERS
        for how in ("dequantize", "requantize")
    },
}


def made(case: str) -> tuple[nn.Module, dict[str, Any]]:
    make, fields, how = CASES[case]
    model = apply_lora(make(), config=LoRAConfig(**{"rank": 2, "target_modules": ["0", "1", "2"], "allow_unmatched": True} | fields))
    return fill(model), how


def bits(model: nn.Module) -> dict[str, Any]:
    """What every layer is and holds. Weights are compared as they dequantize."""
    return {
        name: (type(layer), layer.merged, sorted(layer.__dict__), as_bits(part.base_weight().detach()).numpy().tobytes(), adapter(layer))
        for name, layer in lora_layers(model)
        for part in layer.by_weight().values()
    }


def adapter(layer: Any) -> dict[str, Any]:
    return {name: as_bits(p).numpy().tobytes() for name, p in layer.lora_parameters().items()}


def bits_and_identities(model: nn.Module) -> tuple[dict[str, Any], dict[str, int]]:
    return bits(model), {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}


def failing_at_each(model: nn.Module, act: Callable[[nn.Module], Any], state: Callable[[nn.Module], Any], step: int) -> int:
    """Run ``act`` with a failure at every so many operations until it passes; returns how often it failed."""
    before, n = state(model), 0
    while True:
        try:
            with FailsAt(1 + n * step):
                act(model)
        except torch.OutOfMemoryError:
            assert state(model) == before, f"operation {1 + n * step}"
            n += 1
            continue
        assert state(model) != before
        return n


@pytest.mark.parametrize("case", CASES)
def test_a_merge_and_an_unmerge_are_all_or_nothing(case: str) -> None:
    model, how = made(case)
    clean, _ = made(case)
    step = 1 if case in ("pissa", "nf4 requantize") else 17 if "experts" in case else 5
    assert failing_at_each(model, lambda model: merge_lora(model, **how), bits_and_identities, step) > 5
    assert bits(merge_lora(clean, **how)) == bits(model)
    if how.get("reversible", True):
        # A weight that was replaced is merged again into a new one: its bits are the same, it is another object.
        failing_at_each(model, unmerge_lora, bits, step)
        assert bits(unmerge_lora(clean)) == bits(model)


def test_an_excursion_that_fails_on_its_way_back_leaves_the_model_unmerged() -> None:
    model, how = made("fp32")
    apart = bits(model)
    merged = bits(merge_lora(model, **how))
    n = 1
    while True:
        try:
            with unmerged(model):
                mode = FailsAt(n)
                mode.__enter__()
            mode.__exit__(None, None, None)
            break
        except torch.OutOfMemoryError:
            mode.__exit__(None, None, None)
            assert bits(model) == apart
            merge_lora(model, **how)
            n += 3
    assert n > 10 and bits(model) == merged


@pytest.mark.parametrize("case", ["fp32", "nf4 dequantize", "experts"])
def test_with_no_memory_at_all_what_stays_merged_says_so(case: str) -> None:
    """Taking back needs memory too. What cannot be taken back counts as merged: it is not merged twice, and comes back later."""
    model, how = made(case)
    before, clean = bits(model), bits(merge_lora(copy.deepcopy(model), **how))
    n, partial = 1, False
    while True:
        trial = copy.deepcopy(model)
        try:
            with FailsAt(n, every=True):
                merge_lora(trial, **how)
            break
        except torch.OutOfMemoryError:
            partial |= bits(trial) != before
            assert bits(merge_lora(copy.deepcopy(trial), **how)) == clean
            assert bits(unmerge_lora(trial)) == before
        n += 7
    assert partial == (case != "nf4 dequantize")  # packed weights go back without memory
