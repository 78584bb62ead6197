"""LoRAFSDP2Strategy's options on Hugging Face models: which blocks it shards, plans, ``pull_frozen``."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from lightning_lora import LoRACallback, LoRAConfig, apply_lora
from lightning_lora.strategies import LoRAFSDP2Strategy
from lightning_lora.strategies.fsdp2 import shard_blocks, tensor_parallel
from tests.distributed.nets import CONFIG, Block, clean, fill_adapters, train
from tests.distributed.runs import LitShared, Share


class LitLlama(LitShared):
    def __init__(self, tensor: int = 1) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__(late=True)
        torch.manual_seed(0)
        self.tensor = tensor
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
        self.net = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes)).train()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        ids = (batch[0].abs() * 20).long().clamp(max=63)
        return self.noted(self.net(input_ids=ids, labels=ids).loss)

    def train_dataloader(self) -> Any:
        rank, world = (dist.get_rank() // self.tensor, dist.get_world_size() // self.tensor) if dist.is_initialized() else (0, 1)
        return torch.utils.data.DataLoader(Share(rank, world), batch_size=None)


def fit_llama(tensor: int | None, reshard: bool = True, pull: bool = False) -> list[float]:
    warnings.simplefilter("ignore")
    torch.manual_seed(7)
    module = LitLlama(tensor or 1)
    strategy: Any = "auto"
    if tensor is not None:
        how = {"reshard_after_forward": reshard, "pull_frozen": pull}
        strategy = LoRAFSDP2Strategy(tensor_parallel_size=tensor, process_group_backend="gloo", **how)
    config = LoRAConfig(rank=4, target_modules="all-linear")
    trainer = L.Trainer(
        accelerator="cpu", devices=dist.get_world_size() if tensor else 1, strategy=strategy, max_epochs=2, logger=False,
        callbacks=[LoRACallback(config, merge_on_fit_end=False)], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module)
    if tensor is not None:  # FSDP2 gathers again where it has a mesh to gather over after the forward pass
        units = [block._get_fsdp_state()._fsdp_param_group for block in module.net.model.layers]
        assert all((unit.post_forward_mesh_info is not None) is reshard for unit in units)
        assert not pull or all(unit.sources is None for unit in units)  # given back at the end of fit
    return module.losses


@pytest.fixture(scope="module")
def llama_losses() -> list[float]:
    return fit_llama(None)


def test_fsdp2_finds_the_blocks_of_a_hugging_face_model(pool: Any, llama_losses: list[float]) -> None:
    for losses in pool.run(fit_llama, 1):
        assert losses == pytest.approx(llama_losses, abs=2e-6)


def test_fsdp2_keeps_what_it_gathered(pool: Any, llama_losses: list[float]) -> None:
    for losses in pool.run(fit_llama, 1, False):
        assert losses == pytest.approx(llama_losses, abs=2e-6)


def test_tensor_parallel_by_the_models_own_plan(pool: Any, llama_losses: list[float]) -> None:
    for losses in pool.run(fit_llama, 2):
        assert losses == pytest.approx(llama_losses, abs=2e-6)


def placed() -> dict[str, str]:
    model = apply_lora(LitLlama().net, config=LoRAConfig(rank=4, target_modules="all-linear"))
    tensor_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    block = model.model.layers[0]
    layers = {"column": block.self_attn.q_proj, "row": block.mlp.down_proj}
    return {f"{name} {part}": str(p.placements[0]) for name, layer in layers.items() for part, p in layer.lora_parameters().items()}


def test_no_adapter_is_cut_along_its_rank(pool: Any) -> None:
    for where in pool.run(placed):
        assert where == {"column lora_A": "R", "column lora_B": "S(0)", "row lora_A": "S(1)", "row lora_B": "R"}


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp2_pulls_what_is_frozen(pool: Any, llama_losses: list[float], reshard: bool) -> None:
    for losses in pool.run(fit_llama, 1, reshard, True):
        assert losses == pytest.approx(llama_losses, abs=2e-6)


@pytest.mark.parametrize("pull", [False, True])
def test_two_dimensions_by_the_models_own_plan(pool4: Any, llama_losses: list[float], pull: bool) -> None:
    for losses in pool4.run(fit_llama, 2, True, pull):
        assert losses == pytest.approx(llama_losses, abs=2e-6)


class EncoderDecoder(nn.Module):
    """Two lists of blocks, one of them checkpointed by torch's wrapper."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
            self.encoder = nn.ModuleList(Block() for _ in range(3))
            self.decoder = nn.Sequential(*(checkpoint_wrapper(Block()) for _ in range(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.encoder:
            x = block(x)
        return self.head(self.decoder(x))


def trained(sharded: bool) -> tuple[list[str], list[dict[str, torch.Tensor]]]:
    """What was sharded one by one; gradients and adapters of a few steps."""
    model = nn.ModuleDict({"net": apply_lora(EncoderDecoder(), config=CONFIG)})  # a LightningModule has the net as a child
    fill_adapters(model)
    if sharded:
        shard_blocks(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    rank, world = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
    units = [clean(name) for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    return units, list(train(model["net"], 3, rank, world))


def test_the_blocks_of_every_list_are_sharded_one_by_one(pool: Any) -> None:
    _, wanted = trained(sharded=False)
    for units, found in pool.run(trained, True):
        assert units == ["net", *(f"net.encoder.{i}" for i in range(3)), *(f"net.decoder.{i}" for i in range(2))]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


class Parts(nn.Module):
    """One part says what its blocks are, another has a list that would pass for blocks by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = EncoderDecoder(), nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)))
        self.first._no_split_modules = ["Block"]


def pull_in_parts() -> list[str]:
    module = apply_lora(Parts(), config=LoRAConfig(rank=2, target_modules=["q"]))
    shard_blocks(module, init_device_mesh("cpu", (dist.get_world_size(),)), pull_frozen=True)
    module.second(module.first(torch.ones(2, 8))).sum().backward()
    return [name for name, unit in module.named_modules() if isinstance(unit, FSDPModule)]


def test_pulls_the_blocks_that_were_sharded(pool: Any) -> None:
    for units in pool.run(pull_in_parts):
        assert len(units) == 2 + 5 and {"first", "second"} <= set(units)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no repeated blocks to shard .* use ModelParallelStrategy"):
        shard_blocks(nn.Linear(2, 2), None)  # type: ignore[arg-type]


def test_lora_fsdp2_is_registered_for_yaml() -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    assert isinstance(StrategyRegistry.get("lora_fsdp2"), LoRAFSDP2Strategy)
