"""What only a GPU shows of memory: copies on a stream of their own come in time, and give memory back. Skipped where there is none."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_lora import LoRACallback, LoRAConfig, checkpoint_layers, compile_layers, offload_activations, offload_frozen
from tests.test_gpu import DEVICE, Lit, batch, error, llama, run
from tests.test_gpu import pytestmark as pytestmark


def unequal(found: list[Tensor], expected: list[Tensor]) -> list[int]:
    """Which tensors are not equal to the bit."""
    return [k for k, (a, b) in enumerate(zip(found, expected, strict=True)) if not torch.equal(a, b)]


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without it attention's gradients, and those of the gated MLP's kernel, differ from run to run by the order of sums."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("compiled", [False, True])
def test_offloaded_activations_change_no_bit(compiled: bool) -> None:
    """A copy that is read too early, or whose source is overwritten too early, changes gradients. With six blocks memory is reused."""
    model = llama(6)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compiled:
        compile_layers(model)
    expected = run(model)
    handle = offload_activations(model)
    for _ in range(5):
        assert not unequal(run(model), expected)
    assert 5 * 6 <= handle.tensors <= 5 * (6 + 4)  # the last norm, which is behind the blocks, saves some too


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(("quantize", "compiled"), [(None, False), (None, True), ("nf4", False), ("fp8", True)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_offloaded_weights_change_no_bit(quantize: str | None, compiled: bool, checkpointed: bool) -> None:
    """A weight that is read before it is there, or overwritten while it is read, changes gradients."""
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    model = llama(6, quantize=quantize)
    if checkpointed:
        checkpoint_layers(model)
    if compiled:
        compile_layers(model)
    expected = run(model)
    before = allocated()
    handle = offload_frozen(model, DEVICE)
    assert before - allocated() == pytest.approx(handle.bytes, rel=0.05)
    for _ in range(5):
        assert not unequal(run(model), expected)
    assert before - allocated() == pytest.approx(handle.bytes * 4 / 6, rel=0.1)  # two blocks are there
    handle.rest()
    assert all(p.device.type == "cpu" and p.is_pinned() for place in handle._places for p in place.weights)


def allocated() -> int:
    """Bytes of the device that are in use, as they were asked for: the allocator may give up to 1 MiB more to each."""
    gc.collect()
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("compiled", [False, True])
def test_selective_checkpoints_are_as_exact(compiled: bool) -> None:
    model = llama(6, dropout=0.0 if compiled else 0.1)  # compiled graphs draw in another order
    if compiled:
        compile_layers(model)

    def seeded() -> list[Tensor]:
        torch.manual_seed(3)
        return run(model)

    expected, memory = seeded(), peak(model)
    checkpoint_layers(model)
    print(error(seeded(), expected), peak(model) / memory)
    assert error(seeded(), expected) < (0.03 if compiled else 1e-12)  # another fusion rounds differently
    assert peak(model) < 0.8 * memory


def peak(model: Any) -> int:
    """What a step takes beyond what is there before."""
    torch.cuda.reset_peak_memory_stats()
    before = allocated()
    run(model)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_a_run_with_everything_offloaded_trains_saves_and_merges_the_same(quantize: str | None, tmp_path: Path) -> None:
    def fit(offload: Any) -> tuple[list[float], dict[str, Tensor], dict[str, Any]]:
        torch._dynamo.reset()
        module, folder = Lit(1e-3), tmp_path / str(bool(offload))
        module.model = module.model.cpu()
        callback = LoRACallback(
            LoRAConfig(rank=16, target_modules="all-linear"), quantize=quantize, merge_quantized=quantize and "dequantize",
            offload=offload, checkpointing="selective",
        )  # fmt: skip
        checkpoints = L.pytorch.callbacks.ModelCheckpoint(folder, filename="last", enable_version_counter=False)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(accelerator="gpu", devices=1, max_epochs=1, callbacks=[callback, checkpoints], default_root_dir=folder, **quiet)
        L.seed_everything(0)
        trainer.fit(module, torch.utils.data.DataLoader([batch(k) for k in range(4)], batch_size=None))
        saved = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
        return module.losses, saved, {name: tensor.cpu() for name, tensor in module.state_dict().items()}

    plain, offloaded = fit(None), fit(["activations", "frozen"])
    assert plain[0] == offloaded[0]
    for mine, theirs in zip(plain[1:], offloaded[1:], strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key].cpu(), theirs[key].cpu()) for key in mine)
