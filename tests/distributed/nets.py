"""A small network, its batches, and what a single process computes: the reference for every sharded run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.layers import lora_layers
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.sharding import full_tensor, local_shard, local_tensor

CONFIG = LoRAConfig(rank=4, alpha=8, target_modules=["q", "v", "fc1", "fc2"])


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.q, self.v = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(x)
        x = x + torch.tanh(self.q(hidden)) * self.v(hidden)
        return x + self.fc2(F.gelu(self.fc1(x)))


class Net(nn.Module):
    checkpointing: str | None = None  # "non-reentrant" or "reentrant"

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers, self.head = nn.Linear(8, 16), nn.ModuleList(Block() for _ in range(2)), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        if self.checkpointing == "reentrant":
            x.requires_grad_()  # what users have to do: such checkpoints cut the graph where no input needs a gradient
        for layer in self.layers:
            x = layer(x) if self.checkpointing is None else checkpoint(layer, x, use_reentrant=self.checkpointing == "reentrant")
        return self.head(x)


def make_net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net()


def make_data(n: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 8, generator=generator), torch.randint(0, 4, (n,), generator=generator)


def clean(name: str) -> str:
    return clean_name(name).removeprefix("module.")  # DDP's


@torch.no_grad()
def fill_adapters(model: nn.Module) -> None:
    """The same A and non-zero B whatever the sharding."""
    for name, layer in lora_layers(model):
        for part, parameter in layer.lora_parameters().items():
            generator = torch.Generator().manual_seed(sum(map(ord, clean(name) + part)))
            full = torch.randn(layer.parameter_shapes(layer, layer.spec)[part], generator=generator) * 0.1
            full += part.rstrip("0") not in ("lora_A", "lora_B")  # magnitudes are around one, not around zero
            local_tensor(parameter).copy_(local_shard(full, parameter))


def adapter_tensors(model: nn.Module, what: Callable[[nn.Parameter], Any] = lambda p: p) -> dict[str, torch.Tensor]:
    """Clean name → whole tensor (of the parameter, or of its gradient) as a plain copy."""
    found = {}
    for name, layer in lora_layers(model):
        for part, parameter in layer.lora_parameters().items():
            if what(parameter) is not None:  # a frozen factor has no gradient
                found[f"{clean(name)}.{part}"] = full_tensor(what(parameter)).detach().clone()
    return found


def train(model: nn.Module, steps: int = 3, rank: int = 0, world: int = 1) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A few AdamW steps on this rank's part of the batch: the first step's gradients, the final adapters."""
    x, y = (part.chunk(world)[rank] for part in make_data())
    # With eps=1e-8 Adam's first steps would be the sign of gradients that are rounding noise, which differs between CPUs.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3, foreach=False)
    grads: dict[str, torch.Tensor] = {}
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if step == 0:
            grads = adapter_tensors(model, lambda p: p.grad)
        optimizer.step()
    return grads, adapter_tensors(model)


def reference(steps: int = 3, config: LoRAConfig = CONFIG) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same in one process; computed once for each config."""
    key = f"{steps} {config}"
    if key not in _REFERENCES:
        model = apply_lora(make_net(), config=config)
        fill_adapters(model)
        _REFERENCES[key] = train(model, steps)
    return _REFERENCES[key]


_REFERENCES: dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = {}


def same_on_all_ranks(tensors: dict[str, torch.Tensor]) -> bool:
    others: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(others, tensors)
    return all(torch.equal(other[name], tensor) for other in others for name, tensor in tensors.items())
