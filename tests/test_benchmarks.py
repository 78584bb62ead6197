"""The GPU scripts run here in small, so that a lease is not spent on a typo."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tarfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check
import pytest
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from tests import processes, tiny_lm

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_gpu_check_is_within_its_bounds() -> None:
    said = processes.printed(gpu_check.main, ["--tiny", "--steps", "2"])
    assert "entries that unmerging missed: 0" in said and "all within bounds" in said


FLOOR = runpy.run_path(str(BENCHMARKS / "floor.py"))
QUICK = ["--shape", "tiny", "--backend", "eager", "--steps", "1", "--warmup", "1"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_floor_measures_every_mode(capsys: pytest.CaptureFixture[str]) -> None:
    modes = (
        "floor,products-chunk,full,peft-drop,ours-unfused,ours-layer-chunk-ckpt-drop,ours-chunk-half-r4,ours-fp8-layer-chunk,"
        "ours-layer-chunk-selective-offload-offloadfrozen"
    )
    results = FLOOR["main"]([*QUICK, "--modes", modes])
    assert list(results) == modes.split(",") and not [result.error for result in results.values() if result.error]
    assert all(0 < result.ms < 60_000 for result in results.values())
    # The same model, tokens and step: adapters begin at zero, so only rounding differs.
    assert [result.loss for result in results.values()] == pytest.approx([results["floor"].loss] * len(results), rel=2e-2)
    printed = capsys.readouterr().out
    assert all(f"| {mode} | {result.ms:.1f} |" in printed for mode, result in results.items())


def test_floor_says_what_failed_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    results = FLOOR["main"]([*QUICK, "--modes", "ours-layer,frozen", "--backend", "no_such_backend"])
    assert "no_such_backend" in results["ours-layer"].error and results["frozen"].ms > 0
    assert "| ours-layer | InvalidBackend" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"mode 'ours-fast'"):
        FLOOR["main"]([*QUICK, "--modes", "ours-fast"])


def test_floor_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    ours, floor = (one.kernels["aten::mm"] for one in FLOOR["main"]([*QUICK, "--profile", "ours-chunk,floor"]).values())
    assert ours[1] - floor[1] > 14 * 2
    assert f"| aten::mm | {ours[0]:.3f} | {ours[1]:.0f} | {floor[0]:.3f} | {floor[1]:.0f} |" in capsys.readouterr().out


def test_floor_times_what_is_done_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call by itself: on a clock that only these calls move, each by another time."""
    clock, names = [0.0], FLOOR["costs"].__globals__

    def takes(seconds: int, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            clock[0] += seconds
            return call(*args)

        return timed

    for seconds, name in enumerate(("ours", "save_adapter", "merge_lora", "unmerge_lora"), 1):
        monkeypatch.setitem(names, name, takes(seconds, names[name]))
    monkeypatch.setitem(names, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    costs = FLOOR["main"]([*QUICK, "--costs"])
    assert {what: seconds for what, (seconds, *_) in costs.items()} == {"inject": 1, "save": 2, "merge": 3, "unmerge": 4}
    printed = capsys.readouterr().out
    assert all(f"| {what} | {seconds:.2f} |" in printed for what, (seconds, *_) in costs.items())


def test_floor_grows() -> None:
    results = FLOOR["main"]([*QUICK, "--growth", "--modes", "ours"])
    assert list(results) == ["rank 8, ours", "rank 32, ours", "length 16, ours", "1 layers, ours"]
    assert not [result.error for result in results.values() if result.error]


@pytest.mark.parametrize("way", ["full", "galore", "lora"])
def test_galore_is_measured_beside_full_and_lora(way: str) -> None:
    galore = runpy.run_path(str(BENCHMARKS / "galore.py"))
    sizes = {"hidden": 32, "layers": 2, "seq": 8, "batch": 2, "steps": 3, "rank": 4, "gap": 2, "lr": 1e-3, "threads": 1}
    result = galore["measure"](way, Namespace(**sizes))
    weights = 2 * 512 * 32 + 2 * (4 * 32 * 32 + 3 * 96 * 32 + 2 * 32) + 32
    ends, vectors = 2 * 512 * 32, 2 * 2 * 32 + 32
    moments = {  # entries of exp_avg and exp_avg_sq, of projectors
        "full": 2 * weights,
        "galore": 2 * (ends + vectors) + 2 * (4 * (2 * 32 * 4 + 4 * 32) + 3 * (2 * 96 * 4 + 4 * 32)),
        "lora": 2 * (ends + 2 * (4 * 4 * 64 + 3 * 4 * 128)),
    }[way]
    steps = 0 if way == "galore" else result["state"] // 4 - moments  # AdamW counts them in a tensor a parameter
    assert result["state"] == 4 * (moments + steps) and 0 <= steps < 100
    assert result["trainable"] == (weights if way != "lora" else moments // 2) and 0 < result["loss"] < 10


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    return runpy.run_path(str(BENCHMARKS / "family.py"))


@pytest.mark.parametrize("member", ["quickstart", "rslora", "galore", "full"])
def test_a_member_of_the_family_runs_from_its_yaml(family: dict, member: str) -> None:
    options = Namespace(tiny=True, steps=2, threads=1, questions=6, dtype=None)
    result = family["measure"](member, options)
    assert 0 <= result["accuracy"] <= 1 and result["loss"] > 0 and result["seconds"] > 0 and result["peak"] > 2**20
    whole = sum(p.numel() for p in tiny_lm.llama().parameters())
    assert result["trainable"] == (whole if member in ("galore", "full") else 1792) and result["state"] > 0
    assert f"| {member} | {result['accuracy']:.1%} |" in family["row"](member, result)


def test_a_member_that_fails_is_told_and_the_rest_goes_on(family: dict, capsys: pytest.CaptureFixture, monkeypatch: Any) -> None:
    fine = {"accuracy": 0.5, "loss": 1.0, "trainable": 7, "state": 2**20, "peak": 2**30, "seconds": 0.25}
    seen = {"one": fine, "two": {"error": "ValueError: no"}, "three": fine}
    monkeypatch.setitem(family["main"].__globals__, "child", lambda member, argv: seen[member])
    assert family["main"](["--members", "one", "two", "three"]) == 1
    output = capsys.readouterr().out
    assert "| three | 50.0% | 1.000 | 7 | 1.0 | 1,024 | 0.250 |" in output
    assert "| two | failed |" in output and "two failed: ValueError: no" in output
    assert family["main"](["--members", "one"]) == 0


def test_a_members_error_comes_out_of_its_process(family: dict, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess:
        """The child's work here: importing everything once more takes seconds."""
        assert command[:2] == [sys.executable, str(BENCHMARKS / "family.py")]
        capsys.readouterr()
        code = family["main"](command[2:])
        return subprocess.CompletedProcess(command, code, *capsys.readouterr())

    monkeypatch.setattr(subprocess, "run", run)
    assert "nothing.yaml" in family["child"]("nothing", ["--tiny", "--steps=2"])["error"]
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: killed)
    assert family["child"]("killed", [])["error"] == "exit code -9: it said nothing"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["frozen", "ours", "PEFT"])
def test_qlora_step_measures(name: str, checkpointed: bool) -> None:
    """The model is made packed, block by block: no linear of it is ever seen unpacked but the head."""
    from lightning_lora.quantization.formats import format_of

    step = runpy.run_path(str(BENCHMARKS / "qlora_step.py"))
    result = step["measure"](name, Namespace(tiny=True, steps=1, chunk=checkpointed, profile=True), 1, False, checkpointed, False)
    assert 0 < result.launching <= result.ms < 60_000 and result.kernels["aten::mm"][1] >= 1
    model = step["MODES"][name](step["build"](step["TINY"], "cpu"))
    assert len([module for module in model.modules() if format_of(module) is not None]) == 2 * 7
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_the_advised_rate_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "where", "is", "it"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path)
    rows = [{"messages": [{}, {"content": f"{word} is it"}, {"content": word}]} for word in ("who", "where") * 8]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    script = runpy.run_path(str(BENCHMARKS / "advised_rate.py"))
    monkeypatch.setattr(sys, "argv", ["advised_rate.py", str(tmp_path), str(tmp_path), "--ways", "lora", "lora+", "full", "--times", "1"])
    script["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["way", "lora", "lora+", "full"] and all("%" in line for line in lines[1:])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # which PEFT asks
def test_packing_computes_the_same_in_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(BENCHMARKS / "packing.py"))["main"]
    options = ["--shape", "tiny", "--rows", "2", "--length", "64", "--median", "12", "--documents", "200", "--steps", "1", "--warmup", "1"]
    speeds = main(options)
    fixed = {"full", "full sdpa", "packed", "packed sdpa", "full fp8", "packed fp8", "peft", "peft fast"}
    assert set(speeds) == fixed | {"grouped", "padded", "flat"}
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.count(" | ") == 6]
    losses = {cells[0]: float(cells[-1]) for cells in rows if cells[0] in speeds}
    assert losses.keys() == speeds.keys() and losses["grouped"] == pytest.approx(losses["flat"], abs=2e-3)
    packed = [loss for name, loss in losses.items() if name.startswith(("packed", "peft"))]
    assert len(packed) == 5 and packed == pytest.approx([packed[0]] * 5, abs=2e-3)  # after a step or two with adapters of their own


