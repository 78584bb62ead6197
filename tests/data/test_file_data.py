"""Splits, counts, the cache and the processes that encode, on the module for language models."""

import json
import logging
import os
import signal
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import lightning
import pytest
import torch

from lightning_lora.data import InstructionDataModule, cache, encoding, file_data
from lightning_lora.data.batching import Example
from lightning_lora.data.encoding import encode_rows
from lightning_lora.data.file_data import FileDataModule
from lightning_lora.data.records import PlainText
from lightning_lora.data.store import Examples
from tests import tiny_lm

ROW = {"prompt": "which colour is the sky", "response": "blue"}


def rows(n):
    return [{"prompt": "sky " * (i + 1), "response": "blue"} for i in range(n)]


def module(**options):
    data = InstructionDataModule(**options)
    data._tokenizer = tiny_lm.tokenizer()
    return data


@pytest.fixture
def kept(tmp_path):
    return tmp_path / "kept"


def encoded(monkeypatch):
    """Count the rows that are encoded."""
    calls: list[Any] = []
    original = InstructionDataModule.encode
    monkeypatch.setattr(InstructionDataModule, "encode", lambda self, record, split: calls.append(record) or original(self, record, split))
    return calls


def test_a_share_for_validation_is_drawn_by_the_seed(tmp_path):
    file = tiny_lm.write(tmp_path / "rows.jsonl", rows(20))

    def split(**options):
        data = module(train=file, **options)
        data.setup("fit")
        return [sorted(data.examples[name].lengths) for name in ("train", "val")]

    train, val = split(val=0.2)
    assert (len(train), len(val)) == (16, 4) and not set(train) & set(val)
    assert split(val=0.2) == [train, val] != split(val=0.2, seed=1)
    assert split(val="0.2") == [train, val]
    for share in (0, 1, 1.5, -0.1):
        with pytest.raises(ValueError, match=f"data.val={share} must be a share of the training rows between 0 and 1"):
            module(train=file, val=share)
    assert [len(part) for part in split(val=0.01)] == [19, 1]  # a share is at least one row
    with pytest.raises(ValueError, match=r"data.val=0.99 of 20 training rows leaves none to train on; add rows"):
        split(val=0.99)


def test_several_sources_are_one(tmp_path):
    one = tiny_lm.write(tmp_path / "one.jsonl", rows(2))
    (tmp_path / "two.csv").write_text("prompt,response\nsky,blue\n")
    data = module(train=[one, str(tmp_path / "two.csv")])
    data.setup("fit")
    assert len(data.examples["train"]) == 3
    tiny_lm.write(tmp_path / "two.jsonl", [{"prompt": "a"}])
    with pytest.raises(ValueError, match=r"two.jsonl:1: no 'response'"):
        module(train=[one, str(tmp_path / "two.jsonl")]).load("train")


def test_columns_and_format(tmp_path):
    file = tiny_lm.write(tmp_path / "rows.jsonl", [{"question": "sky", "reply": "blue"}])
    assert len(module(train=file, columns={"prompt": "question", "response": "reply"}).load("train")) == 1
    with pytest.raises(ValueError, match=r"rows.jsonl:1: no 'text' among the keys"):
        module(train=file, format="text").load("train")
    with pytest.raises(ValueError, match=r"data.format='sharegpt' is not known; the formats are"):
        module(train=file, format="sharegpt")
    labelled = tiny_lm.write(tmp_path / "labels.jsonl", [{"text": "sky", "label": "blue"}])
    with pytest.raises(ValueError, match=r"labels.jsonl:1: InstructionDataModule takes a conversation or a text, .* a text with a label"):
        module(train=labelled).load("train")


def test_what_is_cut_dropped_or_empty_is_counted_and_said(tmp_path, caplog):
    content = [*rows(3), {**ROW, "response": "blue " * 30}, {"text": " "}, {"text": "\t\n"}]
    file = tiny_lm.write(tmp_path / "rows.jsonl", content)
    with (
        caplog.at_level(logging.INFO, "lightning.pytorch"),
        pytest.warns(UserWarning, match=r"1 of 6 rows are cut to max_length=16 .*jsonl:4"),
    ):
        assert len(module(train=file, max_length=16).load("train")) == 4
    assert "6 rows, 1 cut, 2 empty, 4 examples; 9 tokens in the median row, 16 in the longest" in caplog.text
    with pytest.warns(UserWarning, match="1 of 6 rows are dropped as longer than max_length=16 tokens"):
        assert module(train=file, max_length=16, long_rows="drop").load("train").lengths == [8, 9, 10]
    with pytest.raises(ValueError, match=r"1 of 6 rows lose their answer to max_length=16: .*rows.jsonl:4 \(\d+ tokens\); raise"):
        module(train=file, max_length=16, long_rows="refuse").load("train")
    nothing = tiny_lm.write(tmp_path / "nothing.jsonl", [{"text": " "}])
    with pytest.raises(ValueError, match=r"data.train='.*nothing.jsonl': no row of 1 is left \(1 empty\)"):
        module(train=nothing).load("train")


