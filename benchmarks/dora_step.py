"""Training step on the CPU under DoRA against plain LoRA, here and in PEFT: four copies of one small Llama on the same batch.

As in cpu_step.py the steps alternate in one run, and the figure to look at is the median of the rounds' ratios to plain LoRA.
With dropout, DoRA by its definition multiplies by the base weight twice.

    python benchmarks/dora_step.py --hidden 512 --batch 8
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence

import torch
from cpu_step import TARGETS, VOCAB, alternate, saved_bytes
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, apply_lora


def models(hidden: int, layers: int, dtype: torch.dtype, dropout: float, mlp_bias: bool) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 32}
    config = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=hidden // 64, mlp_bias=mlp_bias, attention_bias=mlp_bias, **sizes)
    base = LlamaForCausalLM(config).to(dtype)
    found: dict[str, nn.Module] = {}
    for variant in ("plain", "dora"):
        ours = LoRAConfig(rank=8, alpha=16, dropout=dropout, target_modules=TARGETS, variant=variant)
        found[variant] = apply_lora(copy.deepcopy(base), config=ours).train()
        theirs = LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=TARGETS, use_dora=variant == "dora")
        found[f"peft {variant}"] = get_peft_model(copy.deepcopy(base), theirs).train()
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="width, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq", type=int, default=128, help="tokens a row")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--steps", type=int, default=30, help="rounds of one step each")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base; adapters are fp32 in both")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--bias", action="store_true", help="give every linear a bias")
    options = parser.parse_args(argv)

    torch.set_num_threads(1)
    contestants = models(options.hidden, options.layers, getattr(torch, options.dtype), options.dropout, options.bias)
    ids = torch.randint(0, VOCAB, (options.batch, options.seq))
    seconds = alternate(contestants, ids, options.steps, time.process_time)
    shape = f"hidden {options.hidden}, {options.layers} layers, {options.batch} x {options.seq} tokens, 1 thread"
    print(f"{options.dtype}, dropout {options.dropout:g}, bias {options.bias}, {shape}")
    ratios = {}
    for name, values in seconds.items():
        ratios[name] = statistics.median(a / b for a, b in zip(values, seconds["plain"], strict=True))
        saved = saved_bytes(contestants[name], ids) / 1e6
        print(f"{name:12} {1000 * statistics.median(values):8.1f} ms   {ratios[name]:.3f} x plain   saved for backward {saved:.2f} MB")
    return ratios


if __name__ == "__main__":
    main()
