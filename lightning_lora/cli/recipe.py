"""Choose the values of a config from a model and its data, each with the reason beside it.

The rules for rank and batch are those of "LoRA Without Regret" (Thinking Machines, 2025): LoRA learns like full fine-tuning on all linears
while its parameters can hold what the data teaches, and it bears large batches less well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from lightning_lora import find_targets, tasks
from lightning_lora.cli.run_rows import RunConfig
from lightning_lora.config import LoRAConfig
from lightning_lora.data.formats import to_record
from lightning_lora.data.images import ENDINGS
from lightning_lora.data.reading import read_rows
from lightning_lora.data.records import NothingToLearn
from lightning_lora.data.splits import share_of
from lightning_lora.ops.cross_entropy import IGNORE
from lightning_lora.optim.advice import HALF, multiplies_half_slowly
from lightning_lora.tasks.hf import check_writes, load_config, skeleton
from lightning_lora.tasks.model_source import check_there

# What rows are for: type of record → task.
TASKS = {
    "Conversation": "CausalLMTask",
    "PlainText": "CausalLMTask",
    "Labelled": "SequenceClassificationTask",
    "Tagged": "TokenClassificationTask",
    "LabelledImage": "ImageClassificationTask",
    "Pair": "DPOTask",
}
LOOKED_AT = 1000  # rows whose type is read
QUANTILE = 0.99  # of the rows are not cut
MULTIPLE = 64  # of which max_length is one
BATCH = 16  # rows per optimizer step
TOKENS = {"cuda": 8192, "cpu": 2048}  # per batch, at most
RANKS = (8, 16, 32, 64, 128)
TOKENS_PER_PARAMETER = 2  # a parameter holds about two bits, a learnt token brings about one
EPOCHS = ((2_000, 3), (20_000, 2))  # fewer rows than this → passes
SHARES = ((50, None), (500, 0.1))  # fewer rows than this → share for validation
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LARGE = 0.6  # share of a GPU's memory above which a 16-bit base is packed


@dataclass(frozen=True)
class Seen:
    """What was seen of a model and its data.

    Attributes:
        lengths: Tokens of each row, sorted.
        learnt: Tokens or labels that are learnt.
        context: Longest input of the model, in tokens; None if its config does not say.
        parameters: Of the model.
        per_rank: Parameters of an adapter of rank 1 on the targets.
        device: "cuda" or "cpu".
        targets: What LoRA adapts: all linears, or the convolutions of a model that has no others.
        slow: The weights have a dtype that the device multiplies slowly.
    """

    lengths: list[int]
    learnt: int
    context: int | None
    parameters: int
    per_rank: float
    device: str
    targets: str | list[str] = "all-linear"
    slow: bool = False


def recipe(model: str, data: str, task: str | None, val: str | None, gguf_file: str | None) -> str:
    """Return the text of a config; see `lightning_lora.cli.init.init`."""
    check_there(model, gguf_file)
    task = task or task_of(model, data, gguf_file)
    seen = _look(model, data, None if share_of(val) is not None else val, task, gguf_file)
    length, rank = max_length(seen), lora_rank(seen)
    size = batch_size(length, seen.device)
    share = val if val is not None else _by_rows(SHARES, len(seen.lengths), 0.05)
    epochs = _by_rows(EPOCHS, len(seen.lengths), 1)
    cut = sum(n > length for n in seen.lengths)
    steps = math.ceil(len(seen.lengths) / BATCH) * epochs
    model_values: list[tuple[str, Any, str]] = [
        ("model", model, f"{seen.parameters / 1e6:,.{1 if seen.parameters < 1e7 else 0}f} M parameters")
    ]
    model_values += [("gguf_file", gguf_file, "")] if gguf_file else []
    model_values += [("dtype", "float32", "this processor multiplies the weights' own dtype more slowly")] if seen.slow else []
    model_values += [("learning_rate", "auto", "from the method, its scaling and the model's width; the log says which")]
    what = "labels" if "Classification" in task else "tokens"
    data_values: list[tuple[str, Any, str]] = [("train", data, f"{len(seen.lengths):,} rows, {seen.learnt:,} {what} to learn")]
    data_values += [] if share is None else [("val", _number(share), "share of the training rows, drawn by the seed" * (val is None))]
    if seen.lengths[-1] > 1:
        fit = f"{1 - cut / len(seen.lengths):.1%} of the rows fit; the longest has {seen.lengths[-1]:,} tokens"
        data_values += [("max_length", length, fit)]
        data_values += [("batch_size", size, f"at most {TOKENS[seen.device]:,} tokens per batch on this machine")]
    else:  # images, which have no length
        data_values += [("batch_size", size, "")]
    held = f"{rank * seen.per_rank:,.0f} parameters for {seen.learnt:,} learnt {what}"
    why = "better than attention alone at any rank" if seen.targets == "all-linear" else "its convolutions: it has no other linears"
    lora = [("rank", rank, held), ("alpha", 2 * rank, ""), ("target_modules", seen.targets, why)]
    trainer = [
        ("max_epochs", epochs, f"about {steps:,} steps"),
        ("accumulate_grad_batches", max(1, BATCH // size), f"{BATCH} rows per step: LoRA bears large batches less well"),
        ("gradient_clip_val", 1.0, ""),
        ("log_every_n_steps", min(5, steps // epochs), ""),
    ]
    packed = _packed(seen)
    lines = ["# Written by `lightning-lora init`. Run it: lightning-lora fit --config FILE; see its rows: lightning-lora inspect FILE"]
    lines += ["seed_everything: 0", *_class_block("model", tasks, task, model_values), "data:", *_lines(data_values, 2), "lora:"]
    lines += _lines([("quantize", "nf4", packed)], 2) if packed else []
    lines += ["  config:", *_lines(lora, 4), "trainer:", *_lines(trainer, 2)]
    return "\n".join(lines) + "\n"


def max_length(seen: Seen) -> int:
    """Return the length that most rows do not exceed, a multiple of ``MULTIPLE`` within the model's context."""
    quantile = seen.lengths[math.ceil(QUANTILE * len(seen.lengths)) - 1]
    return min(-(-quantile // MULTIPLE) * MULTIPLE, seen.context or quantile + MULTIPLE)


def batch_size(length: int, device: str) -> int:
    """Return the largest power of two, up to ``BATCH``, whose rows fit into a batch."""
    return 2 ** int(math.log2(min(BATCH, max(1, TOKENS[device] // length))))


def lora_rank(seen: Seen) -> int:
    """Return the smallest rank whose adapter can hold what the rows teach."""
    needed = seen.learnt / TOKENS_PER_PARAMETER / seen.per_rank
    return next((rank for rank in RANKS if rank >= needed), RANKS[-1])


def _look(model: str, data: str, val: str | None, task: str, gguf_file: str | None) -> Seen:
    words = [f"--model={task}", f"--model.model={model}", f"--data.train={data}", f"--data.max_length={10**9}"]
    words += [f"--data.val={val}"] if val is not None else []
    run = RunConfig(words + ([f"--model.gguf_file={gguf_file}"] if gguf_file else []))
    examples = run.rows().examples["train"]
    lengths = sorted(int(length) for length in examples.lengths)
    labels = [getattr(example, "labels", None) for example in examples]
    learnt = sum(sum(label != IGNORE for label in each) if isinstance(each, list) else 1 for each in labels)
    auto_class, config = getattr(run.task, "auto_class", "AutoModelForCausalLM"), load_config(model, gguf_file)
    check_writes(auto_class, model, config)  # the task may be a user's choice
    network = skeleton(model, gguf_file, auto_class)
    targets = _targets(network)
    report = find_targets(network, LoRAConfig(rank=1, target_modules=targets, modules_to_save=[]))
    text = config.get_text_config()
    context, device = getattr(text, "max_position_embeddings", None), "cuda" if torch.cuda.is_available() else "cpu"
    slow = gguf_file is None and config.dtype in HALF and multiplies_half_slowly(device)  # a GGUF file is unpacked to float32
    return Seen(lengths, learnt, context, report.total, report.parameters, device, targets, slow)


def _targets(network: nn.Module) -> str | list[str]:
    """Return what LoRA adapts: all linears, or the convolutions of a network that has no linear below its head."""
    try:
        find_targets(network, LoRAConfig(rank=1, target_modules="all-linear"))
    except ValueError:
        names = sorted({name.rpartition(".")[2] for name, module in network.named_modules() if isinstance(module, CONVOLUTIONS)})
        if not names:
            raise
        return names
    return "all-linear"


def task_of(model: str, data: str, gguf_file: str | None) -> str:
    """Return the task that the rows are for. A model with an encoder and a decoder writes texts from texts.

    Raises:
        ValueError: A row is malformed, or the rows are for a model that writes and this one does not.
    """
    kinds = []
    if Path(data).is_dir() and any(file.suffix.lower() in ENDINGS for file in Path(data).rglob("*")):
        return "ImageClassificationTask"
    rows = list(islice(read_rows(data, "train"), LOOKED_AT))
    for place, row in rows:
        try:
            kinds.append(type(to_record(row)).__name__)
        except NothingToLearn:
            continue
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    if not kinds:
        raise ValueError(f"data={data!r} is empty; it needs at least one row")
    name, config = TASKS[max(set(kinds), key=kinds.count)], load_config(model, gguf_file)
    if name == "CausalLMTask" and getattr(config, "is_encoder_decoder", False):
        name = "Seq2SeqTask"
    check_writes(getattr(tasks, name).auto_class, model, config)
    return name


def _packed(seen: Seen) -> str | None:
    """Return why the base should be packed, None if it fits in 16 bits."""
    if seen.device != "cuda":
        return None
    memory = torch.cuda.get_device_properties(0).total_memory
    size = 2 * seen.parameters
    return f"{size / 2**30:.0f} GiB in 16 bits, of {memory / 2**30:.0f} GiB" if size > LARGE * memory else None


def _by_rows(table: Sequence[tuple[int, Any]], rows: int, otherwise: Any) -> Any:
    return next((value for limit, value in table if rows < limit), otherwise)


def _number(value: Any) -> Any:
    try:
        return float(value)
    except ValueError:
        return value


def _class_block(key: str, home: Any, name: str, values: list[tuple[str, Any, str]]) -> list[str]:
    """Return the lines of a class and its arguments; the default class needs no name."""
    if name == "CausalLMTask":
        return [f"{key}:", *_lines(values, 2)]
    path = f"{home.__name__}.{name}" if hasattr(home, name) else name
    return [f"{key}:", f"  class_path: {path}", "  init_args:", *_lines(values, 4)]


def _lines(values: Sequence[tuple[str, Any, str]], indent: int) -> list[str]:
    lines = [(f"{' ' * indent}{name}: {_scalar(value)}", reason) for name, value, reason in values]
    return [f"{line}  # {reason}" if reason else line for line, reason in lines]


def _scalar(value: Any) -> str:
    """Return a value as YAML, of which JSON is a part. Plain words need no quotes."""
    if isinstance(value, float):
        mantissa, mark, exponent = f"{value:g}".partition("e")  # YAML reads 1e-3 as text, and 1.0e-3 as a number
        return f"{mantissa if '.' in mantissa or not mark else f'{mantissa}.0'}{mark}{exponent}"
    plain = isinstance(value, str) and value.replace("-", "").replace("_", "").isalnum() and not value[0].isdigit()
    return value if plain and yaml.safe_load(value) == value else json.dumps(value, ensure_ascii=False)  # "no" is false