def test_rows_that_teach_nothing_are_left_out_and_said(tmp_path):
    file = tiny_lm.write(tmp_path / "rows.jsonl", [*rows(3), *[empty := {**ROW, "response": ""}] * 2])
    said = r"2 of 5 rows are left out as nothing can be learnt from them, first .*rows.jsonl:4: the answer is ''"
    with pytest.warns(UserWarning, match=said):
        assert len(module(train=file).load("train")) == 3  # one such row stopped the run
    with pytest.raises(ValueError, match=r"no row of 1 is left \(1 left out, first .*rows.jsonl:1: the answer is ''"):
        module(train=tiny_lm.write(tmp_path / "rows.jsonl", [empty])).load("train")


def test_rows_are_tokenized_once(tmp_path, kept, monkeypatch, caplog):
    file, calls = tiny_lm.write(tmp_path / "rows.jsonl", [*rows(3), {**ROW, "response": "blue " * 30}]), encoded(monkeypatch)

    def load(**options):
        calls.clear()
        with pytest.warns(UserWarning, match="1 of 4 rows are cut"):  # said of kept rows too
            examples = module(train=file, max_length=16, cache=str(kept), **options).load("train")
        return examples, len(calls)

    first, count = load()
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        assert count == 4 and load() == (first, 0) == load(batch_size=3, num_workers=1)
    assert "4 rows (tokenized before), 1 cut" in caplog.text
    assert load(train_on="all")[1] == load(chat_template_kwargs={"m": 1})[1] == 4
    monkeypatch.setattr(tiny_lm, "CHATML", tiny_lm.CHATML + "{# another #}")
    assert load()[1] == 4
    tiny_lm.write(tmp_path / "rows.jsonl", [*rows(2), ROW, {**ROW, "response": "blue " * 30}])
    assert load()[1] == 4
    assert len(list(kept.iterdir())) == 5


def test_rows_of_a_data_set_are_tokenized_once(tmp_path, kept, monkeypatch):
    calls = encoded(monkeypatch)
    monkeypatch.setattr(file_data, "read_rows", lambda *args: ((f"name:{i}", row) for i, row in enumerate(rows(4))))
    first = module(train="owner/name", cache=str(kept)).load("train")
    assert module(train="owner/name", cache=str(kept)).load("train") == first and len(calls) == 4


def test_a_cache_that_cannot_be_used_is_made_again(tmp_path, kept, monkeypatch):
    file, calls = tiny_lm.write(tmp_path / "rows.jsonl", rows(3)), encoded(monkeypatch)
    first = module(train=file, cache=str(kept)).load("train")
    (made,) = kept.iterdir()
    made.write_bytes(made.read_bytes()[:-7])
    with pytest.warns(UserWarning, match=r"train-\w+.safetensors cannot be read \(.*\), so the rows are tokenized again"):
        assert module(train=file, cache=str(kept)).load("train") == first
    assert module(train=file, cache=str(kept)).load("train") == first and len(calls) == 6
    (tmp_path / "a file").touch()
    with pytest.warns(UserWarning, match="the tokenized rows cannot be kept in .*a file/tokens"):
        assert module(train=file, cache=str(tmp_path / "a file" / "tokens")).load("train") == first
    assert module(train=file, cache=False).load("train") == first and len(list(kept.iterdir())) == 1


def test_a_cache_that_nobody_used_for_a_month_is_removed(tmp_path, kept, monkeypatch):
    file = tiny_lm.write(tmp_path / "rows.jsonl", rows(3))
    module(train=file, cache=str(kept)).load("train")
    (old,) = kept.iterdir()
    now = old.stat().st_mtime
    monkeypatch.setattr(cache.time, "time", lambda: now + cache.UNUSED - 10)
    module(train=file, cache=str(kept), max_length=99).load("train")
    assert old.exists()
    monkeypatch.setattr(cache.time, "time", lambda: now + cache.UNUSED + 10)
    module(train=file, cache=str(kept), max_length=98).load("train")
    assert not old.exists()


def test_processes_that_encode_share_the_module(tmp_path, monkeypatch):
    file = tiny_lm.write(tmp_path / "rows.jsonl", rows(30))
    alone = module(train=file, cache=False).load("train")
    monkeypatch.setattr(encoding, "CHUNK", 5)
    monkeypatch.setattr(encoding, "WORTH", 10)
    monkeypatch.setattr(encoding, "_processors", lambda: 2)
    assert module(train=file, cache=False).load("train") == alone


def test_other_processes_find_the_rows_in_the_cache(tmp_path, kept, monkeypatch):
    """Lightning calls `prepare_data` in one process per machine, and then lets the others go on."""
    model, calls = tiny_lm.save(tmp_path / "model"), encoded(monkeypatch)
    file = tiny_lm.write(tmp_path / "rows.jsonl", rows(10))
    from lightning_lora.tasks import CausalLMTask

    for world, found in ((1, 0), (2, 10)):
        data = InstructionDataModule(file, 0.2, cache=str(kept / str(world)))
        trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.strategy.connect(CausalLMTask(model))
        data.trainer = trainer
        monkeypatch.setattr(lightning.Trainer, "world_size", world)
        calls.clear()
        data.prepare_data()
        assert len(calls) == found
        data.setup("fit")
        assert len(calls) == 10 and len(data.examples["train"]) == 8


