"""Quantizing that fails half way, at any of its operations, leaves the model as it was; so does a run that is refused later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import LoRACallback, LoRAConfig, quantize_base
from lightning_lora.callbacks import lora
from lightning_lora.quantization.formats import format_of
from lightning_lora.utils.checksums import checksum
from tests.callbacks.test_quantized import Lit, fit
from tests.model.quantizing import each_format
from tests.quantized import inputs, plain_stack


class OutOfMemory(TorchDispatchMode):
    """Fails at one of torch's operations."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return op(*args, **(kwargs or {}))


def state(model: Any) -> Any:
    """All that a failed call must leave alone: bits and identities of tensors, flags, classes, attributes, hooks."""
    tensors = {name: (id(p), p.requires_grad, checksum(p)) for name, p in model.named_parameters()}
    modules = {
        name: (id(module), type(module), {key: len(value) if isinstance(value, dict) else value for key, value in vars(module).items()})
        for name, module in model.named_modules()
    }
    return tensors, modules


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
@each_format
def test_it_fails_at_any_operation(how: str, step: int) -> None:
    quantize_base(plain_stack(), how)  # the library is imported, and has allocated what it keeps
    model, at = plain_stack(), 1
    before, y = state(model), model(inputs())
    while True:
        try:
            with OutOfMemory(at):
                quantize_base(model, how)
            break
        except torch.OutOfMemoryError:
            assert state(model) == before and torch.equal(model(inputs()), y), at
        at += step
    assert at > 30 and format_of(model.up) is not None


@each_format
def test_a_run_that_is_refused_after_it(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether adapters cannot be made, or the run fails to start."""
    module = Lit()
    before = state(module.net)

    def failing(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    places: list[tuple[Any, str]] = [(lora, "inject"), (LoRACallback, "on_fit_start"), (Lit, "configure_optimizers")]
    for owner, name in places:
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(owner, name, failing)
            fit(tmp_path, module, LoRACallback(LoRAConfig(rank=2, target_modules=["up", "down"]), quantize=how))
        assert state(module.net) == before, name


@each_format
def test_the_plain_weights_are_freed(how: str, tmp_path: Path) -> None:
    """When the last is done, or the run has begun."""
    import weakref

    def freed(quantize: Callable[[Any], Any]) -> bool:
        module = Lit()
        kept = weakref.ref(module.net.up.weight.untyped_storage())
        quantize(module)
        return kept() is None

    assert freed(lambda module: quantize_base(module.net, how))
    callback = LoRACallback(LoRAConfig(rank=2, target_modules=["up", "down"]), quantize=how)
    assert freed(lambda module: fit(tmp_path, module, callback))
