"""Training step on the CPU: this package against PEFT on the same small Llama, with the same adapters on all seven linears of a block.

The two models are copies of one another and take the same batch. Their steps alternate in one run and change places every round, so
that whatever else the machine does hits both; the figure to look at is the median of the rounds' ratios. With one thread the clock is the
process's CPU time, which busy neighbours hardly lengthen; with more it is the wall's.

    python benchmarks/cpu_step.py --dtype bfloat16 --dropout 0.1
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, apply_lora

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCAB, WARM_UP = 512, 3


def twins(hidden: int, layers: int, dtype: torch.dtype, dropout: float) -> dict[str, nn.Module]:
    """The same Llama twice, adapted by this package and by PEFT."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 32}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_key_value_heads=hidden // 64, **sizes)).to(dtype)
    ours = apply_lora(copy.deepcopy(base), config=LoRAConfig(rank=8, alpha=16, dropout=dropout, target_modules=TARGETS))
    peft = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=TARGETS))
    assert trainable(ours) == trainable(peft)
    return {"ours": ours.train(), "peft": peft.train()}


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def saved_bytes(model: nn.Module, ids: Tensor) -> int:
    """Bytes of the storages that one forward pass keeps for the backward pass, each counted once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def alternate(models: dict[str, nn.Module], ids: Tensor, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of every step (forward, backward, AdamW) of each model, after a few that do not count."""
    optimizers = {name: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3) for name, m in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for step in range(WARM_UP + rounds):
        for name in sorted(models, reverse=step % 2 == 0):
            start = clock()
            models[name](input_ids=ids, labels=ids).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            seconds[name].append(clock() - start)
    return {name: values[WARM_UP:] for name, values in seconds.items()}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="width, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq", type=int, default=128, help="tokens a row")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--steps", type=int, default=40, help="rounds of one step each")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base; adapters are fp32 in both")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)

    torch.set_num_threads(options.threads)
    models = twins(options.hidden, options.layers, getattr(torch, options.dtype), options.dropout)
    ids = torch.randint(0, VOCAB, (options.batch, options.seq))
    seconds = alternate(models, ids, options.steps, time.process_time if options.threads == 1 else time.perf_counter)
    result: dict[str, Any] = {
        **{f"{name}_ms": 1000 * statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(a / b for a, b in zip(seconds["ours"], seconds["peft"], strict=True)),
        **{f"{name}_saved_mb": saved_bytes(model, ids) / 1e6 for name, model in models.items()},
    }
    shape = f"hidden {options.hidden}, {options.layers} layers, {options.batch} x {options.seq} tokens, {options.threads} threads"
    print(f"{options.dtype}, dropout {options.dropout:g}, {shape}")
    print(f"ours {result['ours_ms']:.1f} ms   PEFT {result['peft_ms']:.1f} ms   ratio {result['ratio']:.3f}")
    print(f"saved for backward: ours {result['ours_saved_mb']:.2f} MB   PEFT {result['peft_saved_mb']:.2f} MB")
    return result


if __name__ == "__main__":
    main()
