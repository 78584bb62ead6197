"""DPO on two processes: a run that resumes inside an epoch ends with the same adapters, moments and metrics as one that was not stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_lora import LoRACallback, LoRAConfig, get_lora_parameters
from lightning_lora.data import PreferenceDataModule
from lightning_lora.tasks import DPOTask
from tests import tiny_lm

THINGS = ["the sky", "the grass", "blood", "a pear", "the apple", "a sky is the grass"]
PAIRS = [{"prompt": f"which colour is {THINGS[i % 6]}", "chosen": "blue sky", "rejected": "green apple is red"} for i in range(16)]


def train(folder: str, file: str, out: str, epochs: int, resume: str | None = None) -> dict[str, Any]:
    L.seed_everything(3, verbose=False)  # the order of the rows
    torch.manual_seed(0 if resume is None else 1)  # dropout, which a resumed run draws as the whole one
    task = DPOTask(folder, learning_rate=1e-2, beta=0.5, schedule="constant", warmup=0.0)
    lora = LoRACallback(LoRAConfig(rank=2, target_modules=["q_proj", "v_proj"], dropout=0.2), merge_on_fit_end=False)
    saver = ModelCheckpoint(out, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"), max_epochs=epochs, callbacks=[lora, saver],
        logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(task, PreferenceDataModule(file, val=file, batch_size=2), ckpt_path=resume, weights_only=True)
    moments = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return {"trained": [p.detach().clone() for p in get_lora_parameters(task)], "moments": moments, "metrics": metrics}


def test_a_resumed_run_equals_one_that_was_not_stopped(pool: Any, tmp_path: Path) -> None:
    folder, file = tiny_lm.save(tmp_path / "model"), tiny_lm.write(tmp_path / "pairs.jsonl", PAIRS)
    whole = pool.run(train, folder, file, str(tmp_path / "whole"), 2)
    resumed = pool.run(train, folder, file, str(tmp_path / "resumed"), 2, str(tmp_path / "whole" / "step=3.ckpt"))  # of four in an epoch
    for rank in range(2):
        assert len(whole[rank]["trained"]) == 8 and all(p.any() for p in whole[rank]["trained"])
        torch.testing.assert_close(resumed[rank], whole[rank], rtol=0, atol=0)
        torch.testing.assert_close(whole[rank]["trained"], whole[0]["trained"], rtol=0, atol=0)
