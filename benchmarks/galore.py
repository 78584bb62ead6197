"""GaLore beside full fine-tuning and LoRA on a small Llama: bytes of the optimizer's state, of everything that trains, loss, step.

Every way starts from the same random weights and sees the same batches, in a process of its own. The text is random with structure (each
token tells the next but for noise), so that there is something to learn.

    python benchmarks/galore.py --steps 200 --rank 16
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's package

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, apply_lora, galore_optimizer, galore_param_groups, lora_param_groups

VOCAB, NOISE = 512, 0.1
WAYS = {"full": "AdamW on every weight", "galore": "GaLore", "lora": "LoRA"}


def batches(options: argparse.Namespace) -> Iterator[Tensor]:
    """(batch, seq) token ids; the next is a fixed permutation of the last, or with probability ``NOISE`` any."""
    generator = torch.Generator().manual_seed(1)
    follows = torch.randperm(VOCAB, generator=generator)
    for _ in range(options.steps):
        columns = [torch.randint(0, VOCAB, (options.batch,), generator=generator)]
        for _ in range(options.seq - 1):
            anything = torch.randint(0, VOCAB, (options.batch,), generator=generator)
            columns.append(torch.where(torch.rand(options.batch, generator=generator) < NOISE, anything, follows[columns[-1]]))
        yield torch.stack(columns, 1)


def build(way: str, options: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model, whose weights are the same each time, and what trains it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": options.hidden, "intermediate_size": 3 * options.hidden, "num_hidden_layers": options.layers}
    heads = {"num_attention_heads": options.hidden // 32, "num_key_value_heads": options.hidden // 32}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=False, **sizes, **heads)).train()
    if way == "lora":
        # Embedding and head train in full: with random weights little could be learnt through frozen ones.
        ends = ["embed_tokens", "lm_head"]
        config = LoRAConfig(rank=options.rank, alpha=2 * options.rank, target_modules="all-linear", modules_to_save=ends)
        return model, torch.optim.AdamW(lora_param_groups(apply_lora(model, config=config), lr=options.lr))
    if way == "full":
        return model, torch.optim.AdamW(model.parameters(), lr=options.lr)
    return model, galore_optimizer(galore_param_groups(model, lr=options.lr, rank=options.rank, update_proj_gap=options.gap, scale=1.0))


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train in this process: tensor bytes, the mean loss of the last tenth, the median step."""
    torch.set_num_threads(options.threads)
    model, optimizer = build(way, options)
    losses, seconds = [], []
    for ids in batches(options):
        begun = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begun)
        losses.append(loss.item())
    leaves = torch.utils._pytree.tree_leaves(optimizer.state_dict()["state"])
    state = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
    return {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "state": state,
        "all": state + gradients + sum(p.nbytes for p in model.parameters()),
        "loss": statistics.mean(losses[-max(1, len(losses) // 10) :]),
        "first": losses[0],
        "seconds": statistics.median(seconds),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="width, a multiple of 32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq", type=int, default=64, help="tokens a row")
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=32, help="of GaLore and of LoRA")
    parser.add_argument("--gap", type=int, default=50, help="steps between GaLore's subspaces")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    shape = f"hidden {options.hidden}, {options.layers} layers, {options.batch} x {options.seq} tokens, rank {options.rank}"
    print(f"{shape}, {options.steps} steps, lr {options.lr:g}, {options.threads} threads")
    print("| way | trainable | optimizer state, MiB | weights, gradients, state, MiB | loss | step, ms |\n|---|---|---|---|---|---|")
    results = {}
    for way, name in WAYS.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[way] = result = pool.apply(measure, (way, options))
        mib = f"{result['state'] / 2**20:.2f} | {result['all'] / 2**20:.2f}"
        print(f"| {name} | {result['trainable']:,} | {mib} | {result['loss']:.3f} | {1000 * result['seconds']:.1f} |", flush=True)
    print(f"loss before: {results['full']['first']:.3f}")
    return results


if __name__ == "__main__":
    main()