@dataclass
class Odd:
    numbers: list[int] = field(default_factory=list)
    name: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_encode_in_order(monkeypatch, processes):
    monkeypatch.setattr(encoding, "CHUNK", 4)
    placed = [(f"file:{i}", i) for i in range(23)]
    examples, report = encode_rows(placed, lambda row: ([Odd([row])] * (row % 3), {} if row % 3 else {"empty": ""}), Odd, "rows", processes)
    assert [example.numbers for example in examples] == [[row] for row in range(23) for _ in range(row % 3)]
    assert report.counts == {"empty": 8} and report.places == {"empty": [f"file:{i}" for i in (0, 3, 6, 9, 12)]}

    def refuse(row):
        if row in (9, 17):
            raise ValueError(f"{row} is bad")
        return [Odd([row])], {}

    with pytest.raises(ValueError, match=r"^file:9: 9 is bad$"):
        encode_rows(placed, refuse, Odd, "rows", processes)


def test_a_process_that_is_killed_ends_the_run():
    """Such as when memory is out. Nobody waits for it."""
    with pytest.raises(BrokenProcessPool):
        encode_rows([("a:1", 1), ("a:2", 2)], lambda row: os.kill(os.getpid(), signal.SIGKILL), Odd, "rows", 2)


def test_examples_of_any_fields(tmp_path):
    given = [Odd([1, 2, 3], "é", {"a": None}), Odd(), Odd([-5, 2**31 - 1], "b", {"c": [1.5]})]
    packed = Examples.pack(Odd, given)
    assert list(packed) == given and packed[-1] == given[2] and packed[1:] == given[1:] and packed.lengths == [3, 0, 2]
    joined = Examples.joined([packed, packed, Examples.pack(Odd, [])])
    assert list(joined) == given * 2
    packed.save(tmp_path / "x.safetensors", {"a": [1]})
    assert Examples.load(tmp_path / "x.safetensors", Odd) == (packed, {"a": [1]})
    with pytest.raises(IndexError):
        packed[3]


class Letters(FileDataModule):
    """What a subclass has to define."""

    records = (PlainText,)

    def encode(self, record, split):
        return [Example([ord(letter) for letter in record.text], [ord(letter) for letter in record.text])]

    def collate(self, examples, split):
        return {"ids": torch.tensor([e.ids for e in examples])}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_module_of_ones_own(tmp_path, workers):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("ab", "cd", "ef", "gh")))
    data = Letters(train=str(file), val=str(file), batch_size=2, cache=False, num_workers=workers)
    data._tokenizer = object()
    data.setup("validate")
    assert [batch["ids"].tolist() for batch in data.val_dataloader()] == [[[97, 98], [99, 100]], [[101, 102], [103, 104]]]


def test_a_cache_that_may_only_be_read_is_used(tmp_path, kept, monkeypatch):
    file, calls = tiny_lm.write(tmp_path / "rows.jsonl", rows(3)), encoded(monkeypatch)
    module(train=file, cache=str(kept)).load("train")

    def refused(*args):
        raise PermissionError("not yours")

    monkeypatch.setattr("lightning_lora.data.cache.os.utime", refused)
    calls.clear()
    assert len(module(train=file, cache=str(kept)).load("train")) == 3 and not calls


@pytest.mark.parametrize(("row", "template"), [(ROW, True), ({"text": "sky"}, False)])
def test_the_tokenizer_gets_the_plain_template_from_a_cache_too(row, template, tmp_path, kept):
    """It is saved beside the adapter. A text is no conversation."""
    file = tiny_lm.write(tmp_path / "rows.jsonl", [row])
    for _ in range(2):
        data = module(train=file, cache=str(kept))
        data._tokenizer = tiny_lm.tokenizer(chat=False)
        data.load("train")
        assert bool(data._tokenizer.chat_template) is template
        assert len(list(kept.rglob("*.safetensors"))) == 1


def test_every_batch_of_a_split_with_choices_has_rivals(tmp_path):
    """Or processes would log different metrics and wait for one another for ever."""
    content = [{**row, "choices": tiny_lm.CHOICES} if i == 0 else row for i, row in enumerate(rows(3))]
    data = module(train=tiny_lm.write(tmp_path / "rows.jsonl", content), val=tiny_lm.write(tmp_path / "val.jsonl", content))
    data.setup("fit")
    sizes = [data.collate([data.examples["val"][i]], "val")["rivals"].shape for i in range(3)]
    assert sizes[0][0] > 0 and sizes[1:] == [(0, 3), (0, 3)]
    assert "rivals" not in data.collate([data.examples["train"][0]], "train")
