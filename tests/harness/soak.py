"""Repeat in one process what users repeat: save, load, merge, unmerge, unload, short fits. Results repeat to the bit, and nothing grows.

``python -m tests.harness.soak --cycles 2000 --fits 200`` prints what was done, and by how much the process grew.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, load_adapter, merge_lora, save_adapter, unload_lora, unmerge_lora
from tests.conftest import TinyModel, as_bits, fill
from tests.harness.fuzz import quiet
from tests.lit import CONFIG, LitNet, make_net, trainer
from tests.quantized import inputs, packed_stack

logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # int8 says at each product that it computes in fp16

WARM = 0.2  # share of the rounds after which growth is counted: caches fill, and the allocator settles
MEMORY = 8 * 2**20  # bytes of growth that are noise of the allocator


@dataclass(frozen=True)
class Size:
    """What a process must not gather."""

    memory: int
    open_files: int
    threads: int
    objects: int
    files: int

    @classmethod
    def now(cls, folder: Path) -> Size:
        """Measure this process, and count the files below a folder."""
        for _ in range(2):  # what a finalizer frees is collected by the next pass
            gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = sum(len(names) for _, _, names in os.walk(folder))
        memory = pages * os.sysconf("SC_PAGE_SIZE")
        return cls(memory, len(os.listdir("/proc/self/fd")), threading.active_count(), len(gc.get_objects()), files)

    def growth(self, before: Size) -> dict[str, int]:
        return {name: value - getattr(before, name) for name, value in vars(self).items()}


def check_growth(growth: dict[str, int], rounds: int) -> None:
    """Refuse growth. A model or a Trainer consists of hundreds of objects."""
    least = {"memory": MEMORY, "objects": max(64, rounds)}  # others: 1
    grown = {name: value for name, value in growth.items() if value >= least.get(name, 1)}
    assert not grown, f"the process grew in {rounds} rounds: {grown}"


def repeat(rounds: int, once: Callable[[], object], folder: Path) -> dict[str, int]:
    """Call a function over and over. Return by how much the process grew after the warm-up."""
    warm = max(1, int(rounds * WARM))
    for _ in range(warm):
        once()
    before = Size.now(folder)
    for _ in range(rounds - warm):
        once()
    growth = Size.now(folder).growth(before)
    check_growth(growth, rounds - warm)
    return growth


# Cycles.


def bits(model: nn.Module) -> dict[str, Any]:
    """Return what a model is: its tensors to the bit, its classes and its hooks."""
    tensors = {
        f"{name}/{number}": as_bits(plain)
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
        for number, plain in enumerate(plain_tensors(value))
    }
    return {"tensors": tensors, "classes": [type(module) for module in model.modules()], "hooks": hooks(model)}


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor; of a packed one of torchao's, what it consists of."""
    parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    for part in parts:
        yield from plain_tensors(getattr(tensor, part))
    if not parts:
        yield tensor


def hooks(model: nn.Module) -> Counter[str]:
    """Count the hooks of a model's modules, and the attributes of its modules."""
    found = Counter[str]()
    for module in model.modules():
        found.update({name: len(value) for name, value in vars(module).items() if name.endswith("hooks")})
        found.update(vars(module).keys())
    return found


def same(mine: dict[str, Any], other: dict[str, Any]) -> bool:
    one, two = mine["tensors"], other["tensors"]
    equal = one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    return equal and mine["classes"] == other["classes"] and mine["hooks"] == other["hooks"]


@dataclass(frozen=True)
class Base:
    """A model that stays in memory, its input, what is adapted, and how it merges."""

    model: nn.Module
    x: Tensor
    targets: tuple[str, ...]
    quantized: Any = None


def bases() -> dict[str, Base]:
    ids, found = torch.tensor([[1, 2, 3], [4, 5, 10]]), dict[str, Base]()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.manual_seed(3)
        found[str(dtype)] = Base(TinyModel().to(dtype).eval(), ids, ("q_proj", "v_proj", "mlp"))
    for how, merging in (("nf4", "dequantize"), ("torchao-nf4", "requantize"), ("torchao-int8", "dequantize"), ("int8", "requantize")):
        found[how] = Base(packed_stack(how).eval(), inputs(), ("up", "down"), merging)
    return found


VARIANTS = ("plain", "dora", "lora_fa", "vera")  # AdaLoRA's file is one of plain LoRA, rounded


def cycle(base: Base, variant: str, folder: Path) -> None:
    """Adapt, save, merge, unmerge, unload, load, merge, save, unload: the base and the outputs are the same to the bit."""
    model, start = base.model, bits(base.model)
    config = LoRAConfig(rank=4, variant=variant, target_modules=list(base.targets))
    with torch.no_grad():
        fill(apply_lora(model, config=config), std=0.1).eval()
        output = as_bits(model(base.x))
        save_adapter(model, folder, overwrite=True)
        merge_lora(model, quantized=base.quantized)
        assert torch.isfinite(model(base.x)).all()
        unmerge_lora(model)
        assert torch.equal(as_bits(model(base.x)), output)
        unload_lora(model)
        assert same(bits(model), start)
        load_adapter(model, folder).eval()
        assert torch.equal(as_bits(model(base.x)), output)
        merge_lora(model, quantized=base.quantized)
        save_adapter(model, folder, overwrite=True)
        unload_lora(model, merged="drop")
        assert same(bits(model), start)


