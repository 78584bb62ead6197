"""Mistakes with ``ckpt_path``: each is a ValueError that says what the file is, and the module stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRACallback, save_adapter
from tests.lit import CONFIG, LitNet, bits, make_net, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Be aware that when")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    module = LitNet()
    trainer(folder, LoRACallback(CONFIG, merge_on_fit_end=False), ModelCheckpoint(folder, filename="c"), max_epochs=1).fit(module)
    save_adapter(module, folder / "adapter")
    return folder


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], Path]:
    def make(good: Path, folder: Path) -> Path:
        content = torch.load(good / "c.ckpt", weights_only=True)
        change(content)
        torch.save(content, folder / "x.ckpt")
        return folder / "x.ckpt"

    return make


def written(content: bytes) -> Callable[[Path, Path], Path]:
    def make(good: Path, folder: Path) -> Path:
        (folder / "x.ckpt").write_bytes(content)
        return folder / "x.ckpt"

    return make


def saved(content: Any) -> Callable[[Path, Path], Path]:
    def make(good: Path, folder: Path) -> Path:
        torch.save(content, folder / "x.ckpt")
        return folder / "x.ckpt"

    return make


def cut(good: Path, folder: Path) -> Path:
    return written((good / "c.ckpt").read_bytes()[:-500])(good, folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda good, folder: good / "adapter", r"is no checkpoint. An adapter folder is loaded by load_adapter"),
        (
            lambda good, folder: good / "adapter" / "adapter_model.safetensors",
            r"is no checkpoint. An adapter folder is loaded by load_adapter",
        ),
        (written(b""), r"x.ckpt is not a readable checkpoint: the file is empty"),
        (written(b"hello\n"), r"x.ckpt is not a readable checkpoint: it was not written by torch.save, or it is damaged \(KeyError: 101\)"),
        (written(bytes(range(256)) * 4), r"x.ckpt is not a readable checkpoint"),
        (cut, r"x.ckpt is not a readable checkpoint"),
        (saved([1]), r"was not written under LoRACallback: it holds a list"),
        (saved({"state_dict": {}}), r"was not written under LoRACallback"),
        (saved(make_net()), r"holds .*tests.lit.Net.*, which can run code. If you trust the file, .* pass weights_only=False"),
        (changed(lambda c: c["lightning_lora"].update(format_version=2)), r"has format version 2, this lightning-lora reads up to 1"),
        (changed(lambda c: c["lightning_lora"]["config"].update(new=1)), r"metadata is not readable .*new"),
    ],
)
def test_a_wrong_file_is_named(make: Any, message: str, good: Path, tmp_path: Path) -> None:
    module = LitNet()
    before = bits(module)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, LoRACallback(CONFIG), max_epochs=2).fit(module, ckpt_path=str(make(good, tmp_path)), weights_only=True)
    assert before.keys() == bits(module).keys() and all(torch.equal(value, before[name]) for name, value in bits(module).items())
