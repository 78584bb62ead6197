"""Sizes of adapters: what is counted is what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality import compression
from benchmarks.quality.tables import compression as table
from lightning_lora import LoRAConfig, find_targets


@pytest.mark.parametrize(("row", "parameters"), [(0, 4_194_304), (1, 16_777_216), (2, 39_976_960)])
def test_parameters_of_llama_2_7b(row: int, parameters: int) -> None:
    report = find_targets(compression.model_of("Llama-2-7B"), LoRAConfig(**compression.ROWS[row]))
    assert (report.parameters, report.total) == (parameters, 6_738_415_616)


def test_llama_3_8b_is_the_published_shape() -> None:
    assert find_targets(compression.model_of("Llama-3-8B"), LoRAConfig()).total == 8_030_261_248


@pytest.mark.filterwarnings("ignore:rank=")
def test_files_have_the_size_of_their_tensors(tmp_path: Path) -> None:
    out = tmp_path / "sizes.jsonl"
    (record,) = compression.main(["--out", str(out), "--shapes", "tiny", "--rows", "0", "--checkpoint", "0"])
    assert json.loads(out.read_text()) == record
    sizes = record["bytes"]
    assert sizes["adapter_computed"] == 4 * record["trainable"] == 4 * 8 * 2 * (32 + 32 + 32 + 16)  # q (32, 32) and v (16, 32), two layers
    assert sizes["adapter_computed"] < sizes["adapter"] < sizes["adapter_computed"] + 4096  # names and the config
    assert 3 * sizes["adapter_computed"] < sizes["checkpoint"] < 3 * sizes["adapter_computed"] + 30_000  # two moments, random numbers
    assert "| tiny | r=8 on q, v | 1,792 |" in table([record])
