"""What LoRA costs: calls to inject it into a large model, memory that a step keeps, work that a step does; the last two against PEFT.

`benchmarks/` has the scripts that the published numbers come from; these tests run them small. They count work instead of measuring time,
which differs between CPUs and on a busy machine.
"""

from __future__ import annotations

import re
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, quantize_base, unload_lora
from lightning_lora.layers import shared_input
from tests.calls import python_calls

# PEFT asks every transformers model for a property whose name is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CPU_STEP = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/cpu_step.py"))
LAYER_OVERHEAD = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/layer_overhead.py"))
NUMBERS = {"ours_ms", "peft_ms", "ratio", "ours_saved_mb", "peft_saved_mb"}


def test_injecting_an_8b_model() -> None:
    """All 224 linears of its 32 blocks: 1,609 Python calls each (0.2 s in all), no more of them in a larger model."""
    calls = {}
    for blocks in (8, 32):
        shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": blocks, "num_attention_heads": 32}
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(vocab_size=128256, num_key_value_heads=8, **shape))
        if not calls:  # what is imported or looked up once does not count
            unload_lora(apply_lora(model, config=LoRAConfig(rank=8, target_modules="all-linear")))
        counted = Counter[str]()
        sys.setprofile(lambda frame, event, argument, counted=counted: counted.update([event]))  # type: ignore[misc]
        try:
            apply_lora(model, config=LoRAConfig(rank=8, target_modules="all-linear"))
        finally:
            sys.setprofile(None)
        calls[blocks] = counted["call"] / (7 * blocks)
    adapters = get_lora_parameters(model)
    assert len(adapters) == 2 * 7 * 32
    assert sum(p.numel() for p in adapters) == 20_971_520
    assert all(p.is_meta for p in adapters)
    assert 0 < calls[32] < 1750 and calls[32] < 1.1 * calls[8]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_keeps_less_than_pefts(dtype: torch.dtype, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes saved for the backward pass, parameters left out; ours hold the siblings' stacked A's, which weigh much at this width."""
    monkeypatch.setattr(shared_input, "FEW_ENTRIES", 0)  # as with inputs of a real size
    models = CPU_STEP["twins"](hidden=64, layers=2, dtype=dtype, dropout=dropout)
    ids = torch.randint(0, CPU_STEP["VOCAB"], (2, 32))
    ours, peft = (CPU_STEP["saved_bytes"](models[name], ids) for name in ("ours", "peft"))
    assert 0 < ours < peft * (1.03 if dtype == torch.float32 and not dropout else 1)
    if dropout:  # a mask of one byte an entry instead of the dropped input
        without = CPU_STEP["twins"](hidden=64, layers=2, dtype=dtype, dropout=0.0)["ours"]
        entries = 2 * 2 * 32 * (3 * 64 + 3 * 64)  # blocks · tokens · inputs (qkv's, o's, gate and up's; down's is wide)
        assert ours - CPU_STEP["saved_bytes"](without, ids) == entries


def test_the_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    """It runs from its command line and says what it measured."""
    arguments = "--hidden 64 --layers 1 --seq 16 --batch 2 --steps 3 --dtype bfloat16 --dropout 0.1"
    result = CPU_STEP["main"](arguments.split())
    assert result.keys() == NUMBERS
    assert all(value > 0 for value in result.values())
    shape, times, memory = capsys.readouterr().out.splitlines()
    assert shape == "bfloat16, dropout 0.1, hidden 64, 1 layers, 2 x 16 tokens, 1 threads"
    assert re.fullmatch(rf"ours {result['ours_ms']:.1f} ms   PEFT {result['peft_ms']:.1f} ms   ratio {result['ratio']:.3f}", times)
    assert f"ours {result['ours_saved_mb']:.2f} MB   PEFT {result['peft_saved_mb']:.2f} MB" in memory


class Work(TorchDispatchMode):
    """Counts torch's operations and the bytes that they read and write; views, which do neither, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if not any(result.alias_info and not result.alias_info.is_write for result in function._schema.returns):
            self.calls += 1
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor))
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_does_less_work_than_pefts(dtype: torch.dtype, dropout: float) -> None:
    """Forward and backward: operations, bytes that they read and write, flops. Measured: 0.81, 0.74 (bf16 0.53), 0.86 of PEFT's."""
    models = CPU_STEP["twins"](hidden=128, layers=2, dtype=dtype, dropout=dropout)
    ids = torch.randint(0, CPU_STEP["VOCAB"], (4, 128))
    done = {}
    for name, model in models.items():
        with Work() as work, FlopCounterMode(display=False) as flops:
            model(input_ids=ids, labels=ids).loss.backward()
        done[name] = work.calls, work.bytes, flops.get_total_flops()
    calls, moved, flop = (ours / peft for ours, peft in zip(done["ours"], done["peft"], strict=True))
    assert 0 < calls <= 0.85
    assert 0 < moved <= (0.77 if dtype == torch.float32 else 0.56)
    assert 0 < flop <= 0.88


