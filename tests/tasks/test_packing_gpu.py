"""Packed rows on a GPU, through Trainer. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch._dynamo import config

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.data import InstructionDataModule
from lightning_lora.tasks import CausalLMTask
from lightning_lora.tasks.packed_attention import NAME
from tests import tiny_lm

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("default"),  # a GPU's torch is often another release, with warnings of its own
]


class Losses(L.Callback):
    """Notes the losses. From the fourth step on nothing may be compiled anew."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        config.error_on_recompile = len(self.found) >= 3

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.found.append(trainer.callback_metrics["train_loss"].item())


def train(folder: str, file: str, attention: str | None = None, **options: Any) -> list[float]:
    L.seed_everything(0)
    torch._dynamo.reset()
    task, losses = CausalLMTask(folder, dtype="bfloat16", attn_implementation=attention, learning_rate=1e-2), Losses()
    lora = LoRACallback(LoRAConfig(rank=4, target_modules="all-linear"), merge_on_fit_end=False, **options)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="gpu", devices=1, precision="bf16-true", max_steps=8, callbacks=[lora, losses], **quiet)
    try:
        trainer.fit(task, InstructionDataModule(file, batch_size=2, packing=True, max_length=64))
    finally:
        config.error_on_recompile = False
    assert task.model.config._attn_implementation == (attention or NAME)
    return losses.found


def test_every_way_gives_the_losses_of_sdpa(tmp_path: Path) -> None:
    """The kernel for documents of varying length eagerly, compiled, and recorded as CUDA graphs."""
    folder, file = tiny_lm.save(tmp_path / "model"), tiny_lm.write(tmp_path / "train.jsonl", tiny_lm.rows(60))
    expected = train(folder, file, "sdpa")
    assert len(expected) == 8 and expected[-1] < expected[0]
    for options in ({}, {"compile": "layer"}, {"compile": "layer", "cuda_graphs": True}):
        assert train(folder, file, **options) == pytest.approx(expected, rel=0.03), options
