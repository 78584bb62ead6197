"""Rows that are read while the model trains: what comes, in which order, and how a run goes on."""

import json
from itertools import islice
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.data import ClassificationDataModule, InstructionDataModule
from lightning_lora.data.records import NothingToLearn
from lightning_lora.data.stream import Stream
from lightning_lora.tasks import SequenceClassificationTask
from tests import tiny_lm
from tests.tasks import tiny
from tests.tasks.tiny import trainer

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


def stream(rows=range(10), encode=lambda row: ([row], {}), **options):
    return Stream(lambda: ((f"file:{row}", row) for row in rows), encode, seed=0, **options)


def test_every_row_comes_once_a_pass_in_an_order_of_its_own():
    rows = list(islice(stream(buffer=3), 30))
    assert rows != sorted(rows) and rows == list(islice(stream(buffer=3), 30))
    assert all(rows.count(row) in (2, 3, 4) for row in range(10))  # those that wait belong to the next pass
    assert list(islice(stream(buffer=1), 12)) == [*range(10), 0, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_workers_share_the_rows(workers):
    seen = []
    for rank in range(2):
        loader = DataLoader(stream(range(16), rank=rank, world=2, buffer=1), batch_size=2, num_workers=workers, collate_fn=list)
        batches = list(islice(loader, 4))
        seen += [row for batch in batches for row in batch]
    assert sorted(seen) == list(range(16))


def test_bad_rows_are_named():
    def refuse(row):
        raise ValueError("is bad")

    with pytest.raises(ValueError, match=r"^file:0: is bad$"):
        next(iter(stream(encode=refuse)))
    with pytest.raises(ValueError, match=r"^file:0: the row loses its answer to max_length \(99 tokens\); raise data.max_length"):
        next(iter(stream(encode=lambda row: ([], {"lost": " (99 tokens)"}))))
    for rows, encode in (([], None), (range(3), lambda row: ([], {"empty": ""}))):
        with pytest.raises(ValueError, match="none is left for process 1 of 1"):
            next(iter(stream(rows, encode)))


def test_rows_that_teach_nothing_are_left_out():
    def encode(row):
        if row % 2:
            raise NothingToLearn
        return [row], {}

    assert list(islice(stream(encode=encode, buffer=1), 6)) == [0, 2, 4, 6, 8, 0]


class Watch(L.LightningModule):
    """Notes the rows of every batch, by their lengths, which all differ."""

    def __init__(self):
        super().__init__()
        self.tokenizer = tiny_lm.tokenizer()
        self.linear = nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["attention_mask"].sum(1).tolist())
        return self.linear(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.seen.append("val")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, file: str, ckpt=None, steps=9, limit=1.0, **options):
    torch.manual_seed(0)
    module = Watch()
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    lora = LoRACallback(LoRAConfig(rank=1, target_modules=["linear"]), merge_on_fit_end=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    often = {"limit_train_batches": limit, "max_steps": steps, "max_epochs": -1, "val_check_interval": 4, "check_val_every_n_epoch": None}
    trainer = L.Trainer(accelerator="cpu", callbacks=[lora, keep], **often, **quiet)
    trainer.fit(module, InstructionDataModule(file, file, batch_size=4, streaming=True, **options), ckpt_path=ckpt)
    return [batch for batch in module.seen if batch != "val"], module.seen.count("val")


@pytest.fixture
def file(tmp_path):
    return tiny_lm.write(tmp_path / "rows.jsonl", [{"prompt": "sky " * (i + 1), "response": "blue"} for i in range(24)])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_with_the_next_rows(file, tmp_path, workers):
    whole, validations = fit(tmp_path / "whole", file, num_workers=workers)
    assert len(whole) == 9 and validations == 12
    assert fit(tmp_path / "rest", file, str(tmp_path / "whole" / "step=5.ckpt"), num_workers=workers)[0] == whole[5:]


def test_what_ends_the_run_has_to_be_said(file, tmp_path):
    with pytest.raises(ValueError, match=r"data.streaming has no end; set trainer.max_steps"):
        fit(tmp_path, file, steps=-1)
    with pytest.raises(
        ValueError, match=r"limit_train_batches=4 begins data.streaming anew in each epoch, with the same rows; set trainer"
    ):
        fit(tmp_path / "anew", file, limit=4)
    assert len(fit(tmp_path / "once", file, steps=4, limit=4)[0]) == 4  # one epoch
    with pytest.raises(ValueError, match=r"data.val=0.1 is a share of the training rows, which data.streaming never has as a whole"):
        InstructionDataModule(file, 0.1, streaming=True)
    Path(file).write_text(json.dumps({"prompt": "a"}))
    with pytest.raises(ValueError, match=r"rows.jsonl:1: no 'response'"):
        fit(tmp_path / "bad", file)


def test_a_row_beyond_the_models_positions_is_named():
    rows = stream(encode=lambda row: (["x" * row], {}), buffer=1)
    rows.positions = 4
    with pytest.raises(ValueError, match=r"^file:5: the row has 5 tokens, .* end at 4; set data.max_length: 4$"):
        list(islice(rows, 10))


def test_the_limit_of_a_stream_is_the_models(tmp_path):
    file = tiny_lm.write(tmp_path / "rows.jsonl", [{"text": "sky", "label": "a"}, {"text": "sky " * 70, "label": "b"}])
    run = trainer(max_steps=4)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: the row has \d+ tokens, .* end at 64"):
        run.fit(
            SequenceClassificationTask(tiny.save(tmp_path / "bert", "bert"), labels=["a", "b"]),
            ClassificationDataModule(train=file, streaming=True),
        )
