"""The modes that ``floor.py`` measures: a model of a shape, a method on it, and the training step of both."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    checkpoint_layers,
    chunked_cross_entropy,
    compile_layers,
    cuda_graph_step,
    get_lora_parameters,
    offload_activations,
    offload_frozen,
    quantize_base,
    unfuse,
)
from lightning_lora.ops import float8

NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 16, 256),
    "small": (512, 1408, 4, 8, 4, 64, 4096),  # for a CPU
    "1b": (2048, 8192, 16, 32, 8, 64, 128256),  # Llama-3.2-1B, with a tied head
    "8b": (4096, 14336, 32, 32, 8, 128, 128256),  # Llama-3.1-8B
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = re.compile(r"r\d+")
FLAGS = {"layer", "chunk", "graph", "ckpt", "selective", "offload", "offloadfrozen", "drop", "unfused", "fp8", "half"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Setting:
    """What is measured, apart from the mode."""

    shape: str = "1b"
    batch: int = 4
    seq: int = 2048
    rank: int = 16
    dropout: float = 0.1
    layers: int | None = None  # fewer than the shape has
    steps: int = 12
    warmup: int = 5
    backend: str = "inductor"


def parse(mode: str) -> tuple[str, set[str]]:
    """The method and the flags of a mode's name."""
    method, *flags = ("frozen-layer-chunk" + mode.removeprefix("floor") if mode.startswith("floor") else mode).split("-")
    if method not in METHODS or {flag for flag in flags if not RANK.fullmatch(flag)} - FLAGS:
        raise SystemExit(f"mode {mode!r}: a method of {', '.join(METHODS)} (or floor), then any of {', '.join(sorted(FLAGS))}, r64")
    return method, set(flags)


def with_rank(setting: Setting, mode: str) -> Setting:
    """The setting with the rank that the mode's name has, if it has one."""
    ranks = [int(flag[1:]) for flag in parse(mode)[1] if RANK.fullmatch(flag)]
    return replace(setting, rank=ranks[0]) if ranks else setting


def alike(mode: str) -> str:
    """The frozen mode with the same loss, compiled or not."""
    flags = parse(mode)[1]
    return "-".join(["frozen", *(flag for flag in ("layer", "chunk") if flag in flags)]).replace("frozen-layer-chunk", "floor")


