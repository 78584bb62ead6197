"""The ways that ``fit.py`` measures: the bare loop, fits in a Trainer, and the callback that watches them."""

from __future__ import annotations

import cProfile
import gc
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from floor import mark, synchronize
from floor_modes import DEVICE, LINEARS, SHAPES, Setting
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset

from lightning_lora import LoRACallback, LoRAConfig, chunked_cross_entropy, cuda_graph_step, get_lora_parameters
from lightning_lora.data.batching import Example, collate_answers
from lightning_lora.tasks import CausalLMTask

GPU = DEVICE == "cuda"


@dataclass(frozen=True)
class Way:
    """What is changed of `fit`."""

    tuned: bool = True
    bar: bool = True
    logger: bool = True
    log_every: int = 50
    workers: int = 2
    pinned: bool = True
    collected: bool = True
    callback: bool = True


WAYS = {
    "fit": Way(),
    "untuned": Way(tuned=False),
    "no bar": Way(bar=False),
    "no logs": Way(bar=False, logger=False),
    "all logged": Way(log_every=1),
    "no workers": Way(workers=0),
    "unpinned": Way(pinned=False),
    "no gc": Way(collected=False),
    "no callback": Way(callback=False),
}
LAST = 4  # steps after the timed ones, in which waits are counted


class Rows(Dataset):
    """Random rows of one length."""

    def __init__(self, rows: int, length: int, vocab: int) -> None:
        self.rows, self.length, self.vocab = rows, length, vocab

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> Example:
        ids = torch.randint(self.vocab, (self.length,), generator=torch.Generator().manual_seed(row)).tolist()
        return Example(ids, ids)


def task_of(model: Any) -> CausalLMTask:
    """The command line's task, over a model that is there."""

    class Task(CausalLMTask):
        def load_preprocessor(self) -> None:
            self.tokenizer = None

        def load(self, **config: Any) -> None:
            self.model = model

    return Task("random weights", learning_rate=1e-5, schedule="constant", warmup=0.0)


class Watch(pl.Callback):
    """Takes the time of each step, then counts what waits for the GPU."""

    def __init__(self, setting: Setting, profile: cProfile.Profile | None = None) -> None:
        self.first, self.last = setting.warmup, setting.warmup + setting.steps
        self.marks: list[Any] = []
        self.waits: Counter[str] = Counter()
        self.loss = torch.zeros(())
        self.profile = profile
        self._counting = ExitStack()

    def begin(self, step: int) -> None:
        if self.first <= step <= self.last:
            self.marks.append(mark())
        if step == self.first and self.profile is not None:
            self.profile.enable()
        if step == self.last:
            if self.profile is not None:
                self.profile.disable()
            if GPU:
                self._count_waits()

    def _count_waits(self) -> None:
        found = self._counting.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

        def count() -> None:
            torch.cuda.set_sync_debug_mode("default")
            places = [f"{Path(one.filename).name}:{one.lineno}" for one in found if "synchronizing" in str(one.message)]
            self.waits.update(places)

        self._counting.callback(count)

    def finish(self) -> None:
        self._counting.close()
        synchronize()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.begin(batch_idx)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.loss = outputs["loss"]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.finish()


def loader_of(way: Way, setting: Setting, steps: int) -> DataLoader:
    rows = Rows(steps * setting.batch, setting.seq, SHAPES[setting.shape][-1])
    context = "fork" if way.workers else None
    return DataLoader(
        rows, setting.batch, collate_fn=partial(collate_answers, pad=0), num_workers=way.workers, multiprocessing_context=context,
        pin_memory=GPU and way.pinned,
    )  # fmt: skip


def bare(task: CausalLMTask, how: str, setting: Setting, watch: Watch) -> None:
    """The loop to compare with."""
    model, trained = task.model, get_lora_parameters(task.model)
    steps = setting.warmup + setting.steps + LAST
    batches = [batch["input_ids"].to(DEVICE) for batch in loader_of(Way(workers=0, pinned=False), setting, steps)]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=GPU)
    for step, ids in enumerate(batches):
        watch.begin(step)
        with cuda_graph_step(trained) if how == "recorded" else nullcontext():
            hidden = model.model(input_ids=ids).last_hidden_state.flatten(0, 1)
            labels = F.pad(ids[:, 1:], (0, 1), value=-100).flatten()
            loss = chunked_cross_entropy(hidden, model.lm_head.weight, labels, compiled=GPU and how != "eager")
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.loss = loss.detach()
    watch.finish()


def fit(task: CausalLMTask, how: str, way: Way, setting: Setting, watch: Watch) -> None:
    """A fit as the command line makes it, but for what the way changes."""
    steps = setting.warmup + setting.steps + LAST
    compiled: dict[str, Any] = {} if how == "eager" else {"compile": "layer", "cuda_graphs": how == "recorded"}
    lora = LoRACallback(config_of(setting), module="model", merge_on_fit_end=False, tune_loop=way.tuned, **compiled)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="gpu" if GPU else "cpu", devices=1, precision="bf16-true", max_steps=steps, max_epochs=-1,
            log_every_n_steps=way.log_every, enable_progress_bar=way.bar, enable_checkpointing=False, enable_model_summary=False,
            logger=CSVLogger(folder) if way.logger else False, callbacks=[watch, *([lora] if way.callback else [])],
        )  # fmt: skip
        with nullcontext() if way.collected else uncollected():
            trainer.fit(task, loader_of(way, setting, steps))


def config_of(setting: Setting) -> LoRAConfig:
    return LoRAConfig(rank=setting.rank, alpha=2 * setting.rank, target_modules=LINEARS)


@contextmanager
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
