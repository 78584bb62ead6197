"""The estimate beside what GPUs and this CPU were measured to take, its knobs, and wrong input."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.estimate import Setting, estimate_memory, estimate_seconds, largest_fit, memory
from lightning_lora.estimate.saved import Saved, count_saved
from lightning_lora.ops.fused_linear import lora_linears
from lightning_lora.utils.blocks import repeated_blocks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ALL = LoRAConfig(rank=4, target_modules="all-linear")
PASSES: dict[Any, Saved] = {}  # rows that differ in what is not computed share a pass


@pytest.fixture(scope="module")
def benchmark() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield runpy.run_path(str(BENCHMARKS / "estimate.py"))
    finally:
        sys.path.remove(str(BENCHMARKS))


ROWS = 36
SLOW = {20, 21, 24, 26, 28}  # as rows beside them, of more layers


@pytest.mark.parametrize("row", [k for k in range(ROWS) if k not in SLOW])
def test_within_a_tenth_of_what_an_h200_took(row, benchmark, monkeypatch):
    assert len(benchmark["MEASURED"]) == ROWS
    shape, rank, options, measured, _ = benchmark["MEASURED"][row]
    key = (shape, rank, *(options.get(name) for name in ("batch", "length", "compiled", "variant", "dropout")))

    def once(*args: Any) -> Saved:
        PASSES[key] = PASSES.get(key) or count_saved(*args)
        return PASSES[key]

    monkeypatch.setattr(memory, "count_saved", once)
    assert benchmark["estimated"](shape, rank, options) == pytest.approx(measured, rel=0.1)


def tiny(device: str = "meta", **changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**{**sizes, "vocab_size": 64, **changes})).train()


def test_the_pass_counts_what_autograd_saves_here():
    """In float32 on a CPU: the same model, really run, saves the same bytes in its blocks."""
    model = apply_lora(tiny("cpu"), ALL)
    fixed = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        hidden = model.model(input_ids=torch.zeros(2, 16, dtype=torch.long), use_cache=False).last_hidden_state
    measured = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in fixed)
    twin = apply_lora(tiny(), ALL)
    ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
    saved = count_saved(twin, lambda: twin.model(input_ids=ids, use_cache=False).last_hidden_state, False)
    assert sum(saved.blocks) + saved.outside == pytest.approx(measured, rel=0.02) and hidden.nbytes == saved.output
    assert len(saved.blocks) == len(repeated_blocks(twin)) and saved.inputs == (2 * 16 * 32 * 4,) * 3


def test_parts_by_arithmetic():
    setting = Setting(batch=2, length=16, precision="32-true")
    model = tiny()
    names = [name for name, _ in model.named_parameters()]
    found = estimate_memory(model, ALL, setting)
    adapted = apply_lora(tiny(), ALL)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert found.adapters == 4 * trained and found.optimizer == 8 * trained
    assert found.base == 4 * sum(p.numel() for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert found.peak == sum(found.parts().values()) and str(found).splitlines()[-1].startswith("peak")
    full = estimate_memory(model, None, setting)
    assert full.adapters == 4 * sum(p.numel() for p in model.parameters()) and full.optimizer == 2 * full.adapters
    assert [name for name, _ in model.named_parameters()] == names, "the model does not change"
    half = estimate_memory(model, ALL, replace(setting, precision="bf16-true"))
    kept = estimate_memory(model, ALL, replace(setting, precision="bf16-mixed"))
    assert half.base < kept.base == found.base and kept.activations > half.activations
    sharded = estimate_memory(model, ALL, replace(setting, strategy="lora_fsdp2", devices=2))
    buffers, block = sum(b.nbytes for b in model.buffers()), 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    weights = found.base - buffers
    assert sharded.base == weights // 2 + (weights - 3 * block) + 2 * block + buffers, "shards, what is in no block, two whole blocks"
    assert sharded.optimizer == found.optimizer // 2
    assert estimate_memory(model, ALL, replace(setting, strategy="ddp", devices=2)).adapters == 2 * found.adapters
    narrow = estimate_memory(model, None, replace(setting, precision="bf16-true"))
    assert narrow.optimizer == full.optimizer // 2, "moments have the weights' dtype"


def test_mixed_precision_copies_the_weights_that_no_operation_casts_again():
    """Autocast's copy of a frozen fp32 weight is kept by a plain product, not by an adapted linear, which is one operation."""
    x, W, A, B = (torch.ones(shape, requires_grad=k != 1) for k, shape in enumerate([(3, 16), (24, 16), (2, 16), (24, 2)]))
    copies: list[torch.Tensor] = []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        copies.extend([tensor] if tensor.numel() == W.numel() and tensor.dtype == torch.bfloat16 else [])
        return tensor

    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(save, lambda tensor: tensor):
        lora_linears(x, [W], [None], [A], [B], [1.0])
        assert not copies
        torch.nn.functional.linear(x, W)
    assert len(copies) == 1
    setting, model = Setting(batch=2, length=16, precision="bf16-mixed"), tiny()
    parts = {"q_proj": LoRAConfig(rank=4, target_modules=["q_proj"]), "": ALL}
    for adapted, config in parts.items():
        kept, half = (estimate_memory(model, config, replace(setting, precision=p)).activations for p in ("bf16-mixed", "bf16-true"))
        others = [p for name, p in model.model.layers.named_parameters() if p.dim() == 2 and adapted not in name]
        assert kept - half == 2 * sum(p.numel() for p in [*others, model.lm_head.weight]), adapted


