"""A sharded Hugging Face model exports the folder of a model in one process, and no process computes alone what needs all."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, export_merged
from lightning_lora.utils.sharding import on_first_rank_with_help
from tests.adapter_io.folders import differences
from tests.distributed.nets import fill_adapters


def model(targets: list[str]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return apply_lora(
        LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=True, **sizes)), LoRAConfig(rank=2, target_modules=targets)
    )


def sharded(name: str, targets: list[str]) -> nn.Module:
    whole = model(targets)
    fill_adapters(whole)
    if name == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        for number, block in enumerate(whole.model.layers):
            whole.model.layers[number] = FullyShardedDataParallel(block, use_orig_params=True, device_id=torch.device("cpu"))
        return FullyShardedDataParallel(whole, use_orig_params=True, device_id=torch.device("cpu"))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in whole.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(whole, mesh=mesh)


def export(name: str, targets: list[str], folder: str) -> None:
    warnings.simplefilter("ignore")
    export_merged(sharded(name, targets), folder, shard_bytes=4000)


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]], ids=["blocks", "tied head"])
def test_the_folder_is_that_of_one_process(pool: Any, name: str, targets: list[str], tmp_path: Path) -> None:
    pool.run(export, name, targets, str(tmp_path / "found"))
    whole = model(targets)
    fill_adapters(whole)
    export_merged(whole, tmp_path / "wanted", shard_bytes=4000)
    assert differences(tmp_path / "found", tmp_path / "wanted") == []


def asked(fails_at: int | None, on: int) -> list[Any]:
    """The first rank asks for sums over all ranks, in an order that the others do not know."""

    def answer(number: int) -> float:
        total = torch.tensor(float(number * (1 + dist.get_rank())))
        dist.all_reduce(total)
        if number == fails_at and dist.get_rank() == on:
            raise OSError(f"disk full at {number}")
        return float(total)

    got: list[float] = []
    try:
        on_first_rank_with_help(lambda ask: got.extend(ask(number) for number in (3, 1, 2)), answer)
    except OSError as error:
        got.append(str(error))  # type: ignore[arg-type]
    after = torch.ones(())
    dist.all_reduce(after)  # nobody is left behind in the conversation
    return [*got, float(after)]


def test_the_first_rank_asks_and_all_answer(pool: Any) -> None:
    assert pool.run(asked, None, 0) == [[9.0, 3.0, 6.0, 2.0], [2.0]]


def test_an_answer_that_fails_on_one_rank_leaves_none_waiting(pool: Any) -> None:
    assert pool.run(asked, 1, 0) == [[9.0, "disk full at 1", 2.0], ["disk full at 1", 2.0]]
