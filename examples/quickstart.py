"""LoRA-tune a real language model on real data, in minutes on two CPU cores: ``make quickstart``.

Everything goes through `LoRACLI` and ``configs/quickstart.yaml``, so it is what ``lightning-lora fit --config ...`` does, with a test
before and after. SmolLM2-135M-Instruct learns to name the type of answer that a question asks for (six words to choose from).

Accuracy is the model's choice: greedy decoding that may write nothing but the six words. The prompt lists them, and before and after
are scored alike. The learning rate was chosen on the validation split; the test split is only read for the two numbers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from question_types import cache_folder, fetch, read_questions, write_splits

from lightning_lora import get_lora_parameters, merge_lora, save_adapter, unmerge_lora
from lightning_lora.cli.lightning_cli import LoRACLI
from lightning_lora.cli.loss_picture import draw_loss
from lightning_lora.storage.room import check_room

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "quickstart.yaml"


def main(argv: list[str] | None = None) -> None:
    """Fetch, then run, or sweep the learning rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=fast_dtype(), help="of the base weights (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quickstart", help="folder of the results (%(default)s)")
    parser.add_argument("--sweep", type=float, nargs="+", metavar="LR", help="only compare learning rates on the validation split")
    options = parser.parse_args(argv)

    started = time.perf_counter()
    cache = cache_folder()
    model, questions = fetch(cache)
    splits = write_splits(read_questions(questions), cache)
    overrides = [f"--data.{split}={file}" for split, file in splits.items()]
    overrides += [f"--model.model={model.parent}", f"--model.gguf_file={model.name}", f"--model.dtype={options.dtype}"]
    if options.sweep:
        for rate in options.sweep:
            print(f"learning_rate {rate:g}: val_accuracy {sweep(rate, overrides, options.out):.4f}", flush=True)
        return
    report(run(overrides, options.out, started), options.out)


def fast_dtype() -> str:
    """bfloat16 where the processor multiplies it in hardware, about three times as fast as float32; without, it is far slower."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def build(overrides: list[str], out: Path) -> LoRACLI:
    """Model, data and trainer of the config, writing to ``out``, which is cleared of an earlier run."""
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    (out / "metrics.csv").unlink(missing_ok=True)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the rows are in memory, encoded
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists")  # it was just cleared of what would be lost
    places = ["--trainer.logger.init_args.save_dir", "--trainer.logger.init_args.name", "--trainer.callbacks.init_args.dirpath"]
    outputs = [f"{key}={value}" for key, value in zip(places, [out.parent, out.name, out / "checkpoints"], strict=True)]
    return LoRACLI(["--config", str(CONFIG), *outputs, *overrides], run=False)


def sweep(rate: float, overrides: list[str], out: Path) -> float:
    """The best validation accuracy with a learning rate."""
    cli = build([*overrides, f"--model.learning_rate={rate}"], out.with_name(f"{out.name}-sweep"))
    cli.trainer.fit(cli.model, cli.datamodule)
    return float(cli.trainer.checkpoint_callback.best_model_score)


def run(overrides: list[str], out: Path, started: float) -> dict:
    """Test, train, test; leave the adapter, the loss curve and ``summary.json`` in ``out``."""
    check_room(out / "adapter", 0, "--out")  # it is written at the end
    cli = build(overrides, out)
    task, data, trainer = cli.model, cli.datamodule, cli.trainer
    clock = {"prepare": time.perf_counter() - started}

    def timed(phase: str, function, *args, **kwargs):
        begun = time.perf_counter()
        result = function(*args, **kwargs)
        clock[phase] = time.perf_counter() - begun
        return result

    before = timed("test before", trainer.test, task, data, verbose=False)[0]
    said_before = [row for batch in trainer.predict(task, data) for row in batch]
    timed("fit", trainer.fit, task, data)
    after = timed("test after", trainer.test, task, data, ckpt_path="best", verbose=False)[0]
    said_after = [row for batch in trainer.predict(task, data) for row in batch]

    folder = save_adapter(task, out / "adapter", overwrite=True)
    draw_loss(out / "metrics.csv", out / "loss.png")
    parameters = list(task.model.parameters())
    answers = Counter(tuple(e.answer) for e in data.examples["test"])
    summary = {
        "metric": f"accuracy on {len(data.examples['test'])} test questions",
        "before": before["test_accuracy"],
        "after": after["test_accuracy"],
        "always_the_most_frequent": answers.most_common(1)[0][1] / answers.total(),
        "validation": float(trainer.checkpoint_callback.best_model_score),
        "trainable": sum(p.numel() for p in get_lora_parameters(task)),
        "total": sum(p.numel() for p in parameters),
        "adapter_bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "model_bytes": sum(p.numel() * p.element_size() for p in parameters) - sum(p.nbytes for p in get_lora_parameters(task)),
        "merge_max_abs_diff": merge_difference(task, data.predict_dataloader()),
        "dtype": task.hparams["dtype"],
        "learning_rate": task.hparams["learning_rate"],
        "answers": [{**row, "after": later["response"]} for row, later in zip(said_before, said_after, strict=True)],
        "phases": {name: round(value, 1) for name, value in clock.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


@torch.no_grad()
def merge_difference(task, prompts) -> float:
    """Largest difference between merged and unmerged logits, in float32, so that it shows the merge and not bfloat16's rounding."""
    model = task.model.cpu().float().eval()
    batch = {key: value for key, value in next(iter(prompts)).items() if key != "prompts"}
    unmerged = model(**batch).logits
    merged = merge_lora(model)(**batch).logits
    unmerge_lora(model)
    return (merged - unmerged).abs().max().item()


def report(summary: dict, out: Path) -> None:
    """Print what happened and where it is."""
    print(f"\n{summary['metric']}: {summary['before']:.1%} before, {summary['after']:.1%} after")
    for row in summary["answers"]:
        print(f"  {row['prompt']}\n    before: {' '.join(row['response'].split())!r}\n    after:  {row['after']!r}")
    print(f"trained {summary['trainable']:,} of {summary['total']:,} parameters ({summary['trainable'] / summary['total']:.2%})")
    print(f"the adapter has {summary['adapter_bytes'] / 1e6:.1f} MB, the model {summary['model_bytes'] / 1e6:.0f} MB ({summary['dtype']})")
    print(f"merged and unmerged logits differ by at most {summary['merge_max_abs_diff']:.1e} (in float32)")
    print(f"{summary['seconds']:.0f} s: {', '.join(f'{name} {value:.0f}' for name, value in summary['phases'].items())}")
    print(f"results in {out}: summary.json, adapter/, checkpoints/, metrics.csv, loss.png")


if __name__ == "__main__":
    main()
