"""Where a step waits for the device: a value that decides what is launched next."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.data.batching import collate_answers
from lightning_lora.ops.cross_entropy import POSITIONS, WHOLE
from lightning_lora.tasks import CausalLMTask, base
from tests import tiny_lm
from tests.tasks.test_causal_lm import Whole
from tests.tiny_lm import load_examples


@pytest.fixture
def examples(tmp_path):
    return load_examples(tiny_lm.write(tmp_path / "val.jsonl", tiny_lm.rows()), tiny_lm.tokenizer(), 64, "val")


@pytest.fixture(params=[LlamaForCausalLM, Whole])
def task(request, monkeypatch):
    model = tiny_lm.llama(cls=request.param)
    monkeypatch.setattr(base, "load_model", lambda *args: model)
    monkeypatch.setattr(base, "load_tokenizer", lambda *args: tiny_lm.tokenizer())
    made = CausalLMTask("any")
    apply_lora(made, config=LoRAConfig(rank=2, target_modules=["q_proj"]))
    monkeypatch.setattr(made, "log", lambda *args, **kwargs: None)
    return made


class Waits(TorchDispatchMode):
    """Notes the operators that, on a GPU, wait until it has computed all before: their results decide what is launched next."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = function is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masks or function in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_step_waits_only_where_transformers_does(task, examples):
    """Without the answers' positions in the batch, the task has to look for them. Loss and gradients are the same."""
    batch = collate_answers(examples, pad=0)
    assert batch[POSITIONS].tolist() == [
        row * batch["labels"].shape[1] + t for row, e in enumerate(examples) for t in range(1, len(e)) if e.labels[t] != -100
    ]
    found, losses = [], []
    for given in (batch, {name: value for name, value in batch.items() if name != POSITIONS}):
        with Waits() as waits:
            losses.append(task.training_step(given, 0))
            losses[-1].backward()
        found.append(waits.found)
    with Waits() as theirs:
        task.model.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    assert found[0] == theirs.found and len(found[1]) == len(theirs.found) + 1
    assert losses[0].equal(losses[1])


def test_a_batch_without_padding_waits_for_nothing(task, examples):
    batch, padded = collate_answers(examples[:1] * 2, pad=0), collate_answers(examples, pad=0)
    assert batch[WHOLE] and WHOLE not in padded and WHOLE not in collate_answers(examples[:1], pad=0, multiple=len(examples[0]) + 1)
    with Waits() as waits:
        loss = task.training_step(batch, 0)
        loss.backward()
    assert not waits.found
    torch.testing.assert_close(loss, task.training_step({name: value for name, value in batch.items() if name != WHOLE}, 0))
