"""``save_adapter`` on a sharded model: one whole adapter, written once, that a single process loads."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Partial

from lightning_lora import apply_lora, export_adapter, export_merged, load_adapter, save_adapter
from lightning_lora.strategies.checkpoint_io import read_folder, write_folder
from lightning_lora.utils.sharding import local_tensor, on_first_rank
from tests.distributed import runs
from tests.distributed.nets import CONFIG, Block, adapter_tensors, fill_adapters, make_data, make_net
from tests.distributed.runs import run
from tests.distributed.wrappers import BOTH, wrapped_and_adapted
from tests.faults.kit import row


def save(name: str, order: str, folder: str) -> bool:
    model = wrapped_and_adapted(name, order)[0]
    save_adapter(model, folder)
    there = Path(folder, "adapter_config.json").is_file()
    with pytest.raises(ValueError, match=r"is not empty; choose another or pass overwrite=True"):  # on every rank, or one would wait
        save_adapter(model, folder)
    save_adapter(model, folder, overwrite=True)
    return there


@pytest.mark.parametrize(("name", "order"), BOTH)
def test_a_sharded_model_saves_a_whole_adapter(pool: Any, tmp_path: Path, name: str, order: str) -> None:
    assert all(pool.run(save, name, order, str(tmp_path / "adapter")))
    wanted = apply_lora(make_net(), config=CONFIG)
    fill_adapters(wanted)
    loaded = adapter_tensors(load_adapter(make_net(), tmp_path / "adapter"))
    for key, tensor in adapter_tensors(wanted).items():
        assert torch.equal(loaded[key], tensor)


def save_flattened(folder: str) -> None:
    """FSDP1 as Fabric wraps: adapters and base in one flat parameter."""
    model = apply_lora(make_net(), config=CONFIG)
    fill_adapters(model)
    wrapped = FSDP(model, auto_wrap_policy=ModuleWrapPolicy({Block}), use_orig_params=True, device_id=torch.device("cpu"))
    mine = list(wrapped.parameters())
    save_adapter(wrapped, folder)
    assert all(before is after for before, after in zip(mine, wrapped.parameters(), strict=True))
    wrapped(make_data()[0]).sum().backward()
    with pytest.raises(ValueError, match=r"FSDP1 flattened the adapter of 'layers.0.q' .*: load before FSDP1 wraps the model"):
        load_adapter(wrapped, folder)
    with pytest.raises(ValueError, match=r"the adapter of 'q' is part of an FSDP1 unit around Block"):
        save_adapter(next(child for child in model.modules() if isinstance(child, Block)), folder, overwrite=True)


def test_adapters_that_fsdp1_flattened_are_gathered(pool: Any, tmp_path: Path) -> None:
    """The first process's piece was written, and loaded values were lost, in silence."""
    pool.run(save_flattened, str(tmp_path / "adapter"))
    wanted = apply_lora(make_net(), config=CONFIG)
    fill_adapters(wanted)
    loaded = adapter_tensors(load_adapter(make_net(), tmp_path / "adapter"))
    for key, tensor in adapter_tensors(wanted).items():
        assert torch.equal(loaded[key], tensor)


def export(order: str, folder: str) -> bool:
    export_adapter(wrapped_and_adapted("fsdp2", order)[0], folder, base="owner/name", target="llama.cpp")
    return Path(folder, "README.md").is_file()


def test_a_sharded_model_exports_too(pool: Any, tmp_path: Path) -> None:
    assert all(pool.run(export, "before", str(tmp_path / "served")))
    wanted = apply_lora(make_net(), config=CONFIG)
    fill_adapters(wanted)
    loaded = adapter_tensors(load_adapter(make_net(), tmp_path / "served"))
    for key, tensor in adapter_tensors(wanted).items():
        assert torch.equal(loaded[key], tensor)


