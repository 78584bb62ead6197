"""Perplexity on text of no task."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality import forgetting
from benchmarks.quality.prose import load_prose, perplexity, read_articles
from tests import tiny_lm

TABLE = "id\tsentiment\ttext\n1_1\t0.4\tOne thing.\n1_2\t0.1\tAnother\tthing.\n2_1\t-1\tA second article.\n"


def test_articles_are_their_sentences_in_order(tmp_path: Path) -> None:
    assert read_articles(TABLE) == ["One thing. Another\tthing.", "A second article."]
    (tmp_path / "editorials.tsv").write_text(TABLE)
    assert load_prose(tmp_path) == read_articles(TABLE)  # nothing is fetched


def test_perplexity_is_that_of_the_definition() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    tokenizer = lambda text, **_: {"input_ids": [ord(c) % 64 for c in text]}  # noqa: E731
    articles = ["some text of no use at all", "and more of it"]
    ids = torch.tensor([ord(c) % 64 for c in "\n\n".join(articles)][:40]).view(4, 10)
    model.train()
    found = perplexity(model, tokenizer, articles, length=10, batch_size=3)
    with torch.no_grad():
        logs = [model.eval()(input_ids=row[None]).logits[0, i].log_softmax(-1)[row[i + 1]] for row in ids for i in range(9)]
    assert found == pytest.approx(math.exp(-float(torch.stack(logs).mean())), rel=1e-5)
    assert len("\n\n".join(articles)) // 10 == 4
    with pytest.raises(ValueError, match="length=512"):
        perplexity(model, tokenizer, articles)


def test_mode_is_restored() -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    for training in (True, False):
        model.train(training)
        perplexity(model, lambda text, **_: {"input_ids": [1, 2, 3, 4]}, ["x"], length=4)
        assert model.training is training


def test_the_model_before_training_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_lm.save(tmp_path)
    monkeypatch.setattr(forgetting, "load_base", lambda name: SimpleNamespace(folder=folder))
    monkeypatch.setattr(forgetting, "_prose", lambda: ["What was the first? " * 400])
    record = forgetting.main(["--out", str(tmp_path / "before.jsonl")])
    assert json.loads((tmp_path / "before.jsonl").read_text()) == json.loads(json.dumps(record))
    assert record["steps"] == 0 and 1 < record["measures"]["perplexity"] < 1e6
