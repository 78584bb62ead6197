"""What all tasks share, where no test of one task has it."""

import pytest
import torch
import transformers

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.data import InstructionDataModule
from lightning_lora.tasks import CausalLMTask
from tests import tiny_lm
from tests.tasks import tiny


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_half_precision_rounds_weights_and_no_rotary_frequencies(precision, tmp_path):
    """As ``from_pretrained`` in that dtype: frequencies of 8 bits turn the positions of long rows by radians."""
    folder = tiny_lm.save(tmp_path / "model")
    file = tiny_lm.write(tmp_path / "rows.jsonl", tiny_lm.rows(4))
    task = CausalLMTask(folder)
    rotary = task.model.model.rotary_emb
    before = rotary.inv_freq.clone()
    lora = LoRACallback(LoRAConfig(rank=2, target_modules=["q_proj"]), merge_on_fit_end=False)
    tiny.trainer(lora, precision=precision, max_steps=1, limit_val_batches=0).fit(task, InstructionDataModule(train=file))
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}[precision]
    assert task.model.lm_head.weight.dtype == dtype
    if precision == "64-true":
        assert rotary.inv_freq.dtype == torch.float64
        return
    assert rotary.inv_freq.dtype == torch.float32 and torch.equal(rotary.inv_freq, before)
    assert not torch.equal(before.to(dtype).float(), before)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert torch.equal(theirs.model.rotary_emb.inv_freq, before)


def test_a_task_moves_with_all_its_buffers(tmp_path):
    task = CausalLMTask(tiny_lm.save(tmp_path / "model"))
    assert task.to("meta", torch.bfloat16).model.model.rotary_emb.inv_freq.is_meta


def test_a_full_fine_tune_comes_back_from_its_checkpoint_without_a_trainer(tmp_path):
    task = CausalLMTask(tiny_lm.save(tmp_path / "model"))
    file = tiny_lm.write(tmp_path / "rows.jsonl", tiny_lm.rows(4))
    run = tiny.trainer(max_steps=1, limit_val_batches=0)
    run.fit(task, InstructionDataModule(train=file))
    run.save_checkpoint(tmp_path / "x.ckpt")
    there = CausalLMTask.load_from_checkpoint(tmp_path / "x.ckpt").state_dict()
    assert all(torch.equal(value, there[name]) for name, value in task.state_dict().items())