def saved_sum(folder: str) -> torch.Tensor:
    """What a folder of shards has of a sum over the ranks, as SGD's momentum is under tensor parallelism."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    summands = DTensor.from_local(torch.full((4,), dist.get_rank() + 1.0), mesh, [Partial()])
    write_folder({"state_dict": {"x": summands}}, Path(folder, "last.ckpt"))
    dist.barrier()
    return read_folder(Path(folder, "last.ckpt"))["state_dict"]["x"]


def test_a_sum_over_the_ranks_is_saved_as_such(pool: Any, tmp_path: Path) -> None:
    assert all(torch.equal(found, torch.full((4,), 3.0)) for found in pool.run(saved_sum, str(tmp_path)))


def folder_after_a_kill(folder: str) -> tuple[list[str], list[str]]:
    """What stands there after a save that fails and one that does not, where a kill between two renames left only the old checkpoint."""
    path, first = Path(folder, "last.ckpt"), dist.get_rank() == 0
    write_folder({"state_dict": {"x": torch.ones(2)}}, path)
    if first:
        path.rename(path.with_name(".last.ckpt.old"))
        path.with_name(".last.ckpt.tmp").touch()  # and one of a file, before that, its staging file
    dist.barrier()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="disk full"):
        patch.setattr(dcp, "save", fails)
        write_folder({"state_dict": {"x": torch.zeros(2)}}, path)
    dist.barrier()
    failed = sorted(p.name for p in Path(folder).iterdir())
    dist.barrier()
    write_folder({"state_dict": {"x": torch.zeros(2)}}, path)
    assert torch.equal(read_folder(path)["state_dict"]["x"], torch.zeros(2))
    dist.barrier()  # the first rank has released its lock, which is a file
    return failed, sorted(p.name for p in Path(folder).iterdir())


def fails(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("disk full")


def test_a_folder_of_shards_is_kept_until_the_next_is_whole(pool: Any, tmp_path: Path) -> None:
    for failed, done in pool.run(folder_after_a_kill, str(tmp_path)):
        assert "last.ckpt" in failed and ".last.ckpt.old" not in failed and done == ["last.ckpt"]


def save_where_it_fails(folder: str) -> str:
    Path(folder).touch() if dist.get_rank() == 0 else None
    dist.barrier()
    with pytest.raises(ValueError, match="is a file; choose another") as error:
        save_adapter(wrapped_and_adapted("ddp", "before")[0], folder)
    return str(error.value)


def test_a_refusal_of_the_first_rank_is_raised_on_all(pool: Any, tmp_path: Path) -> None:
    assert len(set(pool.run(save_where_it_fails, str(tmp_path / "file")))) == 1


class Unpicklable(Exception):
    def __init__(self, text: str, lock: Any) -> None:
        super().__init__(text, lock)

    def __str__(self) -> str:
        return "torn page"


ERRORS = {
    "ValueError": lambda: ValueError("rank=0"),
    "OSError": lambda: FileNotFoundError(2, "No such file", "adapter"),
    "RuntimeError": lambda: RuntimeError("disk full"),
    "MemoryError": MemoryError,
    "unpicklable": lambda: Unpicklable("torn page", threading.Lock()),
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": lambda: SystemExit(3),
}


def raise_on_the_first(name: str) -> tuple[str, str, list[int]]:
    """The type and text that this rank gets, and what a collective gives right after it."""
    done = []

    def action() -> None:
        done.append(dist.get_rank())
        raise ERRORS[name]()

    with pytest.raises(BaseException) as caught:
        on_first_rank(action)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, done)  # the ranks are where they were to each other: no message is left over
    return type(caught.value).__name__, str(caught.value), ranks


@pytest.mark.parametrize("name", ERRORS)
def test_whatever_the_first_rank_raises_is_raised_on_all(pool: Any, name: str) -> None:
    first, second = pool.run(raise_on_the_first, name)
    error = ERRORS[name]()
    assert first[:2] == (type(error).__name__, str(error)) and first[2] == second[2] == [[0], []]
    if name in ("ValueError", "OSError"):
        assert second[:2] == (name, str(error))
    else:
        assert second[:2] == ("RuntimeError", f"the first rank raised {type(error).__name__}: {error}")


def fail_on_the_first(target: str, call: str, folder: str) -> str:
    """A write that fails on the first rank only, in the middle of what all ranks do."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="disk full") as caught:
        if dist.get_rank() == 0:
            patch.setattr(f"lightning_lora.{target}", fails)
        if call == "export":
            export_merged(wrapped_and_adapted("fsdp2", "before")[0], folder, shard_bytes=1)
        elif call == "folder":
            write_folder({"state_dict": {"x": torch.ones(2)}}, Path(folder, "last.ckpt"))
        else:
            run("ddp", folder, epochs=1, save=True)
    return str(caught.value)