def build(setting: Setting, device: str = DEVICE) -> Any:
    """The model, made and filled on the device."""
    sizes = dict(zip(NAMES, SHAPES[setting.shape], strict=True))
    sizes["num_hidden_layers"] = setting.layers or sizes["num_hidden_layers"]
    config = LlamaConfig(
        **sizes, max_position_embeddings=max(8192, setting.seq), rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=setting.shape != "8b", use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(torch.float32)


def sizes_of_linears(base: Any) -> list[tuple[int, int]]:
    """(in, out) of every linear that gets an adapter."""
    return [(m.in_features, m.out_features) for name, m in base.named_modules() if name.rpartition(".")[2] in LINEARS]


def arithmetic(setting: Setting) -> tuple[float, float]:
    """FLOPs a token: the floor's, 4 a parameter, and those of the rank-r products, 6·r·Σ(in + out) over the adapted linears."""
    base = build(setting, "meta")
    return 4.0 * sum(p.numel() for p in base.parameters()), 6.0 * setting.rank * sum(map(sum, sizes_of_linears(base)))


def frozen(model: Any, setting: Setting, dropout: float, flags: set[str]) -> Any:
    return model.requires_grad_(False)


def full(model: Any, setting: Setting, dropout: float, flags: set[str]) -> Any:
    return model


def peft(model: Any, setting: Setting, dropout: float, flags: set[str], **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=setting.rank, lora_alpha=2 * setting.rank, lora_dropout=dropout, target_modules=LINEARS, **options)
    return get_peft_model(model, config, autocast_adapter_dtype="chunk" not in flags)


def ours(model: Any, setting: Setting, dropout: float, flags: set[str], **options: Any) -> Any:
    config = LoRAConfig(rank=setting.rank, alpha=2 * setting.rank, dropout=dropout, target_modules=LINEARS, **options)
    apply_lora(model, config=config)
    if "unfused" in flags:
        unfuse(model)
    if "half" in flags:
        for adapter in get_lora_parameters(model):
            adapter.data = adapter.data.bfloat16()
    return model


def products_alone(base: Any, setting: Setting) -> Callable[[], None]:
    """The six rank-r products of every adapted linear, by the library, one after another, on random tensors that all linears share.

    Forward t = x·Aᵀ and t·Bᵀ; backward dt = dy·B, dB = dyᵀ·t, dt·A and dA = dtᵀ·x. Nothing is added, cast or dropped.
    """
    rows, sizes = setting.batch * setting.seq, sizes_of_linears(base)
    widths = {width for size in sizes for width in size}
    options = {"device": DEVICE, "dtype": torch.bfloat16}
    wide = {width: torch.randn(rows, width, **options) for width in widths}
    factor = {width: torch.randn(setting.rank, width, **options) for width in widths}
    out, t, d = {width: torch.empty(rows, width, **options) for width in widths}, *torch.randn(2, rows, setting.rank, **options)
    gradient = {width: torch.empty(setting.rank, width, **options) for width in widths}

    def run() -> None:
        for i, o in sizes:
            torch.mm(wide[i], factor[i].t(), out=t)
            torch.mm(t, factor[o], out=out[o])
            torch.mm(wide[o], factor[o].t(), out=d)
            torch.mm(t.t(), wide[o], out=gradient[o])
            torch.mm(d, factor[i], out=out[i])
            torch.mm(d.t(), wide[i], out=gradient[i])

    return run


METHODS: dict[str, Callable[..., Any]] = {
    "frozen": frozen,
    "products": frozen,
    "full": full,
    "peft": peft,
    "peftdora": partial(peft, use_dora=True),
    "ours": ours,
    "dora": partial(ours, variant="dora"),
}


def training_step(mode: str, setting: Setting) -> Callable[[int], Tensor]:
    """The step to measure: forward, backward and the optimizer, over four batches in turn."""
    (method, flags), setting = parse(mode), with_rank(setting, mode)
    base = build(setting)
    if "fp8" in flags:
        quantize_base(base, "fp8", targets=LINEARS)
    model = METHODS[method](base, setting, setting.dropout if "drop" in flags else 0.0, flags).train()
    if "ckpt" in flags:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if "selective" in flags:
        checkpoint_layers(model)
    if "offloadfrozen" in flags:
        offload_frozen(model, DEVICE)
    if "offload" in flags:
        offload_activations(model)
    if "layer" in flags:
        compile_layers(model, backend=setting.backend, cuda_graphs="graph" in flags)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=DEVICE == "cuda") if trained else None
    generator = torch.Generator().manual_seed(1)
    beside = products_alone(base, setting) if method == "products" else lambda: None
    batches = [torch.randint(0, base.config.vocab_size, (setting.batch, setting.seq), generator=generator).to(DEVICE) for _ in range(4)]

    def step(ids: Tensor) -> Tensor:
        emulated = float8.emulated() if "fp8" in flags and DEVICE == "cpu" else nullcontext()
        with emulated, cuda_graph_step(trained) if "graph" in flags else nullcontext():
            loss = passes(ids)
        beside()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def passes(ids: Tensor) -> Tensor:
        inputs = {"input_ids": ids} if trained else {"inputs_embeds": base.get_input_embeddings()(ids).requires_grad_()}
        if "chunk" in flags:
            hidden = base.model(**inputs).last_hidden_state.flatten(0, 1)
            labels = F.pad(ids[:, 1:], (0, 1), value=-100).flatten()
            loss = chunked_cross_entropy(hidden, base.lm_head.weight, labels, compiled=DEVICE == "cuda" and "layer" in flags)
        else:
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = model(**inputs, labels=ids).loss
        loss.backward()
        return loss

    return lambda k: step(batches[k % 4])
