"""Spoil adapter folders and checkpoints at random, and see that they are refused in one line, or loaded as what they are.

``python -m tests.harness.fuzz --count 20000 --seed 1`` prints what was found. A case depends on the seed and its number alone:
``--first 123 --count 1`` repeats one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import random
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, load_adapter, save_adapter
from lightning_lora.adapter_io.fingerprint import OtherBase
from lightning_lora.cli.commands import inspect
from lightning_lora.storage.read_checkpoint import read_checkpoint
from lightning_lora.strategies.checkpoint_io import write_folder
from tests.faults.adapter_files import as_peft
from tests.faults.kit import CONFIG, adapted, net
from tests.harness.mutations import ADAPTER, ANYWHERE, IN_CHECKPOINTS, IN_FOLDERS, TENSORS, Mutation, header_of, write_header
from tests.lit import CONFIG as LIT
from tests.lit import LitNet, trainer
from tests.memory import peak

SECONDS, MEMORY = 30, 256 * 2**20  # what a case may take
DIFFERS = "loads, and differs"


@dataclass(frozen=True)
class Sample:
    """A folder that is whole; what of it is loaded; how; the ways to spoil it, and which of them leave honest data."""

    folder: Path
    name: str
    actions: tuple[Callable[[Path], nn.Module | str], ...]
    mutations: list[Mutation]
    honest: frozenset[str]


class Hang(BaseException):
    """A case took too long."""


def into_net(path: Path) -> nn.Module:
    return load_adapter(net(), path)


def into_lit(path: Path) -> nn.Module:
    return load_adapter(LitNet(), path)


def looked_at(path: Path) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        inspect(str(path))
    return out.getvalue().partition("\n")[2]


def fitted(path: Path) -> nn.Module:
    """What is in the module once the checkpoint has been restored: no step is taken."""
    model = LitNet()
    fit = trainer(path.parent, LoRACallback(LIT, merge_on_fit_end=False), max_epochs=2, limit_train_batches=0, limit_val_batches=0)
    fit.fit(model, ckpt_path=str(path))
    return model


def samples(root: Path) -> list[Sample]:
    """Write what is spoilt: folders of ours and of PEFT's, a checkpoint in one file and one in shards."""
    found: list[Sample] = []
    configs = {
        "plain": CONFIG,
        "dora": LoRAConfig(
            rank=3, variant="dora", target_modules=["q_proj"], modules_to_save=["head"], rank_pattern={"layers.0.q_proj": 2}
        ),
        "vera": LoRAConfig(rank=4, variant="vera", target_modules=["q_proj", "v_proj"]),
    }
    for label, config in configs.items():
        for peft in (False, True):
            folder = save_adapter(adapted(config), root / f"{label}{peft}" / ADAPTER).parent
            if peft:
                as_peft(folder / ADAPTER)
            write_header(folder / ADAPTER / TENSORS, *header_of(folder / ADAPTER / TENSORS))  # sorted: the same in every process
            honest = {"flip", "splice", "edit_json", "edit_header", "swap_entries"} if peft else set()  # nothing vouches for PEFT's
            found.append(Sample(folder, ADAPTER, (into_net, looked_at), ANYWHERE + IN_FOLDERS, frozenset(honest)))
    torch.manual_seed(0)
    checkpoint = root / "file" / "last.ckpt"
    saver = ModelCheckpoint(checkpoint.parent, filename="last")
    trainer(root, LoRACallback(LIT, merge_on_fit_end=False), saver, max_epochs=1).fit(LitNet())
    honest = frozenset({"edit_checkpoint", "edit_adapter"})
    found.append(Sample(checkpoint.parent, "last.ckpt", (into_lit, looked_at, fitted), ANYWHERE + IN_CHECKPOINTS, honest))
    write_folder(read_checkpoint(checkpoint), root / "shards" / "last.ckpt")
    found.append(Sample(root / "shards", "last.ckpt", (fitted,), ANYWHERE + IN_CHECKPOINTS, honest))
    return found


def content(result: nn.Module | str) -> Any:
    """What a load gave, comparable to the bit."""
    if isinstance(result, str):
        return result
    return {name: (str(t.dtype), tuple(t.shape), t.detach().numpy().tobytes()) for name, t in result.state_dict().items()}


@contextlib.contextmanager
def limited() -> Iterator[Callable[[], int]]:
    """Raise Hang after ``SECONDS``. Yields a function that returns by how much memory has grown at most, in bytes."""

    def hang(*_: object) -> None:
        raise Hang

    before, start = signal.signal(signal.SIGALRM, hang), peak()
    signal.alarm(SECONDS)
    try:
        yield lambda: peak() - start
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def verdict(action: Callable[[Path], nn.Module | str], path: Path, whole: Any, honest: bool) -> str:
    """Return what came of a spoilt file: ``refused``, ``same`` or ``honest``; anything else is a fault."""
    peak()
    try:
        with limited() as grown:
            result = content(action(path))
            memory = grown()
    except (ValueError, OSError) as error:
        said = str(error)
        if type(error) not in (ValueError, OtherBase) and not isinstance(error, OSError):
            return f"raises a {type(error).__name__}: {said[:300]}"
        if "\n" in said or not said or len(said) > 20_000:
            return f"has not one line: {said[:300]!r}"
        return "refused" if str(path.parent) in said else f"does not name the file: {said[:300]!r}"
    except Hang:
        return "hangs"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"raises a {type(error).__name__}: {str(error)[:300]!r} ({Path(where.filename).name}:{where.lineno})"
    if memory > MEMORY:
        return f"takes {memory >> 20} MiB"
    return "same" if result == whole else "honest" if honest else DIFFERS


def vouched(folder: Path) -> bool:
    """Whether something says what an adapter's tensors are: without our metadata the folder is one of PEFT's."""
    try:
        return "lightning_lora" in header_of(folder / ADAPTER / TENSORS)[0].get("__metadata__", {})
    except OSError:
        return True


def fuzz(root: Path, numbers: range, seed: int) -> tuple[Counter[str], list[str]]:
    """Spoil and load. Return how often each verdict was given per action, and one line per fault."""
    kinds = samples(root / "whole")
    whole = {(id(kind), action): content(action(kind.folder / kind.name)) for kind in kinds for action in kind.actions}
    seen, faults = Counter[str](), list[str]()
    for number in numbers:
        chance = random.Random(f"{seed}/{number}")
        kind = chance.choice(kinds)
        mutation, action = chance.choice(kind.mutations), chance.choice(kind.actions)
        place = root / "case"
        shutil.copytree(kind.folder, place)
        mutation(place, chance)
        found = verdict(action, place / kind.name, whole[id(kind), action], mutation.__name__ in kind.honest)
        if found == DIFFERS and not vouched(place):
            found = "honest"
        shutil.rmtree(place)
        known = found in ("refused", "same", "honest")
        seen[f"{action.__name__}: {found if known else 'FAULT'}"] += 1
        if not known:
            faults.append(f"case {number}: {mutation.__name__} of {kind.folder.name}, {action.__name__} {found}")
    return seen, faults


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, no log: a few thousand files would fill the screen."""
    log = logging.getLogger("lightning.pytorch")
    before = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            log.setLevel(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000, help="how many files to spoil")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, quiet():
        seen, faults = fuzz(Path(folder), range(args.first, args.first + args.count), args.seed)
    for line in [*faults, *(f"{count:7} {what}" for what, count in sorted(seen.items()))]:
        print(line)
    print(f"{args.count} cases in {time.perf_counter() - begun:.0f} s, {len(faults)} faults")


if __name__ == "__main__":
    main()
