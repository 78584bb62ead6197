"""``benchmarks/moe_step.py`` in small, so that a lease is not spent on a typo."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

STEP = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "moe_step.py"))
QUICK = ["--shape", "tiny", "--backend", "eager", "--steps", "1", "--warmup", "1"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_every_mode_measures_the_same_model(capsys: pytest.CaptureFixture[str]) -> None:
    modes = ["frozen", "attention", "ours", "ours-drop", "peft", "frozen-eager", "ours-eager", "ours-layer-ckpt"]
    results = STEP["main"]([*QUICK, "--modes", ",".join(modes)])
    assert list(results) == modes and not [result.error for result in results.values() if result.error]
    # The same model, tokens and step: adapters begin at zero, so only rounding differs.
    assert [result.loss for result in results.values()] == pytest.approx([results["frozen"].loss] * len(results), rel=2e-2)
    printed = capsys.readouterr().out
    ratio = results["ours-eager"].ms / results["frozen-eager"].ms
    assert f"| ours-eager | {results['ours-eager'].ms:.1f} | {ratio:.2f} |" in printed and "| ours-layer-ckpt |" in printed
    with pytest.raises(SystemExit, match=r"mode 'ours-fast'"):
        STEP["main"]([*QUICK, "--modes", "ours-fast"])


def test_a_quantized_base_is_measured_beside_the_same_base_frozen() -> None:
    results = STEP["main"]([*QUICK, "--modes", "frozen,frozen-fp8,ours-fp8"])
    assert not [result.error for result in results.values() if result.error]
    assert results["ours-fp8"].loss == pytest.approx(results["frozen-fp8"].loss, rel=2e-2) and STEP["alike"]("ours-fp8") == "frozen-fp8"
    assert STEP["build"](STEP["Setting"]("tiny", 1, 32, 4), {"fp8"}).model.layers[0].mlp.experts.down_proj.element_size() == 1


def test_it_counts_what_a_token_meets_and_adapts_all_experts() -> None:
    setting = STEP["Setting"]("30b-a3b", 2, 2048, 16, layers=1)
    hidden, width, heads = 2048, 768, (32 + 2 * 4 + 32) * 128
    layer = hidden * heads + 8 * 3 * hidden * width + 128 * hidden + 2 * hidden + 2 * 128
    assert STEP["arithmetic"](setting) == 4 * (layer + 151936 * hidden + hidden)
    model = STEP["ours"](STEP["build"](setting, set(), "meta"), setting, 0.0, [*STEP["ATTENTION"], "experts"])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 16 * (128 * (hidden + 2 * width + width + hidden) + 2 * (hidden + 32 * 128) + 2 * (hidden + 4 * 128))


def test_it_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    kernels = STEP["main"]([*QUICK, "--profile", "ours"])["ours"].kernels
    assert kernels["aten::_grouped_mm"][1] == pytest.approx(2 * 2 * 8) and "| aten::_grouped_mm |" in capsys.readouterr().out
