"""The texts of ``--help`` and ``--version``, from Python's library alone: the console script prints them without importing torch.

The training commands have hundreds of options. Their ``--help`` lists the common ones, one line each; tests/cli/test_help.py holds names
and defaults against the parser. The rest is listed by `lightning_lora.cli.group_help`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import metadata

TRACEBACK = "LIGHTNING_LORA_TRACEBACK"
TRAIN = {
    "fit": "train an adapter, or every weight",
    "validate": "evaluate it on the validation data",
    "test": "evaluate it on the test data",
    "predict": "answer the rows of a file, one JSON object per line",
}
SWEEP = {"sweep": "train several adapters over one base: ranks, learning rates, seeds"}
SWEEP_OPTIONS = {
    "--rank R,R,...": "lora.config.rank of the trials; likewise --alpha and --dropout",
    "--learning_rate X,X,...": "model.learning_rate",
    "--seed N,N,...": "seed_everything and data.seed",
    "--trials FILE": "a YAML list instead, such as - {name: a, rank: 4, lora.config.variant: dora}",
    "--folder FOLDER": "where the trials' folders are (runs/sweep); the same again goes on",
    "--at_once N": "trials in memory at most (8)",
    "--side_by_side CHOICE": "auto: one pass for all trials where that is exact; true; false",
    "--monitor NAME": "what trials are compared by, with --mode min or max (val_loss)",
    "--json": "print the results as JSON",
}
VERIFY = {"verify": "check a run's model, data and strategy before it trains: exit code 0 if all is right"}
TOOLS = {
    "init": "look at a model and a data file, and write a config that trains one on the other",
    "inspect": "print what is in a model, an adapter, a data file or a run's config",
    "estimate": "say how much memory and time a training step takes, and what makes it fit",
    "generate": "answer one prompt, or each prompt of a file",
    "chat": "talk to a model",
    "merge": "write a model with its adapter merged in, as a folder for from_pretrained",
    "combine": "write one adapter that adds several, each with a weight",
    "compress": "write an adapter at a lower rank",
    "export": "write an adapter as vLLM, SGLang, llama.cpp, diffusers or PEFT loads it",
}
EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 wrong input, 130 and 143 stopped by Ctrl-C and SIGTERM."
CODE = "A config file runs the classes and functions that it names: take one only from someone whose code you would run."
EXAMPLE = """\
model:
  model: HuggingFaceTB/SmolLM2-135M-Instruct  # a hub id or a folder
  learning_rate: 1.0e-3
data:
  train: train.jsonl  # {"prompt": ..., "response": ...} on each line
  val: val.jsonl
lora:
  config: {rank: 8, target_modules: all-linear}
trainer:
  max_epochs: 1"""
# Group → (option, default, what it is). A default of "" stands for options that are not set.
COMMON = {
    "model": (
        ("--model", "CausalLMTask", "the task, a LightningModule"),
        ("--model.model", "", "a hub id or a folder"),
        ("--model.gguf_file", "", "a GGUF file in it"),
        ("--model.dtype", "auto", "float32, bfloat16, float16, or the checkpoint's own"),
        ("--model.learning_rate", "0.001", "AdamW's, after the warm-up; or auto"),
        ("--model.gradient_checkpointing", "false", "less memory for a third more time"),
    ),
    "data": (
        ("--data", "", "a LightningDataModule; the task's own by default"),
        ("--data.train", "", "training rows; also --data.val, .test, .predict"),
        ("--data.batch_size", "8", "rows per batch and device"),
        ("--data.max_length", "1024", "longest row, in tokens"),
    ),
    "lora": (
        ("--lora.config.rank", "8", "r of B·A"),
        ("--lora.config.alpha", "16.0", "the update is scaled by alpha / rank"),
        ("--lora.config.target_modules", "q_proj, v_proj", "names, regexes or all-linear"),
        ("--lora.config.variant", "plain", "dora, vera, lora_fa, lora_xs"),
        ("--lora.quantize", "", "nf4 (QLoRA) or fp8 packs the base's weights"),
        ("--full_finetuning", "false", "train every weight instead"),
    ),
    "trainer": (
        ("--trainer.max_epochs", "", "passes over the rows; or --trainer.max_steps"),
        ("--trainer.accumulate_grad_batches", "1", "batches per step"),
        ("--trainer.precision", "", "bf16-mixed, bf16-true, ..."),
        ("--trainer.devices", "auto", "with --trainer.strategy ddp, fsdp, lora_fsdp2"),
    ),
}


def run(argv: Sequence[str]) -> int | None:
    """Print what is asked for, and return the exit code; None if ``argv`` asks for something else."""
    text = answer(argv)
    if text is None:
        return None
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head`
        return silenced()
    return 0


def silenced() -> int:
    """Return the exit code of a process whose reader has closed the pipe. Python would report it again as it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def answer(argv: Sequence[str]) -> str | None:
    """Return the text that ``argv`` asks for, None if it asks for something else."""
    command, options = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("-h", "--help"):
        return overview()
    if command == "--version":
        return f"lightning-lora {metadata.version('lightning-lora')}"
    if command in TRAIN and {"-h", "--help"} & set(options):
        return training_help(command)
    if command in SWEEP and {"-h", "--help"} & set(options):
        return sweep_help()
    if command in VERIFY and {"-h", "--help"} & set(options):
        return verify_help()
    return None


