"""Tasks on several processes: DPO's two forward passes, a new head, and metrics over all rows, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.data import ClassificationDataModule, InstructionDataModule
from lightning_lora.data.batching import Example, collate_answers, pad_right
from lightning_lora.tasks import CausalLMTask, DPOTask, Seq2SeqTask, SequenceClassificationTask
from lightning_lora.tasks.base import HFTask
from lightning_lora.utils.sharding import full_tensor
from tests import tiny_lm
from tests.distributed.nets import clean
from tests.distributed.runs import STRATEGIES
from tests.tasks import tiny

TARGETS = ["q_proj", "v_proj", "q", "v"]
PAIRS = [([5 + i, 6, 7], [8 + i % 4, 9, 3], [12, 13 + i % 3, 10, 3]) for i in range(8)]
LABELS = ["a", "b", "c"]


def pair_batch(rows: list[Any]) -> dict[str, torch.Tensor]:
    answers = [(prompt, answer) for which in (1, 2) for prompt, answer in ((row[0], row[which]) for row in rows)]
    return collate_answers([Example(p + a, [-100] * len(p) + a) for p, a in answers], pad=0)


def text_batch(rows: list[Any]) -> dict[str, torch.Tensor]:
    return {**pad_right([prompt + answer for prompt, answer, _ in rows], 0), "labels": torch.tensor([row[0][0] % 3 for row in rows])}


def target_batch(rows: list[Any]) -> dict[str, Any]:
    labels = torch.tensor([answer for _, _, answer in rows])
    return {**pad_right([prompt + answer for prompt, answer, _ in rows], 0), "labels": labels, "targets": ["green blue"] * len(rows)}


# Name → the task on a folder, and what makes a batch of rows.
TASKS: dict[str, tuple[Any, Any]] = {
    "dpo": (lambda folder: DPOTask(folder, beta=0.5), pair_batch),
    "seq2seq": (lambda folder: Seq2SeqTask(f"{folder}/t5", max_new_tokens=8), target_batch),
    "classification": (lambda folder: SequenceClassificationTask(folder, labels=LABELS), text_batch),
}


def optimizers(task: HFTask) -> Any:
    # With eps=1e-8 Adam's first steps would be the sign of gradients that are rounding noise, which differs between CPUs.
    return torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-2, eps=1e-3, foreach=False)


def train(strategy: str, name: str, folder: str) -> dict[str, Any]:
    """Two epochs of global batches of four rows, of which each process has its part: in validation four rows and two."""
    make, batch = TASKS[name]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and strategy != "single" else (0, 1)
    size = 4 // world
    training = [batch(PAIRS[i + rank * size : i + (rank + 1) * size]) for i in (0, 4)]
    validation = [batch([PAIRS[:6], PAIRS[:4], PAIRS[4:6]][(world > 1) + rank])]
    torch.manual_seed(1)
    task = make(folder)
    task.configure_optimizers = lambda: optimizers(task)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=STRATEGIES[strategy][0](),
        max_epochs=2,
        num_sanity_val_steps=0,
        callbacks=[LoRACallback(LoRAConfig(rank=2, target_modules=TARGETS, allow_unmatched=True), merge_on_fit_end=False)],
        enable_checkpointing=False,
        default_root_dir=folder,
        **quiet,
    )
    trainer.fit(task, DataLoader(training, batch_size=None), DataLoader(validation, batch_size=None))
    trained = {clean(n): full_tensor(p).detach().clone() for n, p in task.named_parameters() if p.requires_grad}
    return {"trained": trained, "metrics": {n: v.item() for n, v in trainer.callback_metrics.items() if n.startswith("val_")}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = Path(tmp_path_factory.mktemp("model"))
    tiny.save(path / "t5", "t5")
    return tiny_lm.save(path)


@pytest.fixture(scope="module")
def whole(folder: str) -> dict[str, dict[str, Any]]:
    return {name: train("single", name, folder) for name in TASKS}


def validate_rows(strategy: str, folder: str, file: str) -> dict[str, Any]:
    """One process reads the rows before the others. Each finds the labels, and measures its part."""
    world = dist.get_world_size() if dist.is_initialized() and strategy != "single" else 1
    torch.manual_seed(1)
    task, data = SequenceClassificationTask(folder), ClassificationDataModule(val=file, batch_size=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    callback = LoRACallback(LoRAConfig(rank=2, target_modules=["q_proj"]))
    trainer = L.Trainer(accelerator="cpu", devices=world, strategy=STRATEGIES[strategy][0](), callbacks=[callback], **quiet)
    metrics = trainer.validate(task, data, verbose=False)[0]
    return {"labels": task.labels, **metrics}


def validate_choices(strategy: str, folder: str, file: str) -> dict[str, Any]:
    world = dist.get_world_size() if dist.is_initialized() and strategy != "single" else 1
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", devices=world, strategy=STRATEGIES[strategy][0](), **quiet)
    return dict(trainer.validate(CausalLMTask(folder), InstructionDataModule(val=file, batch_size=2), verbose=False)[0])


def test_the_accuracy_of_choices_that_one_process_has(pool: Any, folder: str, tmp_path: Path) -> None:
    """The others would not log it, and the one would wait for them for ever."""
    content = [row if i == 1 else {"prompt": row["prompt"], "response": row["response"]} for i, row in enumerate(tiny_lm.rows(8))]
    file = tiny_lm.write(tmp_path / "rows.jsonl", content)
    whole = validate_choices("single", folder, file)
    assert "val_accuracy" in whole
    for result in pool.run(validate_choices, "ddp", folder, file):
        assert result == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "lora_fsdp2"])
def test_labels_and_metrics_of_rows_are_those_of_one_process(pool: Any, folder: str, tmp_path: Path, strategy: str) -> None:
    content = [{"text": "which colour is the sky", "label": "sky"}, {"text": "name a colour", "label": "a"}, {"text": "red", "label": "b"}]
    file = tiny_lm.write(tmp_path / "rows.jsonl", [content[i % 3] for i in (0, 1, 2, 1, 1, 0, 2, 0)])
    whole = validate_rows("single", folder, file)
    assert whole["labels"] == ["a", "b", "sky"]
    for result in pool.run(validate_rows, strategy, folder, file):
        assert result.pop("labels") == whole["labels"]
        assert result == pytest.approx({name: value for name, value in whole.items() if name != "labels"}, abs=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "lora_fsdp2"])
@pytest.mark.parametrize("name", TASKS)
def test_trains_and_measures_as_one_process_does(pool: Any, folder: str, whole: dict[str, Any], name: str, strategy: str) -> None:
    for result in pool.run(train, strategy, name, folder):
        assert result["metrics"] == pytest.approx(whole[name]["metrics"], abs=1e-5)
        assert result["trained"].keys() == whole[name]["trained"].keys()
        for key, tensor in result["trained"].items():
            torch.testing.assert_close(tensor, whole[name]["trained"][key], rtol=0, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
