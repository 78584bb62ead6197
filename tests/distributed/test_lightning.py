"""``LoRACallback`` under every strategy: training, checkpoints, resume from any to any, merge, the adapter left; against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import load_adapter
from lightning_lora.cli.run_results import RunResults
from tests.distributed.nets import adapter_tensors, make_net
from tests.distributed.runs import BATCHES, REFUSED, STRATEGIES, refuse, run
from tests.faults.kit import row

PARALLEL = [name for name in STRATEGIES if name != "single"]
RESUMABLE = ["single", "ddp", "fsdp full", "fsdp sharded", "fsdp2 full", "fsdp2 DCP"]

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory")


def start(pool: Any, name: str, *args: Any, how: Any = None, **kwargs: Any) -> list[dict[str, Any]]:
    """A run's results, one a rank; a single process runs here."""
    how = how or run_with
    return [how(name, args, kwargs)] if name == "single" else pool.run(how, name, args, kwargs)


def run_with(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return run(name, *args, **kwargs)


def run_leaving(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A run of the command line's: ``left`` has the adapter folders that this process knows of."""
    results = RunResults()
    return run(name, *args, more=(results,), **kwargs) | {"left": [str(path) for path in results.adapters]}


def close(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run("single", str(tmp_path_factory.mktemp("single")), 4, save=True, test=True)


@pytest.fixture(scope="module")
def both_halves(pool: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """Two of four epochs under each strategy, one result a rank, with the checkpoint and the adapter that this left."""
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in STRATEGIES}
    return {name: (folder, start(pool, name, str(folder), 2, how=run_leaving, save=True)) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def halves(both_halves: Any) -> dict[str, tuple[Path, dict[str, Any]]]:
    return {name: (folder, ranks[0]) for name, (folder, ranks) in both_halves.items()}


@pytest.mark.parametrize("name", PARALLEL)
def test_trains_as_one_process_does(halves: Any, whole_run: dict[str, Any], name: str) -> None:
    result = halves[name][1]
    assert result["losses"] == pytest.approx(whole_run["losses"][: 2 * BATCHES], abs=1e-6)
    close(result["adapters"], halves["single"][1]["adapters"])
    close(result["moments"], halves["single"][1]["moments"])
    assert result["trained"] == halves["single"][1]["trained"]


@pytest.mark.parametrize("name", STRATEGIES)
def test_checkpoints_hold_the_adapter_only(halves: Any, name: str) -> None:
    saved = halves[name][1]["saved"]
    assert saved["names"] == sorted(halves["single"][1]["adapters"]) and all("lora_" in key for key in saved["names"])
    adapters = halves["single"][1]["adapters"]
    assert saved["elements"] == 3 * sum(t.numel() for t in adapters.values()) + len(adapters)  # A and B, two moments, step counts


@pytest.mark.parametrize("target", RESUMABLE)
@pytest.mark.parametrize("source", RESUMABLE)
@row(42)
def test_resumes_from_any_strategy_under_any_other(
    pool: Any, halves: Any, whole_run: dict[str, Any], tmp_path: Path, source: str, target: str
) -> None:
    folder, half = halves[source]
    for rank in start(pool, target, str(tmp_path), 4, ckpt=str(folder / "last.ckpt")):
        assert half["losses"] + rank["losses"] == pytest.approx(whole_run["losses"], abs=1e-6)
        close(rank["adapters"], whole_run["adapters"])
        close(rank["moments"], whole_run["moments"])


@pytest.mark.parametrize("name", ["fsdp after", "fsdp2 after", "lora_fsdp2", "lora_fsdp2 pulled", "tp", "tp after"])
def test_the_others_resume_too(pool: Any, halves: Any, whole_run: dict[str, Any], tmp_path: Path, name: str) -> None:
    for source, target in ((name, name), (name, "single"), ("single", name)):
        folder, half = halves[source]
        result = start(pool, target, str(tmp_path), 4, ckpt=str(folder / "last.ckpt"))[0]
        assert half["losses"] + result["losses"] == pytest.approx(whole_run["losses"], abs=1e-6)
        close(result["moments"], whole_run["moments"])


@pytest.mark.parametrize("target", ["ddp", "fsdp full", "fsdp2 DCP"])
@row(41)
def test_resumes_on_another_number_of_processes(pool4: Any, halves: Any, whole_run: dict[str, Any], tmp_path: Path, target: str) -> None:
    folder, half = halves["fsdp2 DCP"]  # two processes wrote it
    for rank in start(pool4, target, str(tmp_path), 4, ckpt=str(folder / "last.ckpt")):
        assert half["losses"] + rank["losses"] == pytest.approx(whole_run["losses"], abs=1e-6)
        close(rank["moments"], whole_run["moments"])


@pytest.fixture(scope="module")
def merged_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run("single", str(tmp_path_factory.mktemp("merged")), 2, merge=True, test=True)


def left_adapter(folder: Path, ranks: list[dict[str, Any]]) -> None:
    """The run's folder has one adapter, that of the model's memory, and every rank knows of it."""
    assert [rank["left"] for rank in ranks] == [[str(folder / "adapter")]] * 2
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    read = adapter_tensors(load_adapter(make_net(), folder / "adapter"))
    mine = {key.removeprefix("net."): tensor for key, tensor in ranks[0]["adapters"].items()}
    assert read.keys() == mine.keys() and all(torch.equal(read[key], mine[key]) for key in mine)


@pytest.mark.parametrize("name", PARALLEL)
def test_a_run_leaves_its_adapter(both_halves: Any, name: str) -> None:
    left_adapter(*both_halves[name])


@pytest.mark.parametrize("name", PARALLEL)
def test_merges_at_the_end(pool: Any, merged_run: dict[str, Any], tmp_path: Path, name: str) -> None:
    # After fit Lightning itself leaves a module whose root FSDP1 flattened unusable for test, with or without LoRA.
    test = name not in ("fsdp full", "fsdp sharded")
    ranks = start(pool, name, str(tmp_path), 2, how=run_leaving, merge=True, test=test)
    left_adapter(tmp_path, ranks)
    for rank in ranks:
        assert rank["merged"]
        close(rank["base"], merged_run["base"])
        if test:
            assert rank["test"] == pytest.approx(merged_run["test"], abs=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(tmp_path: Path, name: str) -> None:
    refuse(name, str(tmp_path))


@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", PARALLEL)
def test_gradient_checkpointing(pool: Any, halves: Any, tmp_path: Path, name: str, mode: str) -> None:
    result = start(pool, name, str(tmp_path), 2, checkpointing=mode)[0]
    assert result["losses"] == pytest.approx(halves["single"][1]["losses"], abs=1e-6)
    close(result["adapters"], halves["single"][1]["adapters"])


@pytest.mark.parametrize("name", ["ddp", "fsdp full", "fsdp2 full", "lora_fsdp2", "lora_fsdp2 pulled"])
def test_compiled_layers(pool: Any, halves: Any, tmp_path: Path, name: str) -> None:
    """Wrapped by the strategy after they were compiled, or before, and checkpointed: the same numbers."""
    result = start(pool, name, str(tmp_path), 2, compile="layer", checkpointing="non-reentrant", merge=True)[0]
    assert result["losses"] == pytest.approx(halves["single"][1]["losses"], abs=1e-6) and result["merged"]
    close(result["adapters"], halves["single"][1]["adapters"])
