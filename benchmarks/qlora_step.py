"""A QLoRA training step's time and memory: the frozen NF4 model, ours, PEFT; eager, with each block compiled, and with each recorded as
CUDA graphs; checkpointed or not.

    python benchmarks/qlora_step.py           # Llama-3-8B's shape, 1 x 2048 tokens, all-linear r=16, on a GPU
    python benchmarks/qlora_step.py --batch 1 2 4 --how compiled --chunk
    python benchmarks/qlora_step.py --tiny    # the same steps in seconds, on a CPU too

Random weights, made and packed block by block on the device, so that the 16 GB of the bf16 model never exist: 4-bit NormalFloat with
double quantization by bitsandbytes, bf16 embeddings, norms and head, fp32 adapters under autocast, fused AdamW. *Frozen* is forward
and backward to the embedding's output with no adapter: what no QLoRA can avoid. All is measured in this one run, the peak after the
first four steps; ratios are to the frozen model run the same way. *Launching*: until the host has launched all of a step. Where that takes
as long as the step, the GPU waits for it. The loss is Hugging Face's, or with ``--chunk`` taken through the frozen head 2048 rows at a
time, as this package's causal-LM task does. Recorded rows' memory is what is reserved, gaps included.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import bitsandbytes
import torch
import torch.nn.functional as F
from kernel_times import Kernels, compared, kernels
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, __version__

from lightning_lora import LoRAConfig, apply_lora, chunked_cross_entropy, compile_layers, cuda_graph_step, quantize_base

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
TINY, LLAMA_8B = (64, 128, 2, 4, 2, 256), (4096, 14336, 32, 32, 8, 128256)


def build(sizes: Sequence[int], device: str) -> nn.Module:
    """A packed model with random weights: on the meta device first, then one block after the other."""
    config = LlamaConfig(**dict(zip(NAMES, sizes, strict=True)), tie_word_embeddings=False, use_cache=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    torch.manual_seed(0)
    with torch.device(device):
        rotary = type(model.model.rotary_emb)(config)  # its buffers are computed, not drawn
    for block in model.model.layers:
        draw(block.to_empty(device=device))
        quantize_base(block, "nf4")
    for part in (model.model.embed_tokens, model.model.norm, model.lm_head):
        draw(part.to_empty(device=device))
    model.model.rotary_emb = rotary
    return model


def draw(module: nn.Module) -> None:
    """Weights as Llama starts them: normal matrices, norms at one."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)


def frozen(model: nn.Module) -> nn.Module:
    for module in model.modules():  # as ours does: bitsandbytes' CPU inference layout has no backward
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model


def ours(model: nn.Module) -> nn.Module:
    return apply_lora(model, LoRAConfig(rank=16, alpha=32, target_modules=LINEARS))


def peft(model: nn.Module) -> nn.Module:
    model.is_loaded_in_4bit = True  # as transformers' own loader leaves it: PEFT takes its layer for 4-bit bases by this
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS))


MODES: dict[str, Callable[[nn.Module], nn.Module]] = {"frozen": frozen, "ours": ours, "PEFT": peft}


HOW = {  # whether each block is compiled, checkpointed, and recorded as CUDA graphs
    "compiled": (True, False, False),
    "eager": (False, False, False),
    "eager-checkpointed": (False, True, False),
    "compiled-checkpointed": (True, True, False),
    "recorded": (True, False, True),
}


class Result(NamedTuple):
    """Of one mode: median milliseconds of a step, those until all was launched, peak GiB; with ``--profile`` its kernels."""

    ms: float
    launching: float
    gib: float
    kernels: Kernels


def measure(name: str, options: argparse.Namespace, batch: int, compiled: bool, checkpointed: bool, recorded: bool) -> Result:
    """Run one mode in a fresh model, on so many rows."""
    torch._dynamo.reset()
    gc.collect()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
    device, sizes = "cuda" if cuda else "cpu", TINY if options.tiny else LLAMA_8B
    model = build(sizes, device)
    if checkpointed:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        key = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        enable(**{f"{key}_checkpointing_kwargs": {"use_reentrant": False}})
    base, model = model, MODES[name](model).train()
    if compiled:
        compile_layers(model, cuda_graphs=recorded)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=cuda) if trained else None
    ids = torch.randint(0, sizes[-1], (batch, 32 if options.tiny else options.seq), device=device)

    def step(k: int) -> None:
        with cuda_graph_step(trained) if recorded else nullcontext():
            with torch.autocast(device, torch.bfloat16):
                loss = chunked(base, ids, cuda and compiled) if options.chunk else model(input_ids=ids, labels=ids).loss
            loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    times, launching = [], []
    for k in range(options.steps + 4):
        if k == 4 and cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        step(k)
        launching.append(time.perf_counter() - started)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = (torch.cuda.max_memory_reserved if recorded else torch.cuda.max_memory_allocated)() / 2**30 if cuda else 0.0
    found = kernels(step, 3) if options.profile else {}
    return Result(statistics.median(times[4:]) * 1e3, statistics.median(launching[4:]) * 1e3, peak, found)


def chunked(base: nn.Module, ids: torch.Tensor, compiled: bool) -> torch.Tensor:
    """The next-token loss without all the logits at once."""
    hidden = base.model(input_ids=ids).last_hidden_state.flatten(0, 1)
    return chunked_cross_entropy(hidden, base.lm_head.weight, F.pad(ids[:, 1:], (0, 1), value=-100).flatten(), compiled=compiled)


def main(argv: list[str] | None = None) -> dict[str, Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small shape")
    parser.add_argument("--steps", type=int, default=8, help="counted steps, after four")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="rows; several: one table each")
    parser.add_argument("--seq", type=int, default=2048, help="tokens a row")
    parser.add_argument("--chunk", action="store_true", help="the chunked loss")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE", help=f"of {', '.join(MODES)}")
    parser.add_argument("--how", nargs="+", choices=HOW, default=list(HOW), metavar="HOW", help=f"of {', '.join(HOW)}; default all")
    parser.add_argument("--profile", action="store_true", help="the kernels of every mode, side by side")
    options = parser.parse_args(argv)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"torch {torch.__version__}, transformers {__version__}, bitsandbytes {bitsandbytes.__version__}, {device}")
    results: dict[str, Result] = {}
    for batch in options.batch:
        print(f"\n| {batch} rows | ms | x frozen | launching | GiB | x frozen |\n|---|---|---|---|---|---|")
        for how in options.how:
            for name in options.modes:
                result = results[f"{name}, {how}, {batch}"] = measure(name, options, batch, *HOW[how])
                frozen = results.get(f"frozen, {how}, {batch}")
                times, memory = (f"{result.ms / frozen.ms:.2f}", f"{result.gib / (frozen.gib or 1):.2f}") if frozen else ("–", "–")
                print(f"| {name}, {how} | {result.ms:.1f} | {times} | {result.launching:.1f} | {result.gib:.2f} | {memory} |", flush=True)
    if options.profile:
        for mode, result in results.items():
            busy, calls = (sum(values) for values in zip(*result.kernels.values(), strict=True))
            print(f"{mode}: busy {busy:.1f} ms in {calls:.0f} kernels")
        print(compared({mode: result.kernels for mode, result in results.items()}))
    return results


if __name__ == "__main__":
    main()