@pytest.mark.parametrize(
    ("target", "call"),
    [
        ("adapter_io.weight_files.write_atomic", "export"),
        ("strategies.checkpoint_io.erase", "folder"),
        ("strategies.checkpoint_io.write_atomic", "folder"),
        ("strategies.checkpoint_io.DurableCheckpointIO.save_checkpoint", "fit"),
    ],
)
@row(44)
def test_a_write_that_fails_on_the_first_rank_leaves_none_waiting(pool: Any, tmp_path: Path, target: str, call: str) -> None:
    first, second = pool.run(fail_on_the_first, target, call, str(tmp_path / "out"))
    assert (first, second) == ("disk full", "the first rank raised RuntimeError: disk full")


def full_on_the_first(folder: str) -> str:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError) as caught:
        if dist.get_rank() == 0:
            patch.setattr("lightning_lora.strategies.checkpoint_io.write_atomic", full)
        write_folder({"state_dict": {"x": torch.ones(2)}}, Path(folder, "last.ckpt"))
    dist.barrier()  # the first rank has removed what it staged
    return str(caught.value)


@row(32)
def test_a_disk_that_is_full_on_the_first_rank_is_named_on_all(pool: Any, tmp_path: Path) -> None:
    first, second = pool.run(full_on_the_first, str(tmp_path))
    assert first == f"[Errno 28] No space left on device: '{tmp_path}/last.ckpt'" and "No space left on device" in second
    assert os.listdir(tmp_path) == []


def moved(name: str, folder: str, ckpt: str | None = None) -> dict[str, Any]:
    """A run whose training moves a frozen bias without a gradient; the bias at the end, whole."""
    strategy, make = runs.STRATEGIES[name]
    made: list[Any] = []

    def moving() -> Any:
        class Moving(type(make())):  # type: ignore[misc]
            def on_train_batch_end(self, *args: Any) -> None:
                bias = self.net.layers[0].norm.bias
                local_tensor(bias.detach()).add_(0.5)

        made.append(Moving())
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runs.STRATEGIES, "moving", (strategy, moving))
        result = runs.run("moving", folder, 1 if ckpt is None else 2, ckpt=ckpt, save=True)
    return result


@pytest.mark.filterwarnings("ignore:Be aware that when using", "ignore:Checkpoint directory", "ignore:The dirpath has changed")
@pytest.mark.parametrize("name", ["ddp", "fsdp full", "fsdp2 full", "fsdp2 DCP", "tp"])
def test_a_frozen_weight_that_moved_is_saved_whole(pool: Any, tmp_path: Path, name: str) -> None:
    results = pool.run(moved, name, str(tmp_path / "a"))
    assert "net.layers.0.norm.bias" in results[0]["saved"]["names"]
    assert [key for key in results[0]["saved"]["names"] if "lora_" not in key] == ["net.layers.0.norm.bias"]
    path = tmp_path / "a" / "last.ckpt"
    saved = read_folder(path) if path.is_dir() else torch.load(path, weights_only=True)
    assert torch.equal(saved["state_dict"]["net.layers.0.norm.bias"], torch.full((16,), 0.5 * runs.BATCHES))
    for target in sorted({name, "ddp"}):
        assert pool.run(moved, target, str(tmp_path / target), str(path))
        path2 = tmp_path / target / "last.ckpt"
        again = read_folder(path2) if path2.is_dir() else torch.load(path2, weights_only=True)
        assert torch.equal(again["state_dict"]["net.layers.0.norm.bias"], torch.full((16,), 1.0 * runs.BATCHES))
