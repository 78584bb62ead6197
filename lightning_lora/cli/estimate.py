"""`estimate`: the memory and the time of a training step, from a model's configuration or a run's config, without weights or a GPU."""

from __future__ import annotations

import re
from typing import Any

import torch

from lightning_lora import LoRAConfig
from lightning_lora.cli.console import print_json, print_pairs
from lightning_lora.cli.inspect_rows import CONFIGS
from lightning_lora.cli.run_rows import RunConfig
from lightning_lora.estimate import Fit, Setting, estimate_memory, estimate_seconds, largest_fit
from lightning_lora.estimate.memory import GIB
from lightning_lora.tasks.hf import skeleton
from lightning_lora.utils.messages import counted

_UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20}
_MEMORY = re.compile(r"(\d+(?:\.\d+)?) ?(GiB|GB|MiB)")
ALL = LoRAConfig(target_modules="all-linear")


def estimate(
    path: str,
    gguf_file: str | None = None,
    lora: LoRAConfig = ALL,
    batch: int | None = None,
    length: int | None = None,
    precision: str | None = None,
    quantize: str | None = None,
    compile: bool = False,
    cuda_graphs: bool = False,
    chunked_loss: bool = True,
    checkpointing: str | None = None,
    offload: str | list[str] | None = None,
    strategy: str | None = None,
    devices: int | None = None,
    fits: str | None = None,
    device: str = "h200",
    json: bool = False,
) -> None:
    """Print the peak memory of a training step, its parts, and the seconds it takes. No weights are loaded.

    Args:
        path: A model (a hub id or a folder) or a run's config (.yaml), whose values hold where no option is given.
        gguf_file: A GGUF file in the model's folder.
        lora: The adapters; by default rank 8 on all linears, or the run's.
        batch: Rows a device (8).
        length: Tokens a row (1024).
        precision: 32-true, bf16-true (the default), 16-true, bf16-mixed or 16-mixed.
        quantize: The base's format, such as nf4 or fp8.
        compile: Blocks are compiled.
        cuda_graphs: They are recorded as CUDA graphs.
        chunked_loss: The loss is computed in chunks, as the tasks do where they can.
        checkpointing: full or selective.
        offload: activations, frozen, or [activations, frozen].
        strategy: single, ddp or lora_fsdp2.
        devices: How many.
        fits: A memory, such as 24GiB: print what fits into it.
        device: What computes: h200, h100, a100, 4090, l4 or cpu, whose time is not estimated.
        json: Print JSON.

    Raises:
        ValueError: An option or a config is wrong, or the model is not one of text.
    """
    memory = _bytes(fits) if fits is not None else None
    given = {
        "batch": batch, "length": length, "precision": precision, "quantize": quantize, "compiled": compile or None,
        "recorded": cuda_graphs or None, "chunked_loss": chunked_loss, "checkpointing": checkpointing,
        "offload": _names(offload) or None,
        "strategy": strategy,
        "devices": devices,
    }  # fmt: skip
    config: LoRAConfig | None = lora
    task = dtype = None
    options: dict[str, Any] = {}
    if path.endswith(CONFIGS):
        path, gguf_file, task, dtype, config, options = _of_run(path, gguf_file, lora)
    setting = Setting(**{**options, **{name: value for name, value in given.items() if value is not None}})
    model = skeleton(path, gguf_file, task)
    if dtype is not None:
        model.to(dtype)
    found = estimate_memory(model, config, setting)
    seconds = estimate_seconds(model, config, setting, device)
    fit = largest_fit(model, config, setting, memory) if memory is not None else None
    if json:
        print_json({
            "setting": vars(setting), "bytes": {**found.parts(), "peak": found.peak}, "device": device, "seconds": seconds,
            "fits": None if fit is None else {"batch": fit.batch, "length": fit.length, "knobs": fit.knobs, "peak": fit.estimate.peak},
        })  # fmt: skip
        return
    print_pairs({name: f"{size / GIB:.2f} GiB" for name, size in {**found.parts(), "peak": found.peak}.items()})
    untold = f"the time of {setting.precision} on {device} is not estimated"
    time = untold if seconds is None else f"{seconds[0]:.3g} to {seconds[1]:.3g} s a batch on {device}"
    print(f"\n{setting.batch} × {setting.length} tokens a device; {time}")
    if fit is not None:
        print(_told(fit, setting, str(fits)))


