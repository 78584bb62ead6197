"""Over NCCL, on two GPUs: the chunked loss, FP8 bases, and what ``lora_fsdp2`` does there by default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.experimental import TESTED_ON_GPUS, torch_release
from lightning_lora.strategies import LoRAFSDP2Strategy, fsdp2
from tests.distributed.pool import Pool
from tests.distributed.runs import LitShared
from tests.distributed.test_chunked_loss import SHARDINGS, check, losses
from tests.distributed.test_quantized import compare

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs that reach each other's memory")


@pytest.fixture(scope="module")
def gpus() -> Iterator[Pool]:
    workers = Pool(2, "cuda")
    yield workers
    workers.close()


@pytest.mark.parametrize("how", SHARDINGS)
def test_chunked_loss_on_gpus(gpus: Pool, how: str) -> None:
    check(gpus.run(losses, "frozen", how, "before", "cuda"), "frozen")


@pytest.mark.parametrize("order", ["before", "after", "ddp"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])  # in bf16 the products are FP8
def test_fp8_on_gpus(gpus: Pool, order: str, dtype: torch.dtype, tolerance: float) -> None:
    for error, in_pieces in gpus.run(compare, "fp8", order, "cuda", dtype, 64):
        assert error < tolerance and in_pieces == (order != "ddp")


class Lit(LitShared):
    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__(late=True)
        torch.manual_seed(0)
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
        self.net = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).bfloat16().train()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.noted(self.net(input_ids=batch, labels=batch).loss)

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(dist.get_rank())
        return DataLoader([torch.randint(256, (4, 64), generator=generator) for _ in range(12)], batch_size=None)


def fit(quantize: str | None, compile: bool, device: str) -> dict[str, Any]:
    """Losses by default and without pulling, and what the log said by default."""
    found: dict[str, Any] = {"said": []}
    for how in ("auto", False):
        module = Lit()
        torch.manual_seed(1)
        lora = LoRACallback(
            LoRAConfig(rank=8, target_modules="all-linear"), quantize=quantize, merge_on_fit_end=False, compile="layer" if compile else None
        )
        given: dict[str, Any] = {} if how == "auto" else {"pull_frozen": how}  # auto is the default
        strategy = LoRAFSDP2Strategy(process_group_backend="nccl" if device == "cuda" else "gloo", **given)
        trainer = L.Trainer(
            accelerator=device, devices=2, strategy=strategy, max_epochs=1, callbacks=[lora], precision="bf16-true", logger=False,
            enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, use_distributed_sampler=False,
            gradient_clip_val=1.0,
        )  # fmt: skip
        with patch.object(fsdp2, "rank_zero_info", found["said"].append):
            trainer.fit(module)
        found[str(how)] = module.losses
    return found


@pytest.mark.parametrize(("quantize", "compile"), [(None, False), ("fp8", True)])
def test_default_on_gpus(gpus: Pool, quantize: str | None, compile: bool) -> None:
    for found in gpus.run(fit, quantize, compile, "cuda"):
        assert ("are pulled" in found["said"][0]) == (torch_release() in TESTED_ON_GPUS), found["said"]
        assert found["auto"] == pytest.approx(found["False"], rel=2e-3)
        assert found["auto"][-1] != found["auto"][0]