def cycles(count: int, root: Path) -> tuple[int, dict[str, int]]:
    """Do at least this many cycles, over every base with every variant. Return how many were done, and the growth."""
    pairs = list(itertools.product(VARIANTS, bases().values()))[: max(1, count // 2)]
    rounds = max(2, -(-count // len(pairs)))
    for _, base in pairs:
        base.model.requires_grad_(False)  # as unloading leaves it
        with torch.no_grad():
            base.model(base.x)  # bitsandbytes' int8 finishes its state in the first forward pass

    def once() -> None:
        for number, (variant, base) in enumerate(pairs):
            cycle(base, variant, root / f"adapter{number}")

    return rounds * len(pairs), repeat(rounds, once, root)


# Fits.


class Towers(LitNet):
    """Two networks with an adapter each."""

    def __init__(self) -> None:
        super().__init__()
        self.other = make_net()

    def step(self, batch: Any) -> Tensor:
        assert self.net is not None
        return nn.functional.cross_entropy(self.net(batch[0]) + self.other(batch[0]), batch[1])


def fit(model: LitNet, folder: Path, *callbacks: LoRACallback, epochs: int = 1, ckpt: Path | None = None) -> weakref.ref[Any]:
    keep = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    torch.manual_seed(0)
    run = trainer(folder, *callbacks, keep, max_epochs=epochs)
    run.fit(model, ckpt_path=ckpt)
    return weakref.ref(run)


def merges_at_the_end(folder: Path) -> tuple[LitNet, list[Any]]:
    model = LitNet()
    return model, [fit(model, folder, LoRACallback(CONFIG))]


def resumes(folder: Path) -> tuple[LitNet, list[Any]]:
    first, model = LitNet(), LitNet()
    runs = [
        fit(first, folder, LoRACallback(CONFIG, merge_on_fit_end=False)),
        fit(model, folder, LoRACallback(CONFIG), epochs=2, ckpt=folder / "last.ckpt"),
    ]
    model.losses = first.losses + model.losses
    return model, runs


def two_adapters(folder: Path) -> tuple[LitNet, list[Any]]:
    model, dora = Towers(), LoRAConfig(rank=3, variant="dora", target_modules=["fc1"])
    return model, [fit(model, folder, LoRACallback(CONFIG, module="net"), LoRACallback(dora, module="other"))]


def unloads_between(folder: Path) -> tuple[LitNet, list[Any]]:
    model = LitNet()
    first = fit(model, folder, LoRACallback(CONFIG))
    unload_lora(model, merged="drop")
    return model, [first, fit(model, folder, LoRACallback(LoRAConfig(rank=3, target_modules=["fc1"])))]


#: Each with the number of its fits.
FITS: dict[Callable[[Path], tuple[LitNet, list[Any]]], int] = {merges_at_the_end: 1, resumes: 2, two_adapters: 1, unloads_between: 2}


def fits(count: int, root: Path) -> tuple[int, dict[str, int]]:
    """Do at least this many fits. Return how many were done, and the growth."""
    first: dict[str, list[float]] = {}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def once() -> None:
        alive: list[weakref.ref[Any]] = []
        for scenario in FITS:
            model, runs = scenario(root / scenario.__name__)
            unload_lora(model, merged="drop")
            losses = first.setdefault(scenario.__name__, model.losses)
            assert model.losses == losses and losses, scenario.__name__
            fresh = type(model)()
            assert not fresh.hparams  # which Lightning reads too, and then keeps
            assert [type(module) for module in model.modules()] == [type(module) for module in fresh.modules()]
            left = hooks(model) - hooks(fresh)
            assert not left, f"{scenario.__name__} leaves {left}"
            alive += [weakref.ref(model), *runs]
        del model, fresh
        gc.collect()
        assert not any(ref() for ref in alive), "a model or a trainer stays in memory"
        assert {number: signal.getsignal(number) for number in handlers} == handlers

    rounds = max(2, -(-count // sum(FITS.values())))
    return rounds * sum(FITS.values()), repeat(rounds, once, root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=2000)
    parser.add_argument("--fits", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, quiet():
        tempfile.tempdir = folder  # so that what is left there is counted too
        for name, run, count in (("cycles", cycles, args.cycles), ("fits", fits, args.fits)):
            begun = time.perf_counter()
            done, growth = run(count, Path(folder, name))
            grown = ", ".join(f"{what} {by:+,}" for what, by in growth.items())
            print(f"{done:,} {name} in {time.perf_counter() - begun:.0f} s, after the first {WARM:.0%}: {grown}", flush=True)


if __name__ == "__main__":
    main()
