"""``LoRACallback(offload=..., checkpointing=...)`` through fit. What ``compile`` does is in test_compile.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRACallback, merge_lora, unmerge_lora
from lightning_lora.callbacks.refusals import check_one_device
from lightning_lora.model import checkpointing, offload, offload_frozen
from tests.callbacks.test_compile import CONFIG, Deep, LitDeep
from tests.lit import bits, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")


class Checkpointed(Deep):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def fit(folder: Path, net: type[Deep], how: Any) -> tuple[list[float], LoRACallback]:
    torch.manual_seed(5)
    module = LitDeep()
    module.net.__class__ = net  # type: ignore[union-attr, assignment]
    callback = LoRACallback(CONFIG, offload=how)
    trainer(folder, callback, max_epochs=2).fit(module)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())
    return module.losses, callback


def test_a_run_is_equal_to_the_bit_and_the_log_says_how_much_was_moved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "MINIMUM", 1)
    expected, _ = fit(tmp_path, Checkpointed, None)
    with caplog.at_level("INFO", "lightning.pytorch"):
        losses, callback = fit(tmp_path, Checkpointed, "activations")
    assert losses == expected
    assert caplog.text.count("GiB of activations went to host memory between the passes.") == 1
    assert copy.deepcopy(callback).offload == "activations"


def test_blocks_without_checkpoints_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "MINIMUM", 1)
    with pytest.warns(UserWarning, match=r"moved \d+ tensors of 3 blocks in one batch\. Switch on gradient checkpointing"):
        fit(tmp_path, Deep, "activations")


def test_the_log_says_if_nothing_was_moved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning.pytorch"):
        fit(tmp_path, Checkpointed, "activations")
    assert "no activation, as none has 1,048,576 bytes, went to host memory" in caplog.text


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"offload='weights' is not known; it is None, 'activations', 'frozen' or a list of both"):
        LoRACallback(offload=["frozen", "weights"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"checkpointing='some' is not known; it is None, 'full' or 'selective'"):
        LoRACallback(checkpointing="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"offload='frozen' with cuda_graphs=True"):
        LoRACallback(offload="frozen", compile="layer", cuda_graphs=True)
    with pytest.raises(ValueError, match=r"offload='activations' with cuda_graphs=True"):
        LoRACallback(offload="activations", compile="layer", cuda_graphs=True)


@pytest.mark.parametrize("strategy", [DDPStrategy, FSDPStrategy, ModelParallelStrategy])
def test_weights_are_offloaded_on_one_device_only(strategy: type) -> None:
    check_one_device(SingleDeviceStrategy("cpu"))
    with pytest.raises(ValueError, match=rf"offload='frozen' with strategy={strategy.__name__}: it is for one device"):
        check_one_device(strategy())


def test_frozen_weights_wait_in_host_memory_and_the_run_is_equal_to_the_bit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation, checkpoints, the merge at the end, a test of the best checkpoint, and the way back."""
    monkeypatch.setattr(offload_frozen, "MINIMUM", 1)
    monkeypatch.setattr(offload, "MINIMUM", 1)
    found = []
    for how in (None, "frozen", ["activations", "frozen"]):
        folder = tmp_path / str(len(found))
        torch.manual_seed(5)
        module = LitDeep()
        best = ModelCheckpoint(folder, filename="best", enable_version_counter=False)
        callback = LoRACallback(CONFIG, offload=how, checkpointing="full")  # type: ignore[arg-type]
        runner = trainer(folder, callback, best, max_epochs=2)
        with caplog.at_level("INFO", "lightning.pytorch"):
            runner.fit(module)
        merged = bits(module)
        tested = runner.test(module, ckpt_path="best", verbose=False)
        unmerge_lora(module)
        saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
        found.append((module.losses, merged, tested, bits(module), saved))
        assert not any("_apply" in vars(each) or isinstance(each, checkpointing.Checkpointed) for each in module.modules())
        merge_lora(copy.deepcopy(module))
    assert caplog.text.count("GiB of frozen weights wait in host memory.") == 4  # fit and test
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


@pytest.mark.parametrize(("how", "kept"), [("full", "inputs"), ("selective", "attention")])
def test_checkpoints_are_on_in_fit_only(how: Any, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = checkpointing.checkpoint
    monkeypatch.setattr(checkpointing, "checkpoint", lambda *args, **kwargs: seen.append(kwargs) or original(*args, **kwargs))
    losses = []
    for mode in (None, how):
        torch.manual_seed(5)
        module = LitDeep()
        callback = LoRACallback(CONFIG, checkpointing=mode)
        runner = trainer(tmp_path, callback, max_epochs=1)
        runner.fit(module)
        losses.append(module.losses)
        assert not any(isinstance(each, checkpointing.Checkpointed) for each in module.modules())
    assert losses[0] == losses[1]
    assert len(seen) == 3 * 4 and all(("context_fn" in kwargs) == (kept == "attention") for kwargs in seen)
    runner.test(module, verbose=False)
    assert len(seen) == 3 * 4


def test_a_refused_run_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    module = LitDeep()
    before, classes = bits(module), [type(each) for each in module.modules()]
    handle = checkpointing.checkpoint_layers(module)
    with pytest.raises(ValueError, match=r"net\.blocks\.0 has gradient checkpointing switched on already"):
        trainer(tmp_path, LoRACallback(CONFIG, checkpointing="full", offload="frozen"), max_epochs=1).fit(module)
    handle.remove()
    assert [type(each) for each in module.modules()] == classes
    torch.testing.assert_close(bits(module), before, rtol=0, atol=0)