class Attention(nn.Module):
    """Three linears that read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x) + self.k_proj(x) + self.v_proj(x)


# What is adapted → Python calls in an evaluation forward, a training forward, its backward, at most. Before, when each call asked for what
# does not change between calls, a linear took 63, 63 and 28, over NF4 66, 66 and 31; q, k and v 132, over NF4 150, 150 and 36.
CALLS: dict[str, tuple[Any, str | None, dict[str, Any], tuple[int, int, int]]] = {
    "linear": (nn.Linear, None, {}, (17, 17, 0)),
    "dropout": (nn.Linear, None, {"dropout": 0.1}, (17, 19, 1)),
    "lora_fa": (nn.Linear, None, {"variant": "lora_fa"}, (17, 17, 0)),
    "adalora": (nn.Linear, None, {"variant": "adalora"}, (20, 20, 0)),
    "dora": (nn.Linear, None, {"variant": "dora"}, (47, 47, 5)),
    "int8": (nn.Linear, "int8", {}, (17, 17, 0)),
    "nf4": (nn.Linear, "nf4", {}, (17, 17, 0)),
    "qkv": (Attention, None, {}, (59, 59, 0)),
    "qkv, nf4": (Attention, "nf4", {}, (59, 59, 0)),
    "qkv together": (Attention, None, {}, (84, 90, 29)),
    "qkv together, nf4": (Attention, "nf4", {}, (94, 96, 35)),
}


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("case", CALLS)
def test_a_layer_asks_for_little_in_each_call(case: str) -> None:
    """What does not change between calls is decided when it changes. Counted, since times depend on the machine."""
    make, quantize, fields, most = CALLS[case]
    model = nn.Sequential(nn.Linear(64, 64) if make is nn.Linear else make())
    model = model if quantize is None else quantize_base(model, quantize)
    apply_lora(model, config=LoRAConfig(rank=4, target_modules="all-linear", **fields))
    x = torch.randn(1024 if "together" in case else 1, 64, requires_grad=True)
    model.eval()
    with torch.no_grad():
        evaluation = python_calls(lambda: model(x))
    model.train()
    forward, loss = python_calls(lambda: model(x)), model(x).sum()
    backward = python_calls(lambda: loss.backward(retain_graph=True))
    assert all(calls <= bound for calls, bound in zip((evaluation, forward, backward), most, strict=True)), (evaluation, forward, backward)


def test_the_benchmark_of_one_layer(capsys: pytest.CaptureFixture[str]) -> None:
    """It runs from its command line and says what it measured."""
    arguments = "--sizes 8 --rows 2 --rounds 2 --seconds 0.001 --cases linear dora qkv"
    results = LAYER_OVERHEAD["main"](arguments.split())
    assert len(results) == 6 and all(len(times) == 2 and min(times) > 0 for row in results.values() for times in row.values())
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()[2:]] == [key.rpartition("²")[0] + "²" for key in results]
