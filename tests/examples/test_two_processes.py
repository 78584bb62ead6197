"""The examples for several processes, on two of them over gloo: Fabric's adapter is that of one process, and ``lora_fsdp2`` trains."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.pool import Pool

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    workers = Pool(2)
    yield workers
    workers.close()


def run(name: str, *arguments: str) -> dict[str, float]:
    """Run an example's ``main`` in this process."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name).main(["--accelerator=cpu", *arguments])
    finally:
        sys.path.remove(str(EXAMPLES))


def test_fabric_gives_one_adapter_on_any_number_of_processes(pool, tmp_path):
    both = pool.run(run, "fabric_loop", "--devices=2", "--batches=10", f"--out={tmp_path / 'two'}")
    alone = run("fabric_loop", "--batches=10", f"--out={tmp_path / 'one'}")
    assert both[0] == both[1]
    assert both[0]["first"] == pytest.approx(alone["first"], rel=1e-5) and both[0]["last"] == pytest.approx(alone["last"], rel=1e-3)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == 2 * 2 * 7
    for name in one:
        assert (one[name] - two[name]).norm() < 1e-3 * one[name].norm(), name


def test_the_sharded_run_learns_and_writes_one_adapter(pool, tmp_path):
    both = pool.run(run, "several_gpus", "--devices=2", "--batches=60", f"--out={tmp_path}")
    assert both[0]["after"] == both[1]["after"] > 0.9 and both[0]["loss"] == both[1]["loss"] < 0.5
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
