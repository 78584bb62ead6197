"""What adapters on all experts cost: time and memory of a training step of a mixture, frozen, with LoRA and in PEFT, in one run.

    python benchmarks/moe_step.py                             # Qwen3-30B-A3B's shape, 2 x 2048 tokens, experts and attention, r=16
    python benchmarks/moe_step.py --layers 12 --batch 4 --modes frozen,ours,peft,frozen-layer,ours-layer
    python benchmarks/moe_step.py --modes frozen-fp8,ours-fp8 # an FP8 base against the same base frozen
    python benchmarks/moe_step.py --profile ours              # its kernels by time
    python benchmarks/moe_step.py --shape tiny                # the same in seconds, on a CPU too

A mode is a method and what is done to it, joined by dashes:

    frozen          no adapter: forward and backward to the embeddings, as far as any adapter's gradient has to go
    ours            this package: an A and a B for each expert and projection, and on attention; fp32 adapters
    attention       this package on attention alone, so that the experts' part of the cost is seen
    peft            PEFT: target_parameters, which adds the dense updates of all experts in each step; bf16 adapters, its fastest
    eager           transformers' loop over the experts; other modes have its grouped products (experts_implementation="grouped_mm")
    layer           each decoder layer compiled (`compile="layer"`), and the loss, as `fit` has it
    graph           with layer: each compiled layer's passes recorded as CUDA graphs and replayed; memory is what is reserved
    ckpt            gradient checkpointing
    drop            dropout (--dropout)
    fp8, nf4        linears and experts quantized (`quantize_base`)

Random weights and tokens, bf16 base, fused AdamW, cross entropy in blocks of rows through the frozen head, median of the steps. The
router's auxiliary loss is left out. *x frozen* is to the frozen mode with the same flags, dropout apart.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from floor import Result, measure
from floor_modes import DEVICE, Setting
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, __version__

from lightning_lora import LoRAConfig, apply_lora, chunked_cross_entropy, compile_layers, cuda_graph_step, quantize_base

MODES = "frozen,attention,ours,ours-drop,peft"
FORMATS = {"fp8", "nf4"}
FLAGS = {"eager", "layer", "graph", "ckpt", "drop"} | FORMATS
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
WEIGHTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
NAMES = (
    "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "num_experts", "num_experts_per_tok",
)  # fmt: skip
SHAPES = {
    "tiny": (64, 32, 2, 4, 2, 16, 256, 8, 2),
    "30b-a3b": (2048, 768, 48, 32, 4, 128, 151936, 128, 8),  # Qwen3-30B-A3B
}


def parse(mode: str) -> tuple[str, set[str]]:
    """The method and the flags of a mode's name."""
    method, *flags = mode.split("-")
    if method not in METHODS or set(flags) - FLAGS:
        raise SystemExit(f"mode {mode!r}: a method of {', '.join(METHODS)}, then any of {', '.join(sorted(FLAGS))}")
    return method, set(flags)


def alike(mode: str) -> str:
    """The frozen mode with the same flags."""
    return "-".join(["frozen", *(flag for flag in mode.split("-")[1:] if flag != "drop")])


def build(setting: Setting, flags: set[str], device: str = DEVICE) -> Any:
    """The model, made and filled on the device."""
    sizes = dict(zip(NAMES, SHAPES[setting.shape], strict=True))
    sizes["num_hidden_layers"] = setting.layers or sizes["num_hidden_layers"]
    config = Qwen3MoeConfig(
        **sizes, intermediate_size=3 * sizes["hidden_size"], decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True,
        use_cache=False, max_position_embeddings=max(8192, setting.seq), attn_implementation="sdpa",
        experts_implementation="eager" if "eager" in flags else "grouped_mm",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen3MoeForCausalLM(config).train()
    finally:
        torch.set_default_dtype(torch.float32)
    for how in flags & FORMATS:
        quantize_base(model, how)
    return model


def frozen(model: Any, setting: Setting, dropout: float) -> Any:
    return model.requires_grad_(False)


def ours(model: Any, setting: Setting, dropout: float, targets: list[str]) -> Any:
    return apply_lora(model, LoRAConfig(rank=setting.rank, alpha=2 * setting.rank, dropout=dropout, target_modules=targets))


def peft(model: Any, setting: Setting, dropout: float) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=setting.rank, lora_alpha=2 * setting.rank, lora_dropout=dropout, target_modules=ATTENTION, target_parameters=WEIGHTS
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


METHODS: dict[str, Callable[..., Any]] = {
    "frozen": frozen,
    "ours": partial(ours, targets=[*ATTENTION, "experts"]),
    "attention": partial(ours, targets=ATTENTION),
    "peft": peft,
}


def training_step(mode: str, setting: Setting) -> Callable[[int], Tensor]:
    """The step to measure: forward, backward and the optimizer, over four batches in turn."""
    method, flags = parse(mode)
    base = build(setting, flags)
    model = METHODS[method](base, setting, setting.dropout if "drop" in flags else 0.0).train()
    if "ckpt" in flags:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if "layer" in flags:
        compile_layers(model, backend=setting.backend, cuda_graphs="graph" in flags)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=DEVICE == "cuda") if trained else None
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, base.config.vocab_size, (setting.batch, setting.seq), generator=generator).to(DEVICE) for _ in range(4)]

    def step(k: int) -> Tensor:
        ids = batches[k % 4]
        inputs = {"input_ids": ids} if trained else {"inputs_embeds": base.get_input_embeddings()(ids).requires_grad_()}
        labels = F.pad(ids[:, 1:], (0, 1), value=-100).flatten()
        with cuda_graph_step(trained) if "graph" in flags else nullcontext():
            hidden = base.model(**inputs).last_hidden_state.flatten(0, 1)
            loss = chunked_cross_entropy(hidden, base.lm_head.weight, labels, compiled=DEVICE == "cuda" and "layer" in flags)
            loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def arithmetic(setting: Setting) -> float:
    """FLOPs a token of the frozen step: 4 for each parameter that a token meets."""
    base, sizes = build(setting, set(), "meta"), dict(zip(NAMES, SHAPES[setting.shape], strict=True))
    active = sizes["num_experts_per_tok"] / sizes["num_experts"]
    return 4 * sum(p.numel() * (active if ".experts." in name else 1) for name, p in base.named_parameters() if "embed" not in name)