def _told(fit: Fit, setting: Setting, memory: str) -> str:
    """Return what fits, in words."""
    lines = [f"in {memory}: {counted(fit.batch, 'row')} of {setting.length} tokens, or {counted(setting.batch, 'row')} of {fit.length}"]
    if fit.knobs is None:
        lines.append(
            f"{setting.batch} × {setting.length} does not fit with anything turned on; take fewer or shorter rows, or more devices"
        )
    elif fit.knobs:
        lines.append(f"{setting.batch} × {setting.length} fits with {', '.join(fit.knobs)}: {fit.estimate.peak / GIB:.2f} GiB")
    else:
        lines.append(f"{setting.batch} × {setting.length} fits")
    return "\n".join(lines)


def _bytes(text: str) -> float:
    match = _MEMORY.fullmatch(text)
    if match is None or not float(match[1]):
        raise ValueError(f"fits={text!r} is not a memory, such as 24GiB; the units are {', '.join(_UNITS)}")
    return float(match[1]) * _UNITS[match[2]]


def _of_run(
    path: str, gguf_file: str | None, lora: LoRAConfig
) -> tuple[str, str | None, str | None, Any, LoRAConfig | None, dict[str, Any]]:
    """Return what a run's config says: model, GGUF file, class, the weights' dtype, adapters, and fields of the setting."""
    run = RunConfig(["--config", path])
    arguments, callback, trainer = run.model_arguments, run.config.lora, run.config.trainer
    name = arguments.get("model")
    if not isinstance(name, str):
        raise ValueError(f"{path}: {run.task.__name__} names no model; estimate knows runs of the package's tasks")
    config = None if run.config.full_finetuning else lora
    if config is ALL or config == ALL:
        config = LoRAConfig(**vars(callback.config)) if callback.config is not None else LoRAConfig()
    rows = vars(run.config.data.get("init_args", {})) if run.config.get("data") else {}
    offload = callback.get("offload")
    options = {
        "batch": rows.get("batch_size"),
        "length": rows.get("max_length"),
        "precision": _precision(trainer.precision),
        "quantize": callback.get("quantize"),
        "compiled": callback.get("compile") is not None,
        "recorded": bool(callback.get("cuda_graphs")),
        "checkpointing": callback.get("checkpointing") or ("full" if arguments.get("gradient_checkpointing") else None),
        "offload": _names(offload),
    }
    if (devices := _count(trainer.devices) * int(trainer.num_nodes)) > 1:
        options |= {"devices": devices, "strategy": _strategy(trainer.strategy)}
    dtype = getattr(torch, str(arguments.get("dtype")), None)
    return (
        name, gguf_file or arguments.get("gguf_file"), getattr(run.task, "auto_class", None), dtype, config,
        {key: value for key, value in options.items() if value is not None},
    )  # fmt: skip


def _names(given: str | list[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


def _count(devices: Any) -> int:
    """Return how many devices of a node a Trainer is given; 1 for as many as there will be."""
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, list):
        return len(devices)
    return max(1, int(devices)) if str(devices).lstrip("-").isdecimal() else 1


def _strategy(given: Any) -> str:
    """Return the name of a strategy of several devices.

    Raises:
        ValueError: It splits layers among devices.
    """
    if isinstance(given, str):
        return "ddp" if given == "auto" or given.startswith("ddp") else given
    name, options = given.class_path.rpartition(".")[2], given.get("init_args", {})
    if options.get("tensor_parallel_size") not in (None, 1):
        size = options.get("tensor_parallel_size")
        raise ValueError(f"tensor_parallel_size={size!r}: estimate does not know how splitting layers divides activations; give 1")
    return {"LoRAFSDP2Strategy": "lora_fsdp2", "DDPStrategy": "ddp"}.get(name, name)


def _precision(given: Any) -> str:
    """Return the precision by its full name, which Lightning has several of."""
    short = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
    return short.get(str(given), str(given))