@pytest.mark.filterwarnings("ignore:Attribute 'model' is an instance of", "ignore:The '.*_dataloader' does not have many workers")
def test_fit_is_measured_beside_the_bare_loop(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(BENCHMARKS / "fit.py"))["main"]
    ways = ["bare", "no workers", "bare again"]
    options = ["--shape", "tiny", "--seq", "16", "--batch", "2", "--steps", "3", "--warmup", "1", "--calls", "5"]
    results = main([*options, "--ways", *ways])["eager"]
    assert list(results) == ways and all(0 < result.median < 60_000 for result in results.values())
    # The same adapters, rows and steps: only rounding differs.
    assert [result.loss for result in results.values()] == pytest.approx([results["bare"].loss] * 3, rel=1e-3)
    printed = capsys.readouterr().out
    assert all(f"| {name} | {result.median:.2f} |" in printed for name, result in results.items())
    assert printed.count("calls a step") == 3


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_quality_on_fp8_bases_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(BENCHMARKS / "float8_quality.py"))
    model = tiny_lm.save(tmp_path / "model")
    for split in ("train", "val", "test"):
        tiny_lm.write(tmp_path / f"{split}.jsonl", tiny_lm.rows())
    options = ["--steps", "2", "--batch", "4", "--rates", "1e-2", "1e-9", "--seeds", "0", "1", "--dtype", "float32"]
    results = script["main"]([model, str(tmp_path), *options])
    assert [(result["base"], result["seed"]) for result in results] == [("plain", 0), ("fp8", 0), ("plain", 1), ("fp8", 1)]
    assert [result["packed"] for result in results] == [0, 2 * 7] * 2 and {result["rate"] for result in results} == {1e-2}
    losses = [result["loss"] for result in results]
    assert len(set(losses)) == 4 and losses[1] == pytest.approx(losses[0], rel=0.1) and losses[3] == pytest.approx(losses[2], rel=0.1)
    printed = capsys.readouterr().out
    assert f"| fp8 | {(losses[1] + losses[3]) / 2:.4f} | {min(losses[1::2]):.4f} – {max(losses[1::2]):.4f} |" in printed


def test_review_snippets_are_told_apart_by_their_rating(tmp_path: Path) -> None:
    inner, outer = tmp_path / "inner.tar.gz", tmp_path / "sdist.tar.gz"
    (tmp_path / "rows.txt").write_text("1\t2.5\tA joy\n2\t-0.4\t Dull \n3\t0.0\tA film\n4\t-2.5\ta joy\n")
    script = runpy.run_path(str(BENCHMARKS / "review_snippets.py"))
    for archive, file, name in ((inner, tmp_path / "rows.txt", "a/" + script["INNER"]), (outer, inner, "b/" + script["OUTER"])):
        with tarfile.open(archive, "w:gz") as made:
            made.add(file, name)
    snippets = script["read_snippets"](outer)
    assert snippets == [("A joy", "positive"), ("Dull", "negative")]
    script["write_splits"](snippets, tmp_path / "rows", {"train": 1, "test": 1})
    rows = [json.loads((tmp_path / "rows" / f"{split}.jsonl").read_text()) for split in ("train", "test")]
    assert {(row["messages"][1]["content"], row["messages"][2]["content"]) for row in rows} == set(snippets)
    assert all(set(row["choices"]) == {"positive", "negative"} for row in rows)
