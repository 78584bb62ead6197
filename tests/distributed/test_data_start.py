"""Inits that read data under every strategy: the start is that of one process that reads all batches, and equal on every rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.nets import CONFIG
from tests.distributed.runs import run
from tests.distributed.test_lightning import close, start

#: Enough components that EVA drops none, so that the order of the rows does not matter.
EVA = replace(CONFIG, rank=6, alpha=12, target_modules=["q", "fc1"], init="eva")
CONFIGS = {
    "eva": EVA,
    "eva without redistribution": replace(EVA, init_options={"rho": 1.0}),
    # Not the last layer before the head: its gradient has no more singular vectors than there are classes, and the rest are noise.
    "lora_ga": replace(CONFIG, init="lora_ga", target_modules=["q", "v", "fc1"]),
    "corda": replace(CONFIG, init="corda"),
}
OF_CALLS = ("corda", "eva without redistribution")  # what they gather depends on how rows are divided into calls
STRATEGIES = ["ddp", "fsdp full", "fsdp2 after", "lora_fsdp2"]
REFUSED = {
    ("eva", "fsdp full"): "init='eva' gives layers other ranks, and strategy=CPUFSDPStrategy",
    ("eva", "fsdp2 after"): "is sharded, so it cannot get another rank",
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("single")
    return {what: run("single", str(folder / what), 1, config=config) for what, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def together(pool: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """CorDA divides each call's input by its largest entry, and EVA drops small components, each of its own rows. So two processes are not
    one; the strategies are held against each other.
    """
    folder = tmp_path_factory.mktemp("ddp")
    return {what: start(pool, "ddp", str(folder / what), 1, config=CONFIGS[what])[0] for what in OF_CALLS}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("what", CONFIGS)
def test_starts_as_one_process_does(
    pool: Any, alone: dict[str, Any], together: dict[str, Any], what: str, name: str, tmp_path: Path
) -> None:
    if (what, name) in REFUSED:
        with pytest.raises(Exception, match=REFUSED[what, name]):
            start(pool, name, str(tmp_path), 1, config=CONFIGS[what])
        return
    wanted = (together if what in OF_CALLS else alone)[what]
    for rank in start(pool, name, str(tmp_path), 1, config=CONFIGS[what], save=True):
        assert rank["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
        close(rank["adapters"], wanted["adapters"], 2e-5)
    start(pool, name, str(tmp_path / "more"), 2, config=CONFIGS[what], ckpt=str(tmp_path / "last.ckpt"))


def test_ranks_are_redistributed_here(alone: dict[str, dict[str, Any]]) -> None:
    ranks = {tensor.shape[0] for name, tensor in alone["eva"]["adapters"].items() if name.endswith("lora_A")}
    assert len(ranks) > 1 and all(torch.isfinite(tensor).all() for run in alone.values() for tensor in run["adapters"].values())


def test_tensor_parallel_layers_are_refused(pool: Any, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="is split by tensor parallelism, which hides its rows from init='corda'"):
        start(pool, "tp after", str(tmp_path), 1, config=replace(CONFIGS["corda"], target_modules=["fc1", "fc2"]))
