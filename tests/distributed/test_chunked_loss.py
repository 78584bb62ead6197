"""The loss of a sharded output layer, in chunks inside its forward, against one process that has all logits."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import LoRAConfig, apply_lora, chunked_cross_entropy
from lightning_lora.data.batching import Example, collate_answers
from lightning_lora.experimental.pull_frozen import average
from lightning_lora.strategies.fsdp2 import shard_blocks
from lightning_lora.tasks import CausalLMTask, causal_lm
from tests.distributed.nets import adapter_tensors, fill_adapters

HIDDEN, VOCAB, CHUNK, ANSWERS = 32, 91, 4, 9  # 91: no other size here, and uneven on two ranks
TARGETS = ["q_proj", "down_proj"]
CONFIGS = {
    "frozen": LoRAConfig(rank=2, target_modules=TARGETS),
    "tied": LoRAConfig(rank=2, target_modules=TARGETS),
    "trains": LoRAConfig(rank=2, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "tied rows": LoRAConfig(rank=2, target_modules=TARGETS, trainable_token_indices=[80, 5, 90]),
    "adapter": LoRAConfig(rank=2, target_modules=[*TARGETS, "lm_head"]),
}


class Task(CausalLMTask):
    def load_preprocessor(self) -> None:
        self.tokenizer = None

    def load(self, **config: Any) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        options: dict[str, Any] = {
            "vocab_size": VOCAB,
            "tie_word_embeddings": self.hparams["model"].startswith("tied"),
            "initializer_range": 0.3,
        }
        self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **options))


class Widest(TorchDispatchMode):
    """The most rows of logits that any tensor had."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape[-1:] == (VOCAB,) and out.shape != (HIDDEN, VOCAB):  # which is the weight
            self.rows = max(self.rows, out.numel() // VOCAB)
        return out


def batch_of(rank: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rank)
    rows = [torch.randint(1, VOCAB, (6 + ANSWERS - i,), generator=generator).tolist() for i in range(2)]
    return collate_answers([Example(row, [-100] * (6 - i) + row[6 - i :]) for i, row in enumerate(rows)], pad=0)


def own_units(task: nn.Module, mesh: Any) -> None:
    """As a user may shard: the output layer by itself, and nothing stays whole after a forward pass."""
    model: Any = task.model
    for part in (*model.model.layers, model.lm_head):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def pulled(task: nn.Module, mesh: Any) -> None:
    shard_blocks(task, mesh, pull_frozen=True)
    average(task, mesh.get_group())


SHARDINGS = {"lora_fsdp2": shard_blocks, "pulled": pulled, "own units": own_units}


def losses(kind: str, how: str, order: str, device: str = "cpu") -> dict[str, Any]:
    """Of two steps of this rank; gradients and the widest logits of the second; the same of one process over both batches."""
    mesh, said, found = init_device_mesh(device, (dist.get_world_size(),)), [], []
    batches = [{name: value.to(device) for name, value in batch_of(rank).items()} for rank in range(dist.get_world_size())]
    with (
        patch.object(causal_lm, "rank_zero_info", said.append),
        patch.object(causal_lm, "chunked_cross_entropy", partial(chunked_cross_entropy, chunk=CHUNK)),
    ):
        for spread in (True, False):
            task = Task(kind).to(device)
            if order == "before":
                apply_lora(task.model, config=CONFIGS[kind])
            if spread:
                SHARDINGS[how](task, mesh)
            if order == "after":
                apply_lora(task.model, config=CONFIGS[kind])
            fill_adapters(task.model)
            task._needs_logits = None if spread else "this is the reference"
            for _ in range(2):
                task.zero_grad()
                with Widest() as widest:
                    if spread:
                        loss = task.answer_loss(batches[dist.get_rank()])
                        loss.backward()
                    else:
                        each = [task.answer_loss(batch) for batch in batches]
                        torch.stack(each).mean().backward()
                        loss = each[dist.get_rank()]
            trained = adapter_tensors(task.model, lambda p: p.grad)
            if kind == "trains":
                grad = task.model.lm_head.weight.grad
                trained["head"] = grad.full_tensor() if spread else grad
            found.append({"loss": loss.detach(), "gradients": trained, "rows": widest.rows})
    return {"mine": found[0], "wanted": found[1], "said": said[:-1] if len(said) > 1 else []}


REASONS = {"trains": "its output layer trains", "adapter": "its output layer is a LoRALinear"}


@pytest.mark.parametrize(
    ("kind", "how", "order"),
    [
        *(("frozen", how, "before") for how in SHARDINGS),
        ("frozen", "lora_fsdp2", "after"),
        ("frozen", "own units", "after"),
        ("tied", "lora_fsdp2", "before"),
        ("tied", "pulled", "before"),
        ("tied rows", "lora_fsdp2", "before"),
        ("tied rows", "pulled", "before"),
        ("trains", "lora_fsdp2", "before"),
        ("trains", "pulled", "before"),
        ("adapter", "lora_fsdp2", "before"),
    ],
)
def test_loss_and_gradients_are_those_of_all_logits(pool: Any, kind: str, how: str, order: str) -> None:
    check(pool.run(losses, kind, how, order), kind)


def check(results: list[dict[str, Any]], kind: str) -> None:
    for result in results:
        mine, wanted = result["mine"], result["wanted"]
        torch.testing.assert_close(mine["loss"], wanted["loss"])
        torch.testing.assert_close(mine["gradients"], wanted["gradients"], rtol=1e-4, atol=1e-6)
        assert len(mine["gradients"]) >= 8 and all(grad.any() for grad in mine["gradients"].values())
        assert wanted["rows"] >= 2 * ANSWERS
        assert (mine["rows"] <= CHUNK) == (kind not in REASONS), mine["rows"]
        assert [REASONS[kind] in text for text in result["said"]] == [True] * (kind in REASONS)


def split_by_columns() -> list[str]:
    """Tensor parallelism keeps the output layer in pieces: its logits are whole, and the log says why."""
    said: list[str] = []
    task = Task("frozen")
    task.model.requires_grad_(False)
    task.model.model.embed_tokens.requires_grad_()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(task.model, mesh, {"lm_head": ColwiseParallel(output_layouts=torch.distributed.tensor.Replicate())})
    wanted = Task("frozen").model(**{k: batch_of(0)[k] for k in ("input_ids", "attention_mask", "labels")}).loss
    with patch.object(causal_lm, "rank_zero_info", said.append):
        for _ in range(2):
            torch.testing.assert_close(task.answer_loss(batch_of(0)), wanted)
    return said


def test_a_layer_that_tensor_parallelism_splits_has_its_logits(pool: Any) -> None:
    assert pool.run(split_by_columns) == [["The loss takes all logits at once: its output layer is sharded."]] * 2
