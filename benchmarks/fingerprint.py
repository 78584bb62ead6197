"""Time the fingerprint of a base of Llama-3.1-8B's shapes in bf16. The memory is never written, so 16 GB of it cost next to nothing.

    python benchmarks/fingerprint.py
    python benchmarks/fingerprint.py --device cuda
    torchrun --nproc-per-node 2 benchmarks/fingerprint.py --shard

``--shard`` shards each block with FSDP2 over the processes and counts the bytes that one of them reduces with the others.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import nn

from lightning_lora.adapter_io.fingerprint import base_identity

VOCABULARY, HIDDEN, KEYS, WIDE, BLOCKS = 128_256, 4096, 1024, 14_336, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN, KEYS), "v": (HIDDEN, KEYS), "o": (HIDDEN, HIDDEN)}
        sizes |= {"gate": (HIDDEN, WIDE), "up": (HIDDEN, WIDE), "down": (WIDE, HIDDEN)}
        for name, size in sizes.items():
            self.add_module(name, nn.Linear(*size, bias=False))
        self.before, self.after = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)


class Base(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, HIDDEN), nn.RMSNorm(HIDDEN)
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(blocks)), nn.Linear(HIDDEN, VOCABULARY, bias=False)


def sharded(model: Base, device: str) -> list[int]:
    """Shard the model's blocks. Return a list that collects the bytes of each later all-reduce."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in [*model.blocks, model]:
        fully_shard(block, mesh=mesh)
    reduced, reduce = [], dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        reduced.append(tensor.nbytes)
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    return reduced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--shard", action="store_true")
    options = parser.parse_args()
    with torch.device("meta"):
        model = Base(options.blocks).bfloat16()
    reduced = sharded(model, options.device) if options.shard else []
    model.to_empty(device=options.device)
    numbers = sum(p.numel() for p in model.parameters())
    for round_ in ("first", "again", "again"):
        reduced.clear()
        start, busy = time.perf_counter(), time.process_time()
        base_identity(model)
        wall, busy = time.perf_counter() - start, time.process_time() - busy
        print(
            f"{round_}: {wall:.3f} s, {busy:.3f} s of the processor; {numbers / 1e9:.2f}e9 parameters, {sum(reduced) / 1e6:.2f} MB reduced"
        )
    if options.shard:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
