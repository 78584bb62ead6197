"""Whether a model keeps packed documents apart is seen on the model itself, and one that does not is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from lightning_lora.model.compile import compile_layers
from lightning_lora.tasks import packing_check
from lightning_lora.tasks.packed_attention import NAME
from lightning_lora.tasks.packing_check import settle_attention
from tests.conftest import snapshot
from tests.tasks.packing_models import model

CPU = torch.device("cpu")


def settle(network: Any, length: int = 24, longest: int = 24, fixed: bool = False) -> str:
    return settle_attention(network, length, longest, CPU, fixed=fixed)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("Llama", NAME),
        ("Mistral", NAME),
        ("Gemma3Text", NAME),
        ("GPT2", NAME),
        ("Qwen3Moe", NAME),
        ("Gemma2", "eager"),
        ("Llama4Text", "sdpa"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_gets_the_fastest_attention_that_is_right(name: str, attention: str, dtype: torch.dtype) -> None:
    """Attention in chunks (Llama 4) has a mask of its own, so it keeps transformers' masks. GPT-2 here has twelve positions."""
    network = model(name, dtype)
    said = settle(network, 24, 12 if name == "GPT2" else 24)
    assert network.config._attn_implementation == attention and f"keeps documents apart with attention '{attention}'" in said


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Bloom", "BloomForCausalLM does not keep packed documents apart: its forward takes no position_ids"),
        ("Mamba", "MambaForCausalLM does not keep packed documents apart: its forward takes no position_ids"),
        ("Lfm2", r"Lfm2ForCausalLM .* with attention 'sdpa' a document's hidden states change by [\d.]+ of their size beside"),
        ("Falcon", r"FalconForCausalLM .* hidden states change by"),
        ("XGLM", r"XGLMForCausalLM .* with attention 'eager' a document's hidden states change by"),
        ("Qwen3Next", r"Qwen3NextForCausalLM does not keep packed documents apart: .*flash-linear-attention"),
    ],
)
def test_a_model_that_mixes_documents_is_refused_by_name(name: str, reason: str) -> None:
    network = model(name, torch.float32)
    before, attention = snapshot(network), network.config._attn_implementation
    with pytest.raises(ValueError, match=rf"^data.packing or model.padding_free is on, but {reason}.*Set it to false\.$"):
        settle(network)
    assert snapshot(network) == before and network.config._attn_implementation == attention


def test_the_attention_that_the_user_named_stays() -> None:
    network = model("Llama", torch.float32)
    assert "attention 'sdpa'" in settle(network, fixed=True) and network.config._attn_implementation == "sdpa"


def test_half_precision_is_known_by_autocast_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever dtype the last norm has: under bf16-mixed an fp32 model differs by bf16's rounding."""
    states, network = torch.zeros(1), model("Llama", torch.float32)
    strict, loose = packing_check._LIMITS, packing_check._HALF_LIMITS
    assert packing_check._limits(network, states) == strict
    with torch.autocast("cpu", torch.bfloat16):
        assert packing_check._limits(network, states) == loose
        assert f"attention '{NAME}'" in settle(network)
    network.model.layers[0].to(torch.bfloat16)
    assert packing_check._limits(network, states) == loose == packing_check._limits(torch.nn.Linear(1, 1), states.half())


def test_old_gpus_keep_the_masks_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert packing_check._choices("sdpa", torch.device("cuda"), False) == ["sdpa"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert packing_check._choices("sdpa", torch.device("cuda"), False) == [NAME, "sdpa"]
    assert packing_check._choices("eager", torch.device("cuda"), False) == ["eager"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leak", ["a state that runs on", "positions that run on", "a rule for long documents"])
def test_each_way_of_being_wrong_is_seen(leak: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small as it is: a running mean added to one layer's output, positions that do not restart, a mask that one attention lacks."""
    network = model("Llama" if leak != "positions that run on" else "GPT2", dtype, n_positions=48)

    def runs_on(module: nn.Module, args: Any, output: Any) -> Any:
        return output + 0.3 * output.cumsum(1) / torch.arange(1, output.shape[1] + 1)[:, None]

    def counts_on(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "position_ids": torch.arange(args[0].shape[1])[None]}

    def long(module: nn.Module, args: Any, output: Any) -> Any:
        return output if output.shape[1] < 24 else output.roll(1, -1)  # in packed rows only

    if leak == "positions that run on":
        network.transformer.register_forward_pre_hook(counts_on, with_kwargs=True)
    else:
        network.model.layers[0].mlp.register_forward_hook(runs_on if leak == "a state that runs on" else long)
    with pytest.raises(
        ValueError, match="does not keep packed documents apart: with attention 'sdpa' a document's hidden states change by"
    ):
        settle(network)


def test_modes_compiled_layers_and_random_numbers_are_left_alone() -> None:
    network, counter = model("Llama", torch.float32, attention_dropout=0.5), CompileCounter()
    network.model.layers[1].eval()
    compile_layers(network, backend=counter)
    before, generator = snapshot(network), torch.get_rng_state()
    settle(network)
    assert snapshot(network) == before and torch.equal(torch.get_rng_state(), generator) and counter.frame_count == 0


def test_a_state_that_is_not_finite_is_no_equality() -> None:
    network = model("Llama", torch.float32)
    with torch.no_grad():
        network.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="change by inf of their size"):
        settle(network)


@pytest.mark.parametrize(
    ("length", "longest", "lengths"),
    [(24, 24, (6, 18)), (2048, 2048, (512, 1536)), (2048, 100, (100, 100)), (700, 700, (128, 525)), (2, 2, (1, 1))],
)
def test_documents_are_no_longer_than_the_longest(
    length: int, longest: int, lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    probe = packing_check._Probe
    monkeypatch.setattr(probe, "changes", lambda self, one, other, alone: seen.append((len(one), len(other))) or (0.0, 0.0))
    monkeypatch.setattr(probe, "states", lambda self, **inputs: torch.zeros(1))
    settle(model("Llama"), length, longest)
    assert seen == [lengths]
