"""Whole blocks under tensor parallelism: linears that share an input, the gated MLP, a Llama eager, checkpointed and compiled."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, apply_lora, checkpoint_layers
from lightning_lora.model.compile import compile_layers
from lightning_lora.model.parallel import place_adapters
from lightning_lora.ops import backends
from lightning_lora.strategies.fsdp2 import tensor_parallel
from tests.distributed.nets import adapter_tensors, fill_adapters
from tests.distributed.test_tensor_parallel import AllReduces, step


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(*size, bias=False) for size in ((8, 16), (8, 16), (16, 8)))
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


GATED = {"gate_proj": ColwiseParallel, "up_proj": ColwiseParallel, "down_proj": RowwiseParallel}


def gated(order: str, fused: bool) -> tuple[float, int]:
    """The worst difference from one process, and the collectives of a step."""
    config = LoRAConfig(rank=3, alpha=6, target_modules="all-linear")
    mesh, plan = init_device_mesh("cpu", (dist.get_world_size(),)), {f"mlp.{name}": style() for name, style in GATED.items()}
    model, alone = nn.ModuleDict({"mlp": Gated()}), apply_lora(nn.ModuleDict({"mlp": Gated()}), config=config)
    if order == "before":
        parallelize_module(apply_lora(model, config=config), mesh, plan)
        place_adapters(model)
    else:
        apply_lora(parallelize_module(model, mesh, plan), config=config)
    for net in (model, alone):
        fill_adapters(net)
    with patch.object(backends, "worth_kernels", lambda x: fused), AllReduces() as mode:
        found = step(model["mlp"])
    wanted = step(alone["mlp"])
    assert found.keys() == wanted.keys() and len(found) == 8
    return max(((found[name] - tensor).abs().max() / tensor.abs().max()).item() for name, tensor in wanted.items()), mode.number


@pytest.mark.parametrize(("order", "fused", "collectives"), [("before", False, 4), ("after", False, 4), ("after", True, 3)])
def test_linears_with_one_input_sum_its_gradient_once(pool: Any, order: str, fused: bool, collectives: int) -> None:
    """The output's sum, that of x's gradient, that of both A's, and that of down's B; as one operation, A's and B in one."""
    for difference, found in pool.run(gated, order, fused):
        assert difference < 1e-5 and found == collectives


def llamas(how: str) -> tuple[float, int]:
    """The worst difference of a Llama's loss and gradients from one process, and the number of compiled graphs."""
    config = LoRAConfig(rank=2, alpha=4, target_modules="all-linear")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    torch.manual_seed(0)
    ids, results, counter = torch.randint(0, 32, (2, 8)), [], CompileCounterWithBackend("aot_eager")
    for parallel in (True, False):
        torch.manual_seed(0)
        settings = LlamaConfig(vocab_size=32, use_cache=False, attention_bias=True, **sizes)
        model = apply_lora(LlamaForCausalLM(settings).double().train(), config=config)
        model.enable_input_require_grads()
        if parallel:
            tensor_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),)))
            if "checkpointed" in how:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            if "inputs" in how:
                checkpoint_layers(model, keep="inputs")
            if "compiled" in how:
                torch._dynamo.reset()
                compile_layers(model, backend=counter)
        fill_adapters(model)
        for _ in range(3 if parallel else 1):
            model.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        results.append({"loss": loss.detach(), **adapter_tensors(model, lambda p: p.grad)})
    torch._dynamo.reset()
    found, wanted = results
    assert found.keys() == wanted.keys() and len(found) == 3 * 14 + 1
    return max(((found[name] - tensor).abs().max() / tensor.abs().max()).item() for name, tensor in wanted.items()), counter.frame_count


@pytest.mark.parametrize(
    ("how", "graphs"), [("eager", 0), ("checkpointed", 0), ("compiled", 1), ("compiled, checkpointed", 1), ("compiled, inputs", 1)]
)
def test_a_llama_by_its_own_plan(pool: Any, how: str, graphs: int) -> None:
    """In float64, biases that are split and biases of sums among them; compiled, one graph serves all blocks and steps."""
    for difference, found in pool.run(llamas, how):
        assert difference < 1e-12 and found == graphs