def test_peak_of_a_checkpointed_model():
    """A block that is made again is not there while the logits are."""
    model, setting = tiny(vocab_size=4096), Setting(batch=4, length=64, checkpointing="full", chunked_loss=False)
    found = estimate_memory(model, ALL, setting)
    assert found.activations < 4 * 64 * 32 * 2 * (3 + 4) and found.working == 0 and found.logits > 4 * 64 * 4096 * 12
    chunked = estimate_memory(tiny(), ALL, replace(setting, chunked_loss=True, length=1024))
    assert chunked.working > 0 and chunked.logits == 0, "there the peak is in a block's backward pass"


def test_dropout_is_counted():
    """The kernels keep no mask; a mixture's sorted rows keep one of a byte an entry, also inside a tensor of a class of its own."""
    text = Qwen3MoeConfig(
        hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=64, num_experts=4, num_experts_per_tok=2, experts_implementation="grouped_mm",
    )  # fmt: skip
    with torch.device("meta"):
        mixture = Qwen3MoeForCausalLM(text).train()
    setting, rows = Setting(batch=4, length=512), 4 * 512 * 2

    def kept(model: Any, targets: Any, dropout: float) -> int:
        return estimate_memory(model, LoRAConfig(rank=8, target_modules=targets, dropout=dropout), setting).activations

    assert kept(tiny(), "all-linear", 0.5) == pytest.approx(kept(tiny(), "all-linear", 0.0), rel=1e-3)  # seeds
    more = kept(mixture, ["experts"], 0.5) - kept(mixture, ["experts"], 0.0)
    assert 2 * rows * 32 <= more <= 2 * rows * (32 + 16), "a byte an entry of each product's input; where torch has no kernel it is two"


@pytest.mark.parametrize(
    "change",
    [
        {"checkpointing": "full"},
        {"checkpointing": "selective"},
        {"quantize": "nf4"},
        {"quantize": "fp8"},
        {"compiled": True},
        {"offload": ("frozen",)},
    ],
    ids=str,
)
def test_each_knob_saves(change):
    plain = Setting(batch=4, length=64)
    model = tiny(num_hidden_layers=6)
    assert estimate_memory(model, ALL, replace(plain, **change)).peak < estimate_memory(model, ALL, plain).peak


def test_what_fits():
    model, setting = tiny(), Setting(batch=4, length=64)
    need = estimate_memory(model, ALL, setting).peak
    fit = largest_fit(model, ALL, setting, need)
    assert fit.knobs == () and fit.batch == 4 and fit.length == 64
    less = largest_fit(model, ALL, setting, need * 0.8)
    assert less.knobs and less.estimate.peak <= need * 0.8 and less.batch < 4 and less.length < 64
    assert estimate_memory(model, ALL, replace(setting, batch=less.batch)).peak <= need * 0.8
    nothing = largest_fit(model, ALL, setting, 1.0)
    assert nothing.knobs is None and nothing.batch == nothing.length == 0
    with pytest.raises(ValueError, match="memory=0"):
        largest_fit(model, ALL, setting, 0)


def test_seconds_are_a_range():
    model, setting = tiny(), Setting(batch=2, length=16)
    low, high = estimate_seconds(model, ALL, setting, "h200") or (0.0, 0.0)
    assert 0 < low < high
    again = estimate_seconds(model, ALL, replace(setting, checkpointing="full"), "h200") or (0.0, 0.0)
    assert low < again[0] < 2 * low
    assert estimate_seconds(model, ALL, setting, "cpu") is None
    with pytest.raises(ValueError, match="device='tpu'"):
        estimate_seconds(model, ALL, setting, "tpu")


@pytest.mark.parametrize(
    ("shape", "options", "seconds"),
    [("8b", {"compiled": True}, 0.468), ("8b", {"compiled": True, "quantize": "fp8"}, 0.333), ("1b", {}, 0.1312)],
)
def test_measured_times_are_in_the_range(shape, options, seconds, benchmark):
    """Of benchmarks/records/2026-11-ranks.log, 2026-11-fp8.log, and the eager row of benchmarks/README.md."""
    modes = sys.modules["floor_modes"]
    config = LoRAConfig(rank=16, target_modules=modes.LINEARS)
    found = estimate_seconds(modes.build(modes.Setting(shape=shape), "meta"), config, Setting(batch=4, length=2048, **options), "h200")
    assert found is not None and found[0] < seconds < found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch=0"),
        ({"length": 1.5}, "length=1.5"),
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"quantize": "int3"}, "quantize='int3'"),
        ({"checkpointing": "some"}, "checkpointing='some'"),
        ({"strategy": "deepspeed"}, "strategy='deepspeed'"),
        ({"devices": 2}, "devices=2 needs strategy"),
        ({"offload": ("weights",)}, "offload='weights'"),
        ({"offload": ("activations",)}, "needs checkpointing"),
        ({"offload": ("frozen",), "strategy": "lora_fsdp2"}, "does not go with"),
        ({"recorded": True}, "needs compile"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Setting(**options)


def test_models_that_cannot_be_estimated_are_named():
    with pytest.raises(ValueError, match=r"embed_tokens.weight' of LlamaForCausalLM is not on the meta device"):
        estimate_memory(tiny("cpu"), ALL, Setting())

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))

    with torch.device("meta"):
        model, x = Reads(), torch.empty(2, 4)
    with pytest.raises(ValueError, match="Reads cannot run on the meta device"):
        count_saved(model, lambda: model.layers[0](x) * float(x.sum()), False)
