"""The examples in the docstrings of the public names are run, each in an empty folder; a public name without one fails.

They take a few names for granted, as the pages do: ``model`` (a tiny Llama), ``batch`` and ``batches`` for it, ``MyModule`` (a
LightningModule around such a model), and adapters of it in ``runs/NAME/adapter``.
"""

from __future__ import annotations

import copy
import doctest
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_lora
from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, registry, save_adapter
from tests.docs.pages import MyModule, batches, llama


def examples(name: str) -> doctest.DocTest:
    thing = inspect.unwrap(getattr(lightning_lora, name))
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
def names(adapters: Path, registered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an example may use. A Trainer writes to the empty folder, and nothing to stdout."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(adapters / "runs")
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False, "max_epochs": 1}
    init = L.Trainer.__init__
    monkeypatch.setattr(L.Trainer, "__init__", functools.wraps(init)(lambda self, **given: init(self, **{**quiet, **given})))
    stand_ins = {"model": llama(), "batches": batches(), "batch": batches()[0], "MyModule": MyModule}
    modules = {"torch": torch, "L": L, "copy": copy, "DataLoader": DataLoader}
    return {name: getattr(lightning_lora, name) for name in lightning_lora.__all__} | stand_ins | modules


# torch's own: CUDA graphs' step imports its compiler.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", sorted(lightning_lora.__all__))
def test_example(name: str, names: dict[str, Any]) -> None:
    test = examples(name)
    assert test.examples, f"{name} has no example: add `Examples:` with `>>>` lines to its docstring"
    assert any(name in example.source + example.want for example in test.examples), f"{name} is not in its own example"
    test.globs = names
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not result.failed, "".join(said)
    assert not [each for each in test.examples if doctest.SKIP in each.options], "an example that is skipped is not run"