def table(modes: list[str], setting: Setting) -> dict[str, Result]:
    """Each mode in turn."""
    needs, results = arithmetic(setting), dict[str, Result]()
    layers = setting.layers or dict(zip(NAMES, SHAPES[setting.shape], strict=True))["num_hidden_layers"]
    print(f"\n| {setting.shape}, {layers} layers, {setting.batch} x {setting.seq}, r={setting.rank} | ms | x frozen | tokens/s | TFLOP/s |"
          f" GiB | x frozen | set-up s | loss |\n|{'---|' * 9}", flush=True)  # fmt: skip
    for mode in modes:
        result = results[mode] = measure(mode, setting, make=training_step)
        if result.error:
            print(f"| {mode} | {result.error} | | | | | | | |", flush=True)
            continue
        base, speed = results.get(alike(mode)), setting.batch * setting.seq / result.ms * 1e3
        times = f"{result.ms / base.ms:.2f}" if base is not None and base.ms else "–"
        more = f"{result.gib / base.gib:.2f}" if base is not None and base.gib else "–"
        print(f"| {mode} | {result.ms:.1f} | {times} | {speed:,.0f} | {speed * needs / 1e12:.3g} | {result.gib:.1f} | {more} |"
              f" {result.setup:.0f} | {result.loss:.4f} |", flush=True)  # fmt: skip
    return results


def main(argv: list[str] | None = None) -> dict[str, Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="30b-a3b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has, as PEFT's dense updates may need")
    parser.add_argument("--batch", type=int, default=2, help="rows")
    parser.add_argument("--seq", type=int, help="tokens a row (2048; tiny: 32)")
    parser.add_argument("--rank", type=int, default=16, help="of each expert's adapter, and of attention's")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the modes with drop")
    parser.add_argument("--modes", default=MODES, help="comma-separated")
    parser.add_argument("--steps", type=int, default=8, help="that count")
    parser.add_argument("--warmup", type=int, default=3, help="steps before those")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--profile", metavar="MODE", help="the 40 kernels of a mode that take longest")
    options = parser.parse_args(argv)
    setting = Setting(
        options.shape, options.batch, options.seq or (32 if options.shape == "tiny" else 2048), options.rank, options.dropout,
        options.layers, options.steps, options.warmup, options.backend,
    )  # fmt: skip
    modes = [options.profile] if options.profile else options.modes.split(",")
    for mode in modes:
        parse(mode)
    warnings.simplefilter("ignore")
    print(
        f"torch {torch.__version__}, transformers {__version__}, {torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'}", flush=True
    )
    if not options.profile:
        return table(modes, setting)
    result = measure(options.profile, setting, profile=True, make=training_step)
    busy, calls = (sum(values) for values in zip(*result.kernels.values(), strict=True)) if result.kernels else (0, 0)
    print(f"{options.profile}: {result.error or f'{result.ms:.1f} ms a step, busy {busy:.1f} ms in {calls:.0f} kernels'}\n")
    print("| kernel | ms a step | calls a step |\n|---|---|---|")
    for name, (spent, count) in list(result.kernels.items())[:40]:
        print(f"| {name[:150].replace('|', '/')} | {spent:.3f} | {count:.0f} |", flush=True)
    return {options.profile: result}


if __name__ == "__main__":
    main()
