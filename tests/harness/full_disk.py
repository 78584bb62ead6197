"""Save onto a small disk that is full or read-only: the save fails with one line, the old version stays whole, and nothing is left over.

``python -m tests.harness.full_disk`` mounts a tmpfs in a mount namespace of its own (Linux; no rights are needed where users may have
namespaces). Each save is tried with no free page, with one, and so on, until it succeeds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import io
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from lightning_lora import export_merged
from lightning_lora.strategies.checkpoint_io import DurableCheckpointIO, read
from tests.conftest import adapted
from tests.faults.kit import disk_bits
from tests.harness.fuzz import quiet
from tests.harness.kills import Scenario, operations
from tests.harness.scenarios import SCENARIOS, adapter, build
from tests.processes import ended, start

PAGE = os.sysconf("SC_PAGE_SIZE")
SIZE = 8 * 2**20  # bytes of the disk
NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000  # CLONE_NEWNS and CLONE_NEWUSER of unshare(2)


def exported(root: Path) -> Scenario:
    """A merged model, written over an earlier one."""
    models = [adapted(build(128), seed=seed, target_modules=["q_proj"], rank=2) for seed in (1, 2)]
    folder = root / "model"

    def act(turn: int) -> None:
        export_merged(models[turn % 2], folder, overwrite=True)

    def check() -> int:
        tensors = load_file(folder / "model.safetensors")
        (which,) = [n for n, model in enumerate(models) if torch.equal(tensors["layers.0.attn.q_proj.weight"], merged(model))]
        return which

    def merged(model: torch.nn.Module) -> torch.Tensor:
        layer = model.get_submodule("layers.0.attn.q_proj")
        return layer.weight + layer.scaling * layer.lora_B @ layer.lora_A  # type: ignore[operator, union-attr, return-value]

    return Scenario(act, check)


def fitted(root: Path) -> Scenario:
    """``lightning-lora fit``, with one step or two, and its checkpoint. The model and the data are on another disk."""
    from lightning_lora.cli.main import main as command_line  # here, because they import transformers
    from tests import tiny_lm

    here = Path(tempfile.mkdtemp())
    model, train = tiny_lm.save(here / "model"), tiny_lm.write(here / "train.jsonl", tiny_lm.rows(6))
    keep = f"{{class_path: ModelCheckpoint, init_args: {{dirpath: {root}, filename: last, enable_version_counter: false}}}}"
    options = {
        "model.model": model, "data.train": train, "data.batch_size": 3, "lora.config.rank": 2, "lora.merge_on_fit_end": "false",
        "trainer.accelerator": "cpu", "trainer.logger": "false", "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false", "trainer.callbacks": f"[{keep}]",
    }  # fmt: skip

    def act(turn: int) -> None:
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
            code = command_line(["fit", *(f"--{name}={value}" for name, value in options.items()), f"--trainer.max_steps={turn % 2 + 1}"])
        errors = [line for line in said.getvalue().splitlines() if line.startswith("lightning-lora: error: ")]
        assert "Traceback" not in said.getvalue() and len(errors) == (code != 0), said.getvalue()
        if code:
            raise OSError(errors[0])

    def check() -> int:
        return int(read(DurableCheckpointIO(), str(root / "last.ckpt"))["global_step"]) - 1

    return Scenario(act, check)


#: Name → how to make what is saved, and how many pages more each try has.
SAVES: dict[str, tuple[Callable[[Path], Scenario], int]] = {
    **{name: (make, 8 if name == "file" else 1) for name, make in SCENARIOS.items()},
    "adapter": (lambda root: adapter(root, size=512), 1),
    "export": (exported, 8),
    "fit on the command line": (fitted, 4),
}


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a small disk on a new folder."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def filled(disk: Path, free: int) -> Iterator[None]:
    """Leave this many bytes free inside the ``with`` block."""
    ballast = disk / "ballast"
    there = os.statvfs(disk)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, there.f_bavail * there.f_frsize - free)
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Make the disk read-only inside the ``with`` block."""
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


def fails(scenario: Scenario, root: Path) -> bool:
    """Save the second version. Return whether that failed. After a failure the first one must be there, and nothing else."""
    before = disk_bits(root)
    try:
        scenario.act(1)
    except (OSError, ValueError) as error:
        assert str(error) and "\n" not in str(error), f"not one line: {error}"
        assert disk_bits(root) == before, sorted(disk_bits(root))
        assert scenario.check() == 0
        return True
    assert scenario.check() == 1
    return False


def sweep(make: Callable[[Path], Scenario], disk: Path, stride: int, most: int = 10**6) -> Counter[str]:
    """Save with no free page, with more and more, and onto a read-only disk. Return how many saves failed and succeeded."""
    root, seen = disk / "here", Counter[str]()
    scenario = make(root)
    for pages in range(0, most, stride):
        scenario.act(0)
        with filled(disk, pages * PAGE):
            failed = fails(scenario, root)
        seen["full" if failed else "done"] += 1
        if not failed:
            break
    scenario.act(0)
    with read_only(disk):
        assert fails(scenario, root), "a read-only disk was written to"
    seen["read-only"] += 1
    return seen


def fail_at_each_operation(scenario: Scenario, root: Path) -> list[int]:
    """Let the first call that changes the disk find it full, then the second one, and so on till none is left.

    Returns:
        The version that was found after each. The first one is as it was, to the byte.
    """
    seen: list[int] = []
    while True:
        scenario.act(0)
        before, number = disk_bits(root), len(seen) + 1

        def full(now: int, number: int = number) -> None:
            if now == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        failed = None
        with operations(full) as called:
            try:
                scenario.act(1)
            except OSError as error:
                failed = error
        if len(called) < number:
            return seen
        assert "\n" not in str(failed)
        seen.append(scenario.check())
        assert (disk_bits(root) == before) == (seen[-1] == 0), f"call {number}, {called[number - 1]}: {sorted(disk_bits(root))}"
        assert failed or seen[-1] == 1


def fill_up(names: list[str], count: int) -> None:
    """Fill a small disk for each save. Print what came of it."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        tempfile.tempdir = folder
        for number, name in enumerate(names):
            (make, stride), begun = SAVES[name], time.perf_counter()
            with small_disk(Path(folder, str(number))) as disk:
                seen = sweep(make, disk, stride * count)
            print(
                f"{name}: {seen['full']} saves failed on a full disk, {seen['read-only']} on a read-only one, none lost or left anything,"
                f" in {time.perf_counter() - begun:.0f} s",
                flush=True,
            )


def own_mounts() -> None:
    """Give this process, which may have one thread only, a mount namespace in which it may mount.

    Raises:
        OSError: this user may not have one.
    """
    ids = {"uid_map": os.geteuid(), "gid_map": os.getegid()}
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_USER | NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "this user may not have a mount namespace")
    Path("/proc/self/setgroups").write_text("deny")
    for name, number in ids.items():
        Path("/proc/self", name).write_text(f"0 {number} 1")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="try only each n-th number of free pages")
    parser.add_argument("--saves", nargs="+", default=list(SAVES), choices=SAVES, help="what is saved; default: all")
    args = parser.parse_args(argv)
    own_mounts()
    fill_up(args.saves, args.every)


if __name__ == "__main__":  # forked: numpy's import starts threads
    sys.exit(ended(start(main, sys.argv[1:]), 24 * 3600.0))
