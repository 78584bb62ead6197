"""``pull_frozen="auto"``: what it chooses, alike on every rank, and that a trial that fails leaves FSDP2 as it is."""

from __future__ import annotations

import functools
import re
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.experimental import pull_frozen, pulling_group, trial
from lightning_lora.experimental.peer_memory import together
from lightning_lora.strategies import LoRAFSDP2Strategy, fsdp2
from lightning_lora.utils.blocks import repeated_blocks
from tests.distributed.nets import make_net
from tests.distributed.runs import BATCHES, STRATEGIES, LitShared, run

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("change", "nodes", "memory", "release", "reason"),
    [
        ({}, 1, 10**9, "2.11", None),
        ({}, 2, 10**9, "2.11", "it is for one host, and there are 2"),
        ({}, 1, 10**9, "2.13", r"on GPUs it was tested with torch 2.11, and this is"),
        ({"modules_to_save": ["head"]}, 1, 10**9, "2.11", "'head.weight' trains outside the blocks"),
        ({}, 1, 10**5, "2.11", "adapters whole on every GPU would take 0.0 GiB"),
        (None, 1, 10**9, "2.11", "nothing in 'layers.0' is frozen"),
    ],
)
def test_when_it_pulls(
    change: dict[str, Any] | None, nodes: int, memory: int, release: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_net()
    if change is not None:
        apply_lora(model, config=LoRAConfig(rank=4, target_modules=["q", "v"], **change))
    monkeypatch.setattr(trial, "torch_release", lambda: release)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    found = next(trial._reasons(model, repeated_blocks(model), GPU, nodes), None)
    assert found == reason or (reason is not None and found is not None and reason in found)


def test_gpus_that_are_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda mine, other: other != 2)
    assert list(trial._out_of_reach(GPU, [0, 1, 2, 7])) == [2]  # it does not see a seventh
    assert list(trial._out_of_reach(torch.device("cpu"), [None, None])) == []


def decided(hosts: tuple[str, str], second: str | None) -> str | None:
    """The decision of ranks that differ."""
    rank = dist.get_rank()
    with ExitStack() as patches:
        patches.enter_context(patch.object(trial.socket, "gethostname", lambda: hosts[rank]))
        patches.enter_context(patch.object(trial, "_reasons", lambda *args: iter([second] if rank and second else [])))
        return trial.reason_against(nn.Module(), [], torch.device("cpu"), 1)


def test_every_rank_decides_alike(pool: Any) -> None:
    assert pool.run(decided, ("a", "a"), None) == [None] * 2
    assert pool.run(decided, ("a", "b"), None) == ["the processes are on several hosts"] * 2
    assert pool.run(decided, ("a", "a"), "no room") == ["no room"] * 2


def fit(how: str, folder: str, ckpt: str | None = None, epochs: int = 2, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """A run under ``lora_fsdp2``, what it logged of its choice, and whether it pulled at its end."""
    said: list[str] = []
    pulls: list[bool] = []
    groups: list[Any] = []
    shares = 0

    def fails_later(size: int, ranks: Any, device: torch.device) -> list[torch.Tensor]:
        nonlocal shares
        shares += 1
        mine = shared(size, ranks, device)

        def no_room() -> None:
            if shares == 2 and dist.get_rank() == 1:
                raise RuntimeError("no room")

        together(no_room, size, ranks)
        return mine

    class Lit(LitShared):
        def on_train_end(self) -> None:
            groups.extend(unit._get_fsdp_state()._fsdp_param_group for unit in (self.net, *self.net.layers))  # type: ignore[union-attr]
            pulls.extend(type(group) is pulling_group.PullingGroup for group in groups)

    shared = pulling_group.shared_memory
    keywords: dict[str, Any] = {"process_group_backend": "gloo", "pull_frozen": how != "declined" and "auto", **(options or {})}
    with ExitStack() as patches:
        patches.enter_context(patch.object(fsdp2, "rank_zero_info", said.append))
        patches.enter_context(patch.dict(STRATEGIES, {"auto": (lambda: LoRAFSDP2Strategy(**keywords), Lit)}))
        if how != "as it is":
            patches.enter_context(patch.object(fsdp2, "reason_against", lambda *args: None))
        if how == "fails":
            patches.enter_context(patch.object(pulling_group, "shared_memory", fails_later))
        if how == "differs":
            patches.enter_context(patch.object(pull_frozen, "_as_gathered", lambda *args: dist.get_rank() == 0))
        result = run("auto", folder, epochs, ckpt, save=True)
    return {"losses": result["losses"], "adapters": result["adapters"], "moments": result["moments"], "said": said, "pulls": pulls}


SAID: dict[str, tuple[bool, str | None]] = {
    "as it is": (False, "gathered, not pulled: it is for GPUs, and this is a cpu"),
    "works": (True, "Frozen weights are pulled: read from the other GPUs' memory"),
    "declined": (False, None),
    "fails": (False, r"could not share \d+ bytes with each other: no room"),
    "differs": (False, r"what is read of 'net' is not what FSDP2 gathers"),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run("single", str(tmp_path_factory.mktemp("alone")))


def same(result: dict[str, Any], alone: dict[str, Any]) -> None:
    torch.testing.assert_close(result["losses"], alone["losses"], rtol=0, atol=1e-6)
    for name in ("adapters", "moments"):
        torch.testing.assert_close(result[name], alone[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", SAID)
def test_it_trains_as_one_process_whatever_the_trial_shows(pool: Any, alone: dict[str, Any], how: str, tmp_path: Path) -> None:
    pulled, text = SAID[how]
    for result in pool.run(fit, how, str(tmp_path)):
        same(result, alone)
        assert set(result["pulls"]) == {pulled}
        assert len(result["said"]) == (text is not None) and all(re.search(text, said) for said in result["said"]), result["said"]


@pytest.fixture(scope="module")
def half(pool: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The checkpoint of the first epoch."""

    @functools.cache
    def found(how: str, shards: bool) -> str:
        folder = tmp_path_factory.mktemp("half")
        pool.run(fit, how, str(folder), None, 1, {"save_distributed_checkpoint": shards})
        return str(folder / "last.ckpt")

    return found


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize(("first", "second"), [("as it is", "works"), ("works", "as it is"), ("works", "fails"), ("fails", "works")])
def test_a_run_resumes_whatever_was_chosen_before(
    pool: Any, alone: dict[str, Any], half: Any, first: str, second: str, shards: bool, tmp_path: Path
) -> None:
    for result in pool.run(fit, second, str(tmp_path), half(first, shards), 2, {"save_distributed_checkpoint": shards}):
        same(result, alone | {"losses": alone["losses"][BATCHES:]})
        assert set(result["pulls"]) == {SAID[second][0]}
