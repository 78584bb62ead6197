"""``LoRACallback(offload="activations")`` through fit. What ``compile`` does is in test_compile.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRACallback
from lightning_lora.model import offload
from tests.callbacks.test_compile import CONFIG, Deep, LitDeep
from tests.lit import trainer

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
    with pytest.raises(ValueError, match=r"offload='weights' is not known; it is None or 'activations'"):
        LoRACallback(offload="weights")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"offload='activations' with cuda_graphs=True"):
        LoRACallback(offload="activations", compile="layer", cuda_graphs=True)
