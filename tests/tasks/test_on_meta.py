"""Tasks whose model is built without its weights, which the callback loads one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import LoRACallback, LoRAConfig, lora_layers
from lightning_lora.data import InstructionDataModule
from lightning_lora.tasks import CausalLMTask, ImageClassificationTask, SequenceClassificationTask
from lightning_lora.tasks.hf import load_empty
from tests.tasks import tiny
from tests.tasks.tiny import fill, trainer


def fitted(folder: str, file: str, on_meta: bool, **options: Any) -> tuple[float, Any]:
    task = CausalLMTask(folder, on_meta=on_meta, learning_rate=1e-2)
    assert all(p.is_meta == on_meta for p in task.model.parameters())
    config = LoRAConfig(rank=2, target_modules=["q_proj", "down_proj"])
    callback = LoRACallback(config, merge_on_fit_end=False, weights=folder if on_meta else None, **options)
    task.on_fit_start = lambda: fill(task)  # type: ignore[assignment,method-assign,func-returns-value]
    run = trainer(callback, max_steps=3)
    run.fit(task, InstructionDataModule(train=file, batch_size=4, max_length=64))
    return run.callback_metrics["train_loss"].item(), task


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_a_fit_is_that_of_a_loaded_model(folder: str, file: str, quantize: str | None) -> None:
    options = {} if quantize is None else {"quantize": quantize}
    there, loaded = fitted(folder, file, False, **options)
    late, task = fitted(folder, file, True, **options)
    assert late == there
    for (_, mine), (_, theirs) in zip(lora_layers(task), lora_layers(loaded), strict=True):
        assert torch.equal(mine.lora_B, theirs.lora_B)


def test_the_dtype_is_the_one_asked_for_and_rotary_frequencies_stay_in_fp32(folder: str) -> None:
    for dtype, found in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        task = CausalLMTask(folder, on_meta=True, dtype=dtype)
        assert {p.dtype for p in task.model.parameters()} == {found} and task.model.training
        assert {b.dtype for name, b in task.model.named_buffers() if "inv_freq" in name} == {torch.float32}


@pytest.mark.parametrize(("kind", "task"), [("vit", ImageClassificationTask), ("bert", SequenceClassificationTask)])
def test_tasks_with_labels(kind: str, task: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty, loaded = (task(tiny.save(tmp_path / kind, kind), labels=["sky", "sea"], on_meta=on_meta) for on_meta in (True, False))
    assert all(p.is_meta for p in empty.model.parameters())
    assert len([line for line in caplog.messages if line.startswith("Not in")]) == 1  # of the loaded one: the other's is not read yet
    if kind == "vit":
        parts = [[positions for _, positions in each.parts({"pixel_values": [None]})] for each in (empty, loaded)]
        assert parts[0] == parts[1]


def test_a_folder_without_the_weights_is_refused_by_that(folder: str, file: str, tmp_path: Path) -> None:
    other = tiny.save(tmp_path / "bert", "bert")
    callback = LoRACallback(LoRAConfig(rank=2, target_modules=["q_proj"]), weights=other)
    with pytest.raises(ValueError, match=r"weights has no 'model\.embed_tokens\.weight'"):
        trainer(callback, max_steps=1).fit(CausalLMTask(folder, on_meta=True), InstructionDataModule(train=file))


def test_gguf_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match=r"on_meta=True reads weights one by one from safetensors files, and gguf_file='x.gguf' has none"):
        load_empty(CausalLMTask.auto_class, folder, "x.gguf")
