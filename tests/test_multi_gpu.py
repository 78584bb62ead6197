"""``benchmarks/multi_gpu.py`` on gloo processes: what it counts, and that each of its parts runs."""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from multi_gpu import main as multi_gpu_main


def multi_gpu(tmp_path: Path, *options: str) -> tuple[list[dict[str, Any]], str]:
    """The rows of a run on gloo processes, and what it printed."""
    file = tmp_path / "rows.json"
    with patch.dict(os.environ), redirect_stdout(io.StringIO()) as said:  # it sets variables for NCCL
        multi_gpu_main(["--cpu", "--shape", "tiny", "--steps", "1", *options, "--json", str(file)])
    return json.loads(file.read_text())["rows"], said.getvalue()


def test_multi_gpu_counts_what_fsdp2_moves(tmp_path: Path) -> None:
    rows, printed = multi_gpu(
        tmp_path, "--devices", "2", "--only", "fsdp2", "fsdp2 kept", "fsdp2 pulled", "--models", "frozen", "ours", "--parts", "steps"
    )
    by_name = {(row["strategy"], row["model"]): row for row in rows}
    assert len(by_name) == len(rows) == 8 and not any("failed" in row for row in rows), printed
    assert by_name["fsdp2 kept", "ours"]["traffic"]["all-gather"][0] == 3
    assert by_name["fsdp2 pulled", "frozen"]["loss"] == by_name["fsdp2", "frozen"]["loss"]
    # Ranks meet before and after the forward pass; one reduction of the adapters' gradients.
    assert {model: by_name["fsdp2 pulled", model]["traffic"]["all-reduce"][0] for model in ("frozen", "ours")} == {"frozen": 2, "ours": 3}
    assert len(by_name["fsdp2 pulled", "ours"]["traffic"]) == 1
    # Two blocks and a root: gathered forward, the blocks again backward; adapters are scattered with their block.
    frozen, ours = by_name["fsdp2", "frozen"]["traffic"], by_name["fsdp2", "ours"]["traffic"]
    assert {kind: count for kind, (count, _) in frozen.items()} == {"all-gather": 5}
    assert {kind: count for kind, (count, _) in ours.items()} == {"all-gather": 5, "reduce-scatter": 2}
    # A block: q, k, v, o, gate, up, down and two norms in bf16; the root: embedding, norm, head. Adapters in fp32.
    block, root, adapter = 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64), 2 * (2 * 256 * 64 + 64), 4 * 16 * (4 * (64 + 64) + 3 * (64 + 128))
    assert frozen["all-gather"][1] == 4 * block + root
    assert ours["all-gather"][1] == 4 * (block + adapter) + root and ours["reduce-scatter"][1] == 2 * adapter
    assert by_name["fsdp2", "ours"]["x_frozen"] == by_name["fsdp2", "ours"]["ms"] / by_name["fsdp2", "frozen"]["ms"]
    assert by_name["one", "ours"]["traffic"] == {} and by_name["fsdp2", "ours"]["tokens"] == 2 * by_name["one", "ours"]["tokens"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_multi_gpu_measures_fits(tmp_path: Path) -> None:
    rows, printed = multi_gpu(tmp_path, "--devices", "2", "--parts", "fit", "--ways", "one", "auto", "--profile")
    assert "failed" not in printed and len(rows) == 2, printed
    one, auto = rows
    assert one["traffic"] == {} and one["scaling"] == 1
    assert {name: count for name, (count, _) in auto["traffic"].items()} == {"all-gather": 5, "reduce-scatter": 2, "all-reduce": 2}
    assert not auto["pulls"] and abs(auto["loss"] - one["loss"]) < 0.05  # on CPUs it gathers


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("devices", [1, 2])
def test_multi_gpu_runs_whole(tmp_path: Path, devices: int) -> None:
    rows, printed = multi_gpu(tmp_path, "--devices", str(devices), "--parts", "steps", "save", "resume", "nf4")
    quantized = rows.pop()
    assert "traffic" in quantized if find_spec("bitsandbytes") else "bitsandbytes" in quantized["failed"], printed
    failed = {(row.get("strategy"), row.get("model")) for row in rows if "failed" in row or row.get("what") == "failed"}
    assert failed == {("tp", "PEFT"), ("tp x fsdp2", "PEFT")}, printed  # torch's plans know no PEFT layer
    resumed = [row for row in rows if "different" in row]
    assert [row["different"] for row in resumed] == [0, 0] and all(row["tensors"] > 100 for row in resumed), printed
    (end,) = (row for row in rows if "adapter_difference" in row)
    assert end["adapter_difference"] <= (0 if devices == 1 else 1e-3), printed
    assert [row["bytes"] > 0 for row in rows if row["part"] == "save"] == [True] * 3, printed


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_multi_gpu_fits_what_does_not_fit_one_gpu(tmp_path: Path) -> None:
    """Every strategy and base trains the same model: only the rounding of its weights and sums differs."""
    rows, printed = multi_gpu(tmp_path, "--devices", "2", "--worlds", "2", "--warmup", "1", "--recompute", "selective", "--parts", "big")
    assert len(rows) == 15 and not [row for row in rows if "failed" in row], printed
    losses = {(row["way"], row["base"], row["model"]): row["losses"] for row in rows}
    first = losses["fsdp2", "bf16", "ours"][0]
    # Under tensor parallelism the first rank's loss is of both ranks' rows.
    assert all(abs(found[0] - first) < 2e-3 for (way, *_), found in losses.items() if way != "tp"), printed
