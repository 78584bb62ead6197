"""What is killed while it saves, and how what it left is checked."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, save_adapter
from lightning_lora.adapter_io.files import CONFIG, TENSORS, read_adapter
from lightning_lora.storage import folders
from lightning_lora.storage.folders import standing
from lightning_lora.strategies.checkpoint_io import DurableCheckpointIO, found, read_folder, write_folder
from tests.conftest import TinyModel, adapted, same_bits
from tests.harness.kills import Scenario, in_a_child, result

OTHERS = {"README.md": "mine", "tokenizer.json": "{}"}


def build(size: int = 8) -> nn.Module:
    torch.manual_seed(3)
    return TinyModel(size=size)


def adapter(root: Path, inside: bool = False, exchange: bool = True, size: int = 8) -> Scenario:
    """Two adapters of different shape take turns in one folder, beside files of the user's.

    Args:
        root: where the folder is.
        inside: with a folder of the user's in it, so that it is not replaced.
        exchange: whether two names can be exchanged in one step.
        size: width of the model.
    """
    models = [adapted(build(size), seed=rank, target_modules=["q_proj"], rank=rank) for rank in (2, 4)]
    expected = [{name: t.clone() for name, t in model.state_dict().items() if "lora_" in name} for model in models]
    folder = root / "adapter"
    folder.mkdir(parents=True)
    for name, text in OTHERS.items():
        (folder / name).write_text(text)
    if inside:
        (folder / "logs").mkdir()

    def act(turn: int) -> None:
        with without_exchange() if not exchange else at_once():
            save_adapter(models[turn % 2], folder, overwrite=True)

    def check() -> int:
        tensors = read_adapter(folder).tensors
        (which,) = [n for n, want in enumerate(expected) if all(same_bits(tensors[name], tensor) for name, tensor in want.items())]
        there = standing(folder)
        assert {name: (there / name).read_text() for name in OTHERS} == OTHERS
        if (there / CONFIG).exists() or not inside:  # what a reader sees that goes by the JSON
            ranks = {tensor.shape[0] for name, tensor in load_file(there / TENSORS).items() if ".lora_A." in name}
            assert ranks == {json.loads((there / CONFIG).read_text())["r"]}
        assert folder.exists() or not exchange
        return which

    return Scenario(act, check)


def shards(root: Path, exchange: bool = True) -> Scenario:
    """A folder of shards is replaced. Where names can be exchanged, which a removal does not need, another is written and removed too."""
    root.mkdir(parents=True)
    path, other = root / "last.ckpt", root / "step.ckpt"

    def act(turn: int) -> None:
        with without_exchange() if not exchange else at_once(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of DCP: a single process
            for each in (path, other)[: 1 + exchange]:
                write_folder({"state_dict": {"x": torch.full((64,), turn % 2), "y": torch.full((3, 5), turn % 2)}}, each)
        DurableCheckpointIO().remove_checkpoint(other)

    def check() -> int:
        assert path.exists() or not exchange
        tensors = read_folder(Path(found(str(path))))["state_dict"]
        (which,) = {int(value) for tensor in tensors.values() for value in tensor.unique()}
        if other.exists():
            read_folder(other)
        return which

    return Scenario(act, check)


def file(root: Path) -> Scenario:
    """A checkpoint in one file."""
    path = root / "last.ckpt"

    def act(turn: int) -> None:
        DurableCheckpointIO().save_checkpoint({"x": torch.full((100_000,), turn % 2)}, path)

    def check() -> int:
        (which,) = {int(value) for value in torch.load(path, weights_only=True)["x"].unique()}
        return which

    return Scenario(act, check)


@contextmanager
def at_once() -> Iterator[None]:
    yield


@contextmanager
def without_exchange() -> Iterator[None]:
    """Two renames, as on a filesystem that cannot exchange two names."""
    real = folders.exchange
    folders.exchange = lambda *args: False
    try:
        yield
    finally:
        folders.exchange = real


SCENARIOS: dict[str, Callable[[Path], Scenario]] = {
    "adapter": adapter,
    "adapter, two renames": lambda root: adapter(root, exchange=False),
    "adapter, files moved in": lambda root: adapter(root, inside=True),
    "shards": shards,
    "shards, two renames": lambda root: shards(root, exchange=False),
    "file": file,
}


class Lit(L.LightningModule):
    """Takes its batch from the number of the step, so that no loader's place in its data matters. Writes each loss down."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.net, self.log_file = build(), log

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        ids = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(self.global_step))
        loss = nn.functional.cross_entropy(self.net(ids).flatten(0, 1), ids.roll(1, 1).flatten())
        with self.log_file.open("a") as stream:
            stream.write(f"{self.global_step} {loss.item().hex()}\n")
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2, eps=1e-3)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.zeros(10**6, 1), batch_size=1)  # type: ignore[arg-type]


def fit(folder: Path, steps: int, log: Path) -> None:
    """Train, with a checkpoint after each step, from the last one if there is one."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    last = folder / "last.ckpt"
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            LoRACallback(LoRAConfig(rank=2), merge_on_fit_end=False, check_gradients=False),
            ModelCheckpoint(folder, filename="step", every_n_train_steps=1, save_last=True, enable_version_counter=False),
        ],
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.fit(Lit(log), ckpt_path=str(last) if last.exists() else None)


def resumed_fits(root: Path, kills: int, seed: int, steps: int = 40) -> tuple[int, int]:
    """Kill fits at random moments, resume each from its last checkpoint, and compare every loss with an uninterrupted run's, to the bit.

    Returns:
        How many fits were killed, and how many steps were compared.
    """
    root.mkdir(parents=True)
    begun = time.perf_counter()
    assert result(in_a_child(lambda: fit(root / "whole", steps, root / "whole.log"))) == 0
    once = time.perf_counter() - begun
    reference = dict(line.split() for line in (root / "whole.log").read_text().splitlines())
    assert len(reference) == steps
    chance, killed, compared, run = random.Random(seed), 0, 0, 0
    while killed < kills:
        run += 1
        folder, log = root / f"run{run}", root / f"run{run}.log"
        while True:
            child = in_a_child(lambda folder=folder, log=log: fit(folder, steps, log))
            end = time.monotonic() + (chance.uniform(0, once) if killed < kills else 1000.0)
            while time.monotonic() < end and (done := os.waitpid(child, os.WNOHANG))[0] == 0:
                time.sleep(0.005)
            if done[0]:
                assert done[1] == 0
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed += 1
        lines = [line.split() for line in log.read_text().splitlines()]
        assert {step for step, _ in lines} == set(reference)
        for step, loss in lines:
            assert reference[step] == loss, f"step {step}"
        compared += len(lines)
    return killed, compared