def overview() -> str:
    """Return the text of ``lightning-lora --help``."""
    commands = "\n".join(f"  {name:<9} {what}" for name, what in {**TRAIN, **SWEEP, **VERIFY, **TOOLS}.items())
    return (
        f"usage: lightning-lora <command> ...\n\nLoRA for PyTorch Lightning.\n\n{commands}\n\n"
        "`lightning-lora <command> --help` lists a command's options; `lightning-lora --version` prints the version.\n"
        f"--json prints results as JSON. NO_COLOR=1 prints no colour. {TRACEBACK}=1 shows where an error arose.\n"
        f"{CODE}\n{EXIT_CODES}\n\n"
        f"An example of run.yaml, for `lightning-lora fit --config run.yaml`:\n\n{EXAMPLE}"
    )


def sweep_help() -> str:
    """Return the text of ``lightning-lora sweep --help``."""
    lines = ["usage: lightning-lora sweep --config run.yaml --rank 4,8 --learning_rate 1e-4,3e-4 [--option value ...]", ""]
    lines += [
        "Train one adapter for each combination. Each trial is what `fit` with its options is: its own optimizer, schedule, metrics,",
        "early stop and folder. One base is in memory. A trial that is complete is kept; one that was interrupted goes on.",
        "",
        *(f"  {option:<24} {what}" for option, what in SWEEP_OPTIONS.items()),
        "",
        "All options of fit are taken too (`lightning-lora fit --help`), for every trial.",
    ]
    return "\n".join([*lines, EXIT_CODES, CODE])


def verify_help() -> str:
    """Return the text of ``lightning-lora verify --help``."""
    lines = ["usage: lightning-lora verify --config run.yaml [--option value ...]", ""]
    lines += [
        "Check on the run's own model, training data and strategy what `fit` with the same options relies on. Nothing is written.",
        "",
        "  identity at step 0                the adapters change nothing before they train",
        "  gradients reach every adapter     on the first batch",
        "  merged equals unmerged            of each layer and of the model: finds layers that are not W·x",
        "  saved and loaded equal            an adapter folder has all that trains",
        "  the strategy equals one process   two steps on the same global batches; needs the run's devices",
        "",
        "The first four run on one device. A check that cannot run is a row that says why, and the exit code is then 1.",
        "Callbacks other than LoRACallback, loggers, validation and compilation are left out.",
        "",
        "  --json                 print the checks as JSON",
        "",
        "All options of fit are taken (`lightning-lora fit --help`).",
        "Exit codes: 0 all is right, 1 a check failed or could not run, 2 wrong input.",
    ]
    return "\n".join([*lines, CODE])


def training_help(command: str) -> str:
    """Return the text of ``lightning-lora fit --help``."""
    lines = [f"usage: lightning-lora {command} [--config run.yaml] [--option value ...]", "", f"{TRAIN[command].capitalize()}.", ""]
    lines += [
        "  --config FILE          options from a YAML file; what comes later overrides it",
        "  --ckpt_path FILE       a checkpoint to go on from, or to evaluate; `last` finds the last",
        "  --print_config         print the whole configuration, and stop",
        "  --json                 print the results as JSON",
    ]
    for group, options in COMMON.items():
        lines += ["", f"{group}: --{group}.help lists all"]
        lines += [f"  {name:<33} {what}{f' ({default})' if default else ''}" for name, default, what in options]
    return "\n".join([*lines, "", f"--help-all lists every option. {EXIT_CODES}", CODE])
