"""Training on packed rows on two processes: the check on the model runs under every strategy, and all train alike."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.data import InstructionDataModule
from lightning_lora.layers import lora_layers
from lightning_lora.strategies import LoRAFSDP2Strategy
from lightning_lora.tasks import CausalLMTask
from lightning_lora.tasks.packed_attention import NAME
from lightning_lora.utils.sharding import full_tensor
from tests import tiny_lm
from tests.distributed.runs import CPUFSDPStrategy

STRATEGIES: dict[str, Callable[[Any], Any]] = {
    "ddp": lambda block: DDPStrategy(process_group_backend="gloo"),
    "fsdp2": lambda block: LoRAFSDP2Strategy(process_group_backend="gloo"),
    "fsdp1": lambda block: CPUFSDPStrategy(auto_wrap_policy=ModuleWrapPolicy({block}), process_group_backend="gloo"),
}


class Adapters(L.Callback):
    """Reads the adapters while they are whole."""

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.found: list[Tensor] = []  # under FSDP1 what this process has
        for _, layer in lora_layers(module):
            self.found += [full_tensor(parameter.detach()).clone() for parameter in layer.lora_parameters().values()]


def train(name: str, folder: str, file: str) -> tuple[list[Tensor], str]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(0, verbose=False)
    task, adapters = CausalLMTask(folder, weight_decay=0.0), Adapters()
    lora = LoRACallback(LoRAConfig(rank=2, target_modules=["q_proj", "v_proj"]), merge_on_fit_end=False)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=STRATEGIES[name](type(task.model.model.layers[0])), max_steps=3, callbacks=[lora, adapters],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, InstructionDataModule(file, batch_size=2, packing=True, max_length=40))
    return adapters.found, task.model.config._attn_implementation


def test_every_strategy_trains_alike(pool: Any, tmp_path: Path) -> None:
    folder, file = tiny_lm.save(tmp_path / "model"), tiny_lm.write(tmp_path / "train.jsonl", tiny_lm.rows(40))
    runs = {name: pool.run(train, name, folder, file) for name in STRATEGIES}
    assert {attention for ranks in runs.values() for _, attention in ranks} == {NAME}
    for (adapters, _), (others, _) in (runs["ddp"], runs["fsdp2"]):
        assert len(adapters) == 8 and any(tensor.any() for tensor in adapters[1::2])
        torch.testing.assert_close(adapters, others)
    torch.testing.assert_close(runs["ddp"][0][0], runs["fsdp2"][0][0], rtol=1e-3, atol=1e-5)
