"""Runs of the task on packed rows."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.data import InstructionDataModule
from lightning_lora.tasks import CausalLMTask
from lightning_lora.tasks.packed_attention import NAME
from tests.tasks.packing_models import model

pytestmark = pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")


class Gradients(L.Callback):
    """Notes each step's loss and gradients."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, dict[str, Tensor]]] = []

    def on_before_optimizer_step(self, trainer: Any, module: nn.Module, optimizer: Any) -> None:
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        self.steps.append((trainer.callback_metrics["train_loss"].item(), gradients))


def fit(task: L.LightningModule, data: InstructionDataModule, steps: int = 1, **options: Any) -> Gradients:
    noted = Gradients()
    lora = LoRACallback(LoRAConfig(rank=2, target_modules=["q_proj", "v_proj"]), merge_on_fit_end=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, callbacks=[lora, noted], **quiet, **options)
    trainer.fit(task, data)
    return noted


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", [None, "sdpa", "eager"])
def test_a_step_equals_that_on_padded_rows(attention: str | None, checkpointing: bool, folder: str, file: str) -> None:
    """All ten rows in one batch, padded and packed: the mean over the same answer tokens."""

    def run(**data: Any) -> tuple[float, dict[str, Tensor]]:
        torch.manual_seed(0)
        task = CausalLMTask(folder, attn_implementation=attention, gradient_checkpointing=checkpointing, padding_free=False)
        (step,) = fit(task, InstructionDataModule(file, val=file, **data)).steps
        expected = NAME if attention is None and len(data) > 1 else attention or "sdpa"
        assert task.model.config._attn_implementation == expected
        return step

    padded_loss, padded = run(batch_size=10)
    limit = 1e-5 * max(gradient.abs().max().item() for gradient in padded.values())
    loss, gradients = run(batch_size=4, packing=True, max_length=40)
    assert math.isclose(loss, padded_loss, rel_tol=1e-5) and len(gradients) == 8
    torch.testing.assert_close(gradients, padded, rtol=0, atol=max(limit, 1e-7))


def test_the_log_says_how_full_rows_are_and_which_attention_they_have(folder: str, file: str, caplog: pytest.LogCaptureFixture) -> None:
    """Once, and validation on padded rows has the same metrics as before."""
    caplog.set_level("INFO")
    noted = fit(CausalLMTask(folder), InstructionDataModule(file, val=file, batch_size=1, packing=True, max_length=40), steps=3)
    assert len(noted.steps) == 3
    said = [record.message for record in caplog.records]
    assert sum("10 examples packed into" in line and "rows of 40 tokens" in line for line in said) == 1
    assert sum(f"LlamaForCausalLM keeps documents apart with attention '{NAME}'" in line for line in said) == 1


def test_a_model_that_mixes_documents_is_refused_before_it_trains(folder: str, file: str) -> None:
    task = CausalLMTask(folder)
    task.model = model("Lfm2", torch.float32)
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"data.packing or model.padding_free is on, but Lfm2ForCausalLM does not keep packed documents apart"
    ):
        fit(task, InstructionDataModule(file, val=file, batch_size=2, packing=True, max_length=40))
    after = task.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pack_length": 64}, "data.pack_length=64 has no effect without packing"),
        ({"packing": True, "pack_length": 63, "max_length": 64}, "data.pack_length=63 is less than data.max_length=64"),
        ({"packing": True, "max_length": 60, "pad_to_multiple_of": 8}, "data.pack_length=60 is no multiple of data.pad_to_multiple_of=8"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InstructionDataModule("train.jsonl", **options)


def test_an_attention_that_does_not_exist_is_one_line(folder: str) -> None:
    with pytest.raises(ValueError, match=r"model.attn_implementation='quick': .*Leave it out, or use sdpa or eager"):
        CausalLMTask(folder, attn_implementation="quick")
