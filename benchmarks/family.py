"""What each member of the family gives and costs: the quickstart's model and data, one short run each from its YAML, a markdown table.

A member is a few lines in ``configs/`` on top of the quickstart's, and runs as ``lightning-lora fit --config configs/quickstart.yaml
--config configs/dora.yaml`` does, in a process of its own, so that its peak memory is its own. One that fails prints its error, the rest
go on, and the exit code is 1.

    python benchmarks/family.py                    # 40 steps each, 200 test questions
    python benchmarks/family.py --members quickstart galore full --steps 200
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MEMBERS = ["quickstart", "lora_plus", "rslora", "lora_fa", "dora", "adalora", "qlora", "galore", "full"]
# Most members' settings fit the tests' model of width 32; these do not.
TINY = {"galore": ["--model.galore.rank=4", "--model.galore.update_proj_gap=2"], "rslora": ["--lora.config.rank=8"]}
BATCH = 8


def arguments(member: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """The command line: the quickstart, what makes it short, and the member's lines last, so that these win."""
    places = tiny_places(folder) if options.tiny else quickstart_places(options.dtype)
    short = {
        "data.batch_size": 3 if options.tiny else BATCH,
        "trainer.max_steps": options.steps,
        "trainer.max_epochs": -1,
        "trainer.limit_val_batches": 0,
        "trainer.limit_test_batches": 2 if options.tiny else max(1, options.questions // BATCH),
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "trainer.callbacks": "[]",  # the quickstart's picks the best checkpoint by validation
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": folder,
    }
    layered = [] if member == "quickstart" else ["--config", str(ROOT / "configs" / f"{member}.yaml")]
    before = [f"--{key}={value}" for key, value in {**places, **short}.items()]
    return ["--config", str(ROOT / "configs" / "quickstart.yaml"), *before, *layered, *(TINY.get(member, []) if options.tiny else [])]


def quickstart_places(dtype: str | None) -> dict[str, Any]:
    """The quickstart's model and data, fetched at the first run."""
    sys.path.insert(0, str(ROOT / "examples"))
    from question_types import cache_folder, fetch, read_questions, write_splits
    from quickstart import fast_dtype

    cache = cache_folder()
    model, questions = fetch(cache)
    splits = write_splits(read_questions(questions), cache)
    places = {"model.model": model.parent, "model.gguf_file": model.name, "model.dtype": dtype or fast_dtype()}
    return {**places, **{f"data.{split}": file for split, file in splits.items()}}


def tiny_places(folder: Path) -> dict[str, Any]:
    """The tests' model and questions."""
    from tests import tiny_lm

    (folder / "model").mkdir()
    model = tiny_lm.save(folder / "model")
    files = {split: tiny_lm.write(folder / f"{split}.jsonl", tiny_lm.rows(6)) for split in ("train", "val", "test", "predict")}
    return {"model.model": model, "model.gguf_file": "null", "model.dtype": "float32", **{f"data.{k}": v for k, v in files.items()}}


def measure(member: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train and test one member in this process."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of calls that are LightningCLI's own
    sys.path.insert(0, str(ROOT))  # this checkout's package, and its tests' model
    import torch
    from lightning.pytorch import Callback

    from lightning_lora.cli.lightning_cli import LoRACLI

    class Clock(Callback):
        """Seconds and losses of the optimizer steps."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []

        def on_train_batch_start(self, *args: Any) -> None:
            self.begun = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            self.seconds.append(time.perf_counter() - self.begun)
            self.losses.append(float(outputs["loss"]))

        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)

        def on_train_end(self, trainer: Any, module: Any) -> None:
            self.state = sum(optimizer_bytes(optimizer) for optimizer in trainer.optimizers)

    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*number of training batches.*|.*log_every_n_steps.*")
    with tempfile.TemporaryDirectory() as folder:
        cli = LoRACLI(arguments(member, options, Path(folder)), run=False)
        clock = Clock()
        cli.trainer.callbacks.append(clock)
        restart_peak()
        cli.trainer.fit(cli.model, cli.datamodule)
        peak = peak_bytes()
        accuracy = cli.trainer.test(cli.model, cli.datamodule, verbose=False)[0]["test_accuracy"]
    last = clock.losses[-max(1, len(clock.losses) // 4) :]
    return {
        "accuracy": accuracy,
        "loss": statistics.mean(last),
        "trainable": clock.trainable,
        "state": clock.state,
        "peak": peak,
        "seconds": statistics.median(clock.seconds[1:] or clock.seconds),
    }


def optimizer_bytes(optimizer: Any) -> int:
    """Of all tensors in an optimizer's state dict."""
    import torch

    leaves = torch.utils._pytree.tree_leaves(optimizer.state_dict()["state"])
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))


def restart_peak() -> None:
    """Forget the peak of loading the model, where Linux allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak of loading cannot be told from training's here", file=sys.stderr)


def peak_bytes() -> int:
    """The process's largest resident size since :func:`restart_peak`."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child(member: str, argv: Sequence[str]) -> dict[str, Any]:
    """Measure in a process of its own; what it says goes to stderr, its figures are its last line, a failure is ``{"error": …}``."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", member, *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    lines = done.stdout.splitlines()
    if lines and lines[-1].startswith("{"):
        return json.loads(lines[-1])
    return {"error": f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}"}


def row(member: str, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"| {member} | failed | | | | | |"
    mib, accuracy = 2**20, f"{result['accuracy']:.1%} | {result['loss']:.3f}"
    sizes = f"{result['trainable']:,} | {result['state'] / mib:.1f} | {result['peak'] / mib:,.0f}"
    return f"| {member} | {accuracy} | {sizes} | {result['seconds']:.3f} |"


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", nargs="+", default=MEMBERS, metavar="NAME", help=f"files of configs/; default {' '.join(MEMBERS)}")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (%(default)s)")
    parser.add_argument("--questions", type=int, default=200, help="test questions (%(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="of the base, for members that do not set it; by processor")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tiny", action="store_true", help="the tests' model and data")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        try:
            print("\n" + json.dumps(measure(options.child, options)))
        except Exception as error:  # whatever it is, it is this member's result
            traceback.print_exc()
            from lightning_lora.cli.main import one_line

            print("\n" + json.dumps({"error": f"{type(error).__name__}: {one_line(error)}"}))
        return 0

    print(f"{options.steps} steps of {3 if options.tiny else BATCH} rows, {options.threads} threads")
    print(
        "| member | accuracy | loss, last quarter | trainable | optimizer state, MiB | peak, MiB | step, s |\n|---|---|---|---|---|---|---|"
    )
    errors = {}
    for member in options.members:
        result = child(member, argv)
        print(row(member, result), flush=True)
        if "error" in result:
            errors[member] = result["error"]
    for member, error in errors.items():
        print(f"\n{member} failed: {error}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
