"""The quality studies in small: a made encoder, decoder and tasks, two steps a trial."""

from __future__ import annotations

import json
import struct
import subprocess
import zipfile
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, BertTokenizer

from benchmarks.quality import bases, packages, run, tasks, trial
from benchmarks.quality.choice import CHOOSES, Cell, trials_of
from benchmarks.quality.methods import METHODS
from benchmarks.quality.trial import Trial, run_trial
from lightning_lora import LoRAConfig
from tests import tiny_lm

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # which PEFT asks
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),  # a probe's encoder
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),  # PEFT's prompts, when they generate
]
PAIRS = [("which colour is the sky", "blue"), ("which colour is blood", "red"), ("which colour is a pear", "green")] * 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Models and tasks as `load_base` and `load_task` find them in the cache."""
    folder = tmp_path_factory.mktemp("cache")
    quality, words = folder / "quality", folder / "vocab.txt"
    tiny_lm.save(quality / "decoder")
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tiny_lm.WORDS]))
    BertTokenizer(str(words)).save_pretrained(quality / "encoder")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=64, **sizes)).save_pretrained(quality / "encoder")
    splits = dict.fromkeys(("train", "val", "test"), 4)
    for name, labels in (("questions", ("red", "green", "blue")), ("translation", ())):
        tasks.write_splits(tasks.Source(lambda: list(PAIRS), "name a colour", splits, labels), quality / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_LORA_CACHE", str(folder))
        patch.setitem(tasks.SOURCES, "questions", tasks.Source(list, "", splits, ("red", "green", "blue")))
        for kept in (trial._base, trial._task):
            kept.cache_clear()
        yield quality
    for kept in (trial._base, trial._task):
        kept.cache_clear()


def small(method: str, base: str, task: str = "questions", **changes: Any) -> Trial:
    config = {"batch_size": 2, "lora": {"rank": 2, "target_modules": "qv"}, "peft": {"num_virtual_tokens": 2}}
    return Trial(**{"study": "s", "seed": 0, "lr": 1e-2, "steps": 2, "config": config, **changes}, method=method, base=base, task=task)


@pytest.mark.parametrize("base", bases.NAMES)
@pytest.mark.parametrize("method", ["lora", "full", "probe", "prefix", "prompt"])
def test_every_method_trains_what_it_says_on_every_base(cache: Path, method: str, base: str) -> None:
    record = run_trial(small(method, base))
    assert record["error"] is None and record["steps"] == 2 and record["rate"] > 0 and record["loss"] > 0
    assert {"loss", "accuracy"} <= record["val"].keys() & record["test"].keys()
    width, layers, head = (16, 2, 16 * 3 + 3) if base == "encoder" else (32, 2, 32 * 3)
    heads = head if base == "encoder" else 0  # the decoder writes its answer
    narrow = width if base == "encoder" else 16  # of keys and values: 2 of 4 heads
    expected = {
        "lora": layers * 2 * (width + width + width + narrow) + heads,
        "probe": head,
        "prefix": 2 * layers * 2 * narrow + heads,
        "prompt": 2 * width + heads,
    }
    assert record["trainable"] == expected.get(method, record["trainable"])
    assert method != "full" or record["trainable"] > 4000
    assert json.loads(json.dumps(record))["key"] == small(method, base).key


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_what_is_written_is_scored(cache: Path, method: str) -> None:
    record = run_trial(small(method, "decoder", "translation"))
    assert record["error"] is None
    assert {"loss", "bleu", "chrf", "exact"} <= record["test"].keys() and "bleu" not in record["val"]


def test_perfect_answers_have_the_highest_scores(cache: Path) -> None:
    answers = [json.loads(line)["messages"][-1]["content"] for line in (cache / "translation/chat/test.jsonl").read_text().splitlines()]
    trainer: Any = SimpleNamespace(predict=lambda *_: [[{"response": f" {answer} "} for answer in answers]])
    found = trial.written(trainer, None, None, tasks.load_task("translation"))
    assert found["exact"] == 1 and found["chrf"] > 70 and found["bleu"] == 0  # one short word each: BLEU has no pairs of words
    wrong: Any = SimpleNamespace(predict=lambda *_: [[{"response": "violet"} for _ in answers]])
    assert trial.written(wrong, None, None, tasks.load_task("translation"))["chrf"] < 10


def test_a_trial_that_chooses_reads_no_test_row(cache: Path) -> None:
    file = cache / "questions" / "label" / "test.jsonl"
    rows = file.read_text()
    file.write_text("not json")
    try:
        chosen, reported = (run_trial(small("probe", "encoder", split=split)) for split in ("val", "test"))
    finally:
        file.write_text(rows)
    assert chosen["error"] is None and chosen["val"]["loss"] > 0 and chosen["test"] is None
    assert "test.jsonl" in reported["error"]


def test_a_trial_repeats_itself_and_says_what_went_wrong(cache: Path) -> None:
    first, again, other = (run_trial(small("lora", "encoder", seed=seed)) for seed in (0, 0, 1))
    assert first["test"] == again["test"] != other["test"]
    assert "translation" in run_trial(small("probe", "decoder", "translation"))["error"]
    assert run_trial(small("lora", "encoder", lr="auto"))["rate"] > 1e-3
    few = run_trial(small("probe", "encoder", config={"rows": 1, "batch_size": 1}))
    assert few["error"] is None and len((cache / "questions/label/train-1.jsonl").read_text().splitlines()) == 1


def test_a_probe_reads_the_mean_of_what_is_no_padding(cache: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(cache / "encoder").eval()
    task = SimpleNamespace(model=model)
    METHODS["probe"](task, {"pooling": "mean"})
    assert [name for name, p in task.model.named_parameters() if p.requires_grad] == ["classifier.weight", "classifier.bias"]
    ids, mask = torch.tensor([[2, 9, 3, 0, 0], [2, 8, 7, 6, 3]]), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    means = torch.cat([model.base_model(ids[:1, :3]).last_hidden_state.mean(1), model.base_model(ids[1:]).last_hidden_state.mean(1)])
    for remembered in (False, True):  # computed where a test runs, and then trained on
        with torch.inference_mode(not remembered):
            logits = task.model(ids, mask, token_type_ids=torch.zeros_like(ids)).logits
        torch.testing.assert_close(logits, task.model.classifier(means))
    logits.sum().backward()
    record = run_trial(small("probe", "encoder", config={"pooling": "mean"}))
    assert record["error"] is None and record["trainable"] == 16 * 3 + 3


CELL = Cell("s", "questions", "encoder", "lora", 2, 1e-3)


def chosen(best: float) -> tuple[dict[str, Any], list[list[float]]]:
    """Records of a cell whose validation loss is lowest at a rate, and the rates that each round names."""
    records: dict[str, Any] = {}
    rounds = []
    while new := [one for one in trials_of(CELL, records) if one.key not in records]:
        rounds.append([float(one.lr) for one in new])
        for one in new:
            records[one.key] = {"split": one.split, "seed": one.seed, "val": {"loss": abs(float(one.lr) - best)}}
    return records, rounds


def test_the_grid_grows_until_the_best_rate_is_inside() -> None:
    records, rounds = chosen(1e-3)
    assert rounds == [[1e-3, 3.3e-4, 3e-3], [1e-3] * 3]
    assert Counter((record["split"], record["seed"]) for record in records.values()) == {
        ("val", CHOOSES): 3, ("test", 0): 1, ("test", 1): 1, ("test", 2): 1
    }  # fmt: skip
    assert chosen(1e-2)[1] == [[1e-3, 3.3e-4, 3e-3], [9e-3], [0.027], [9e-3] * 3]
    assert len(chosen(9.0)[1]) == 6  # it ends


def test_a_cell_that_fails_at_every_rate_reports_nothing() -> None:
    records = {one.key: {"val": None} for one in trials_of(CELL, {})}
    assert {one.split for one in trials_of(CELL, records)} == {"val"}


class Pool:
    """An executor that runs at once."""

    def __init__(self) -> None:
        self.ran: list[Any] = []

    def submit(self, function: Any, one: Trial, most: int | None) -> Future[dict[str, Any]]:
        self.ran.append(one.seed)
        future: Future[dict[str, Any]] = Future()
        record = {name: getattr(one, name) for name in ("key", "study", "task", "base", "method", "split", "seed", "lr", "config")}
        future.set_result(record | {"val": {"loss": 1.0}, "test": None, "error": None, "seconds": 0.0})
        return future


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every, out = [CELL.trial(seed=seed, lr=1e-3) for seed in range(4)], tmp_path / "records.jsonl"
    first, second, third, fourth = Pool(), Pool(), Pool(), Pool()
    run.run(lambda records: every[:2], out, first, 1)
    out.write_text(out.read_text()[:-20])  # the last line was cut off
    with out.open("a") as file:
        file.write("\n")
    records = run.run(lambda records: every, out, second, 3)
    assert (first.ran, second.ran) == ([0, 1], [1, 2, 3]) and set(records) == {one.key for one in every}
    assert run.run(lambda records: every, out, third, 3, deadline=0.0) == records == run.read_records(out) and not third.ran
    assert run.run(lambda records: every, tmp_path / "none.jsonl", third, 3, deadline=0.0) == {} and not third.ran
    with out.open("a") as file:
        file.write(json.dumps({**records[every[1].key], "error": "out of memory"}) + "\n")
    assert run.run(lambda records: every, out, fourth, 3).keys() == records.keys() and fourth.ran == []
    out.write_text("".join(json.dumps({**record, "error": "out of memory"}) + "\n" for record in records.values()))
    run.run(lambda records: every[:1], out, fourth, 3)
    assert fourth.ran == [0]  # what failed runs again


def test_all_studies_name_trials_that_can_run() -> None:
    named = [one for study in run.STUDIES for one in run.plan_of([study])({})]
    assert len({one.key for one in named}) == len(named) > 300
    for one in named:
        lora = dict(one.config.get("lora", {}))
        known = (bases.BERT if one.base == "encoder" else bases.LLAMA).keys()
        assert lora.pop("target_modules", "all") in known or one.method != "lora"
        LoRAConfig(**lora)
        assert one.method in METHODS and one.task in tasks.SOURCES and one.base in bases.NAMES


def catalog(pairs: dict[str, str]) -> bytes:
    """A compiled catalog, as msgfmt writes it."""
    texts = (
        [b"", *(key.encode() for key in sorted(pairs))],
        [b"Content-Type: text/plain; charset=UTF-8\n", *(pairs[k].encode() for k in sorted(pairs))],
    )
    count, place, table, body = len(texts[0]), 28 + 16 * len(texts[0]), b"", b""
    for side in texts:
        for text in side:
            table += struct.pack("<II", len(text), place + len(body))
            body += text + b"\0"
    return struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0) + table + body


def test_translations_are_read_from_catalogs(tmp_path: Path) -> None:
    messages = {"Save this page": "Enregistrer cette page", "Save this page.": "Enregistrer cette page.", "Save": "Enregistrer"}
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("a/locale/fr/LC_MESSAGES/django.mo", catalog(messages))
        wheel.writestr("a/locale/de/LC_MESSAGES/django.mo", catalog({"Open this page": "Seite öffnen"}))
    (pair,) = tasks.read_translations([tmp_path / "a.whl"])
    assert pair == ("Save this page.", "Enregistrer cette page.")  # repeats and single words are left out


def test_a_package_that_is_not_the_pinned_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **options: Any) -> Any:
        (Path(command[command.index("-d") + 1]) / "it.whl").write_bytes(b"other")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(RuntimeError, match=r"has sha256 .*expected"), packages.fetched("wagtail==8.0.1"):
        pass
