"""The pages of the documentation, README among them, and what their blocks of code take for granted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.stem: path.read_text() for path in FILES}
TEXT = "\n".join(PAGES.values())
# Pages that show errors, which test_help.py expects to be raised.
HELP = ["troubleshooting", "mistakes", *(page for page in PAGES if page.startswith("coming-from-"))]

# Lightning's advice where a block leaves out, for brevity, what a long run would set.
ADVICE = pytest.mark.filterwarnings("ignore:.*TensorBoard.*", "ignore:.*tensorboard.*", "ignore:`isinstance.treespec, LeafSpec.`")


def path_of(page: str) -> Path:
    """The file of a page."""
    return next(path for path in FILES if path.stem == page)


def blocks(page: str, language: str) -> list[str]:
    """The page's blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)


def pages_with(language: str) -> list[str]:
    """The pages that have a block in a language."""
    return [page for page in PAGES if blocks(page, language)]


def table(page: str, corner: str) -> dict[str, dict[str, str]]:
    """The page's table whose first column is headed ``corner``: row → column → cell."""
    found = re.findall(rf"^\| {re.escape(corner)} \|.*\n\|[-|]+\|\n(?:\|.*\n)+", PAGES[page], re.MULTILINE)
    assert len(found) == 1, f"{page} has {len(found)} tables headed {corner!r}"
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines())
    assert all(len(row) == len(head) for row in rows)
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


class MyModule(L.LightningModule):
    """A LightningModule as anyone has it: it knows nothing of LoRA, and hands all its parameters to the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama().train()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("test_loss", self.model(**batch).loss, batch_size=2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(batches(), batch_size=None)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(batches(), batch_size=None)


def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.arange(48).reshape(4, 2, 6)  # four batches of two rows
    return [{"input_ids": rows, "labels": rows} for rows in ids]
