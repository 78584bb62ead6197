"""`inspect` of a data file or a run's config: how long the rows are, what of them is learnt, and what some of them look like."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from lightning_lora import find_targets
from lightning_lora.cli.checkpoints import SETTINGS
from lightning_lora.cli.console import console, print_json, print_pairs
from lightning_lora.cli.recipe import task_of
from lightning_lora.cli.run_rows import RunConfig
from lightning_lora.config import LoRAConfig
from lightning_lora.data.reading import READERS
from lightning_lora.ops.cross_entropy import IGNORE
from lightning_lora.tasks.hf import skeleton

CONFIGS = (".yaml", ".yml")
SHOWN = 3  # examples
LONGEST = 4000  # characters of an example that are shown
OPEN, CLOSE = "«", "»"  # around what is learnt, where there is no colour
RENAMED = {"--model": "--model.model", "--gguf_file": "--model.gguf_file", "--lora.": "--lora.config."}


def run_words(argv: Sequence[str]) -> list[str] | None:
    """Return the options of a run that ``inspect`` is asked about, None if it is about a model or an adapter.

    Args:
        argv: What follows ``inspect``: a config, a run's folder or a data file, and options of ``fit``. ``--model`` names the model here.
    """
    if not argv or argv[0].startswith("-"):
        return None
    path, options = argv[0], [_as_in_fit(word) for word in argv[1:] if word != "--json"]
    config = Path(path, SETTINGS)
    if config.is_file():
        path = str(config)
    if path.endswith(CONFIGS):
        return ["--config", path, *options]
    if Path(path).suffix in READERS:
        return [f"--data.train={path}", *options]
    if Path(path).is_file() and any(word.partition("=")[0] == "--model.model" for word in options):
        raise ValueError(f"{path!r} has none of the endings of data files: {', '.join(READERS)}; unpack or rename it")
    return None


def inspect_run(words: Sequence[str], as_json: bool) -> None:
    """Print what a run would train on, and what it would adapt.

    Args:
        words: The options of the run.
        as_json: Print JSON.

    Raises:
        ValueError: An option is wrong, or a row is; the message names file and line.
    """
    run = RunConfig(words)
    if "--config" not in words:  # a data file alone: its rows say what they are for
        named = run.model_arguments
        run = RunConfig([f"--model={task_of(named['model'], run.config.data.init_args.train, named.get('gguf_file'))}", *words])
    data = run.rows()
    facts = {split: _facts(examples) for split, examples in data.examples.items()}
    first = next(iter(data.examples.values()))
    shown = [[list(part) for part in data.parts(example)] for example in _some(first)]
    if as_json:
        print_json({"task": run.task.__name__, **facts, "examples": [[{"text": t, "learnt": learnt} for t, learnt in e] for e in shown]})
        return
    for split, numbers in facts.items():
        print(f"{split}: {run.config.data.init_args[split]}")
        print_pairs(numbers)
        print()
    out = console()
    coloured = out.color_system is not None and not out.no_color
    for number, example in enumerate(shown, start=1):
        out.print(Text(f"example {number}, what is learnt is {'green' if coloured else f'between {OPEN} and {CLOSE}'}:", style="bold"))
        out.print(_rendered(example, coloured), soft_wrap=True)
        print()
    if "--config" in words and not run.config.full_finetuning:
        print(find_targets(skeleton(run.model_arguments["model"], run.model_arguments.get("gguf_file"), run.task.auto_class), _lora(run)))


def _facts(examples: Any) -> dict[str, Any]:
    """Return the numbers of a split: rows, tokens, and the share of the tokens that is learnt, where they have labels."""
    lengths = sorted(int(length) for length in examples.lengths)
    if lengths[-1] == 1:  # images
        return {"examples": len(lengths)}
    learnt = total = 0
    for example in examples:
        labels = getattr(example, "labels", ())
        if labels and len(labels) == len(example):
            learnt, total = learnt + sum(label != IGNORE for label in labels), total + len(labels)
    facts = {"examples": len(lengths), "tokens": sum(lengths), "median length": int(statistics.median(lengths))}
    facts |= {"95 % up to": lengths[int(0.95 * (len(lengths) - 1))], "longest": lengths[-1]}
    return facts | ({"learnt tokens": f"{learnt / total:.0%}"} if total else {})


def _some(examples: Any) -> list[Any]:
    """Return the first, the middle and the last example."""
    count = len(examples)
    return [examples[index] for index in sorted({0, count // 2, count - 1})[:SHOWN]]


def _rendered(example: list[list[Any]], coloured: bool) -> Text:
    text = Text()
    for words, learnt in example:
        words = words if len(words) <= LONGEST else f"{words[:LONGEST]} ... ({len(words) - LONGEST:,} more characters)"
        mark = learnt and not coloured
        text.append(f"{OPEN}{words}{CLOSE}" if mark else words, style="green" if learnt else "dim")
    return text


def _lora(run: RunConfig) -> LoRAConfig:
    config = run.config.lora.config
    return LoRAConfig(**vars(config)) if config is not None else LoRAConfig()


def _as_in_fit(word: str) -> str:
    name, equals, value = word.partition("=")
    if name in RENAMED:
        return f"{RENAMED[name]}{equals}{value}"
    return word.replace("--lora.", RENAMED["--lora."], 1) if word.startswith("--lora.") and not word.startswith("--lora.config") else word
