"""The examples in the docstrings of the public names are run, each in an empty folder; a public name without one fails.

They take a few names for granted, as the pages do: ``model`` (a tiny Llama), ``batch`` and ``batches`` for it, ``MyModule`` (a
LightningModule around such a model), adapters of it in ``runs/NAME/adapter``, and tiny models and rows for the tasks in ``models``,
``rows`` and ``images``.
"""

from __future__ import annotations

import copy
import doctest
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import lightning_lora
import lightning_lora.data
import lightning_lora.estimate
import lightning_lora.tasks
from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, registry, save_adapter
from tests import tiny_lm
from tests.docs.pages import MyModule, batches, llama
from tests.tasks import tiny

MODULES = (lightning_lora, lightning_lora.tasks, lightning_lora.data, lightning_lora.estimate)
ROWS: dict[str, list[dict[str, Any]]] = {
    "chat": tiny_lm.rows(10),
    "pairs": [{"prompt": "which colour is the sky", "chosen": "blue", "rejected": "red apple"}] * 6,
    "labels": [{"text": "which colour is the sky", "label": "sky"}, {"text": "blood is red", "label": "blood"}] * 6,
    "tags": [{"tokens": ["a", "pear", "is", "green"], "tags": ["O", "B-FRUIT", "O", "B-COLOUR"]}] * 6,
    "texts": [{"prompt": "which colour is the grass", "response": "green"}, {"prompt": "blood", "response": "red"}] * 6,
}


def examples(module: ModuleType, name: str) -> doctest.DocTest:
    thing = inspect.unwrap(getattr(module, name))
    return doctest.DocTestParser().get_doctest(inspect.getdoc(thing) or "", {}, name, inspect.getsourcefile(thing), None)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("legal", "polite", "terse")):
        model, generator = apply_lora(llama(), LoRAConfig()), torch.Generator().manual_seed(seed)
        for parameter in get_lora_parameters(model):
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        save_adapter(model, folder / "runs" / name / "adapter")
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models by kind and rows by what they are, for the tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    for part in ("models", "rows", "images/red", "images/blue"):
        (folder / part).mkdir(parents=True)
    tiny_lm.save(folder / "models" / "llama")
    for kind in ("bert", "t5", "vit"):
        tiny.save(folder / "models" / kind, kind)
    for name, content in ROWS.items():
        tiny_lm.write(folder / "rows" / f"{name}.jsonl", content)
    for colour in ("red", "blue"):
        for number in range(3):
            Image.new("RGB", (24, 20), colour).save(folder / "images" / colour / f"{number}.png")
    return folder


@pytest.fixture
def registered() -> Iterator[None]:
    """What an example registers is forgotten."""
    tables = (registry.KINDS, registry.VARIANTS, registry.INITS)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture
def names(adapters: Path, rows: Path, registered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an example may use. A Trainer writes to the empty folder, and nothing to stdout."""
    monkeypatch.chdir(tmp_path)
    for part in (adapters / "runs", rows / "models", rows / "rows", rows / "images"):
        (tmp_path / part.name).symlink_to(part)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False, "max_epochs": 1}
    init = L.Trainer.__init__
    monkeypatch.setattr(L.Trainer, "__init__", functools.wraps(init)(lambda self, **given: init(self, **{**quiet, **given})))
    stand_ins = {"model": llama(), "batches": batches(), "batch": batches()[0], "MyModule": MyModule}
    modules = {"torch": torch, "L": L, "copy": copy, "DataLoader": DataLoader}
    return {name: getattr(module, name) for module in MODULES for name in module.__all__} | stand_ins | modules


# torch's own: CUDA graphs' step imports its compiler. Lightning's: the batches are few and short.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("module", "name"), [pytest.param(m, n, id=n) for m in MODULES for n in sorted(m.__all__)])
def test_example(module: ModuleType, name: str, names: dict[str, Any]) -> None:
    test = examples(module, name)
    assert test.examples, f"{name} has no example: add `Examples:` with `>>>` lines to its docstring"
    assert any(name in example.source + example.want for example in test.examples), f"{name} is not in its own example"
    test.globs = names
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not result.failed, "".join(said)
    assert not [each for each in test.examples if doctest.SKIP in each.options], "an example that is skipped is not run"
