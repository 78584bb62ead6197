"""A training step's time and memory as a user gets it: the frozen model, ours, PEFT; eager and with each block compiled.

    python benchmarks/step.py           # Llama-3.2-1B's shape, 4 x 2048 tokens, all-linear r=16, on a GPU
    python benchmarks/step.py --tiny    # the same steps in seconds, on a CPU too

Hugging Face's own loss, bf16 base, fp32 adapters under autocast, AdamW. *Frozen* is forward and backward to the embedding's output
with no adapter: what no LoRA can avoid. Every mode is measured in this one run; ratios are to the frozen model run the same way.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, __version__

from lightning_lora import LoRAConfig, apply_lora

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def frozen(model: nn.Module, dropout: float) -> nn.Module:
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model


def ours(model: nn.Module, dropout: float) -> nn.Module:
    return apply_lora(model, config=LoRAConfig(rank=16, alpha=32, dropout=dropout, target_modules=LINEARS))


def peft(model: nn.Module, dropout: float) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules=LINEARS))


def measure(
    adapt: Callable[[nn.Module, float], nn.Module], options: argparse.Namespace, compiled: bool, dropout: float
) -> tuple[float, float]:
    """Median milliseconds a step, and peak GiB."""
    torch._dynamo.reset()
    cuda = torch.cuda.is_available()
    sizes = (64, 128, 2, 4, 2, 256) if options.tiny else (2048, 8192, 16, 32, 8, 128256)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    config = LlamaConfig(**dict(zip(names, sizes, strict=True)), tie_word_embeddings=True, use_cache=False)
    with torch.device("cuda" if cuda else "cpu"):
        model = LlamaForCausalLM(config).bfloat16()
        ids = torch.randint(0, sizes[-1], (2, 32) if options.tiny else (4, 2048))
    model = adapt(model, dropout).train()
    if compiled:
        for block in [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]:
            block.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=cuda) if trained else None
    times = []
    for step in range(options.steps + 4):
        if step == 4 and cuda:
            torch.cuda.reset_peak_memory_stats()
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.autocast("cuda" if cuda else "cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    del model, optimizer, trained, loss
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return statistics.median(times[4:]) * 1e3, peak


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small shape")
    parser.add_argument("--steps", type=int, default=12, help="counted steps, after four")
    options = parser.parse_args(argv)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"torch {torch.__version__}, transformers {__version__}, {device}")
    print("| mode | ms | x frozen | GiB | x frozen |\n|---|---|---|---|---|")
    results: dict[str, tuple[float, float]] = {}
    for compiled in (False, True):
        how = "blocks compiled" if compiled else "eager"
        for name, adapt, dropout in (
            ("frozen", frozen, 0.0),
            ("ours", ours, 0.0),
            ("ours", ours, 0.1),
            ("PEFT", peft, 0.0),
            ("PEFT", peft, 0.1),
        ):
            mode = f"{name}, {how}" + (f", dropout {dropout:g}" if name != "frozen" else "")
            ms, peak = results[mode] = measure(adapt, options, compiled, dropout)
            base_ms, base_peak = results[f"frozen, {how}"]
            print(f"| {mode} | {ms:.1f} | {ms / base_ms:.2f} | {peak:.1f} | {peak / base_peak if base_peak else 0:.2f} |", flush=True)
    return results


if __name__ == "__main__":
    main()
