"""What callbacks put into checkpoints under sharding: the documentation's average of adapters, and shards, which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest

from tests.distributed.runs import run
from tests.distributed.test_lightning import close
from tests.docs.pages import blocks

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory")


def documented() -> Any:
    """The class that docs/callback.md shows."""
    names: dict[str, Any] = {"L": L}
    exec(next(block for block in blocks("callback", "python") if "class AdapterEMA" in block), names)
    return names["AdapterEMA"]


def averaged(name: str, folder: str, epochs: int, ckpt: str | None = None, save: bool = True) -> dict[str, Any]:
    """A run, and the whole average that its last checkpoint would have."""
    average = documented()()
    run(name, folder, epochs, ckpt=ckpt, save=save, more=(average,))
    return average.state_dict()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The average after four epochs, and a checkpoint after two."""
    folder = tmp_path_factory.mktemp("one")
    averaged("single", str(folder), 2)
    return averaged("single", str(folder / "whole"), 4, save=False), folder / "last.ckpt"


@pytest.mark.parametrize("name", ["fsdp2 full", "fsdp2 DCP"])
def test_the_documented_average_is_that_of_one_process_and_resumes_there_and_back(
    pool: Any, one_process: tuple[dict[str, Any], Path], tmp_path: Path, name: str
) -> None:
    whole, saved = one_process
    pool.run(averaged, name, str(tmp_path), 2)
    for rank in pool.run(averaged, name, str(tmp_path / "rest"), 4, str(saved), False):
        close(rank, whole)
    close(averaged("single", str(tmp_path / "rest"), 4, str(tmp_path / "last.ckpt"), False), whole)


class Shards(L.Callback):
    """Saves what each process has."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.module = pl_module

    def state_dict(self) -> dict[str, Any]:
        return {"average": [p.detach() for p in self.module.parameters() if p.requires_grad]}


def refused(folder: str, name: str) -> str:
    with pytest.raises(ValueError) as error:
        run(name, folder, 1, save=True, more=(Shards(),))
    return str(error.value)


def test_shards_in_a_callbacks_state_are_refused_by_name(pool: Any, tmp_path: Path) -> None:
    """The first process's piece was written as if it were all, and each process resumed with it."""
    for name in ("fsdp2 full", "fsdp2 DCP"):
        for said in pool.run(refused, str(tmp_path), name):
            assert said.startswith("callbacks['Shards']['average'][0] is sharded") and "value.full_tensor()" in said
    assert not list(tmp_path.glob("*.ckpt"))
