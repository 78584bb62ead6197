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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, unload_lora

# PEFT asks every transformers model for a property whose name is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CPU_STEP = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/cpu_step.py"))
NUMBERS = {"ours_ms", "peft_ms", "ratio", "ours_saved_mb", "peft_saved_mb"}


def test_injecting_an_8b_model() -> None:
    """All 224 linears of its 32 blocks: 513 Python calls each (0.3 s in all), no more of them in a larger model."""
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
    assert 0 < calls[32] < 700 and calls[32] < 1.1 * calls[8]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_keeps_less_than_pefts(dtype: torch.dtype, dropout: float) -> None:
    """Bytes saved for the backward pass, parameters left out; ours hold the siblings' stacked A's, which weigh much at this width."""
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
