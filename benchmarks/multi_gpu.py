"""LoRA over several GPUs: step time, memory and traffic of every strategy, a process that is killed, saving; one command.

    python benchmarks/multi_gpu.py                                            # all GPUs, Llama-3-8B's shape, 4 x 2048 tokens a GPU
    python benchmarks/multi_gpu.py --devices 2 --only fsdp2 ddp --parts steps
    python benchmarks/multi_gpu.py --devices 2 --compile --parts fit          # lora_fsdp2 through Trainer.fit, against one GPU through fit
    python benchmarks/multi_gpu.py --shape 70b --parts nf4 --checkpointing    # a 4-bit base under FSDP2, needs bitsandbytes
    python benchmarks/multi_gpu.py --cpu --shape tiny --devices 2             # the same on gloo processes, in seconds

Every line is a measurement, or says why there is none. *frozen* is the same model under the same strategy, forward and backward to the
embedding's output with no adapter; *scaling* is tokens/s over (devices x the unwrapped model's tokens/s on one of them); *loss* is the
first rank's of the last counted step. *moved* counts, on the first rank, the larger of what goes into and what comes out of each
collective: gathered bytes, bytes before they are scattered.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import multi_gpu_models as models
import multi_gpu_runs as runs
import torch
from multi_gpu_workers import Workers


def step_rows(workers: Workers, options: argparse.Namespace, say: Callable[[dict[str, Any]], None]) -> None:
    """The table of strategies."""
    print("| strategy | model | ms | x frozen | tokens/s | scaling | GiB a GPU | loss | collectives | moved, MB |\n" + "|---" * 10 + "|")
    alone: dict[str, float] = {}  # model → tokens/s of one device
    frozen: float | None = None  # milliseconds
    for strategy in ["one", *(name for name in runs.STRATEGIES if name != "one")]:
        if options.only and strategy not in ("one", *options.only):
            continue
        after = strategy.endswith(" after")  # its frozen model is the one before; PEFT has nothing for a model that is sharded already
        frozen = frozen if after else None
        for model in ("ours",) if after else models.MODELS:
            if model not in options.models:
                continue
            row: dict[str, Any] = {"part": "steps", "strategy": strategy, "model": model}
            try:
                ranks = workers.under(runs.VARIABLES.get(strategy, {})).run(runs.measure, strategy, model, options)
            except RuntimeError as error:
                print(f"| {strategy} | {model} | failed: {error} |" + " |" * 7, flush=True)
                say(row | {"failed": str(error)})
                continue
            found = {key: max(rank[key] for rank in ranks if rank) for key in ("ms", "peak_gib", "build_gib")}
            row |= {**ranks[0], **found}
            speed = row["tokens"] / row["ms"] * 1e3
            devices = 1 if strategy == "one" else workers.world
            frozen = row["ms"] if model == "frozen" else frozen
            alone.setdefault(model, speed) if strategy == "one" else None
            row |= {"tokens_per_s": speed, "x_frozen": row["ms"] / frozen if frozen else None}
            row["scaling"] = speed / devices / alone[model] if model in alone else None
            counts = ", ".join(f"{count} {name}" for name, (count, _) in row["traffic"].items()) or "none"
            moved = sum(size for _, size in row["traffic"].values()) / 1e6
            memory = f"{row['peak_gib']:.1f}" if not options.cpu else "not counted"
            ratio, scaling = (f"{row[key]:.{digits}f}" if row[key] else "" for key, digits in (("x_frozen", 2), ("scaling", 3)))
            time_and_speed = f"{row['ms']:.1f} | {ratio} | {speed:,.0f} | {scaling} | {memory} | {row['loss']:.4f}"
            print(f"| {strategy} | {model} | {time_and_speed} | {counts} | {moved:,.1f} |", flush=True)
            if row["profile"]:
                print("  " + ", ".join(f"{kind} {ms:.1f}" for kind, ms in row["profile"].items()), end="; ")
                print(f"launched in {row['launched_ms']:.1f}; by rank {[round(rank['ms'], 1) for rank in ranks if rank]}", flush=True)
            say(row)


def save_rows(workers: Workers, options: argparse.Namespace, say: Callable[[dict[str, Any]], None]) -> None:
    """Seconds and bytes of a save, the model under FSDP2."""
    import multi_gpu_files as files  # Lightning takes seconds to import, in every process

    print("\n| what is saved | seconds | MB |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for what in ("adapter folder", "checkpoint, one file", "checkpoint, DCP"):
            try:
                seconds, size = max(workers.run(files.save, what, folder, options))
            except RuntimeError as error:
                print(f"| {what} | failed: {error} | |", flush=True)
                say({"part": "save", "what": what, "failed": str(error)})
                continue
            print(f"| {what} | {seconds:.3f} | {size / 1e6:.1f} |", flush=True)
            say({"part": "save", "what": what, "seconds": seconds, "bytes": size})


def resume_rows(workers: Workers, options: argparse.Namespace, say: Callable[[dict[str, Any]], None]) -> None:
    """One process is killed; half as many go on from the last checkpoint; then all go on from theirs."""
    import multi_gpu_files as files

    world, fewer = workers.world, max(1, workers.world // 2)
    other = workers if fewer == world else Workers(fewer, options.cpu)
    print("\n| a run of 8 steps, lora_fsdp2 | result |\n|---|---|")

    def told(what: str, result: str, **values: Any) -> None:
        print(f"| {what} | {result} |", flush=True)
        say({"part": "resume", "what": what, "result": result, **values})

    def killed_in_save(members: Workers, folder: str, ckpt: Path) -> str:
        try:
            members.run(files.fit, f"{folder}/cut", 8, str(ckpt), None, world, options, 7)
        except RuntimeError as error:
            if "exit code -9" not in str(error):
                raise
            there = sorted(path.name for path in Path(f"{folder}/cut").iterdir() if "7" in path.name)
            return f"{error}; of step 7 there is {', '.join(there) or 'nothing'}"
        raise RuntimeError("the run that was to be killed came to its end")

    try:
        with tempfile.TemporaryDirectory() as folder:
            whole = workers.run(files.fit, f"{folder}/whole", 8, None, None, world, options)[0]
            told(f"{world} processes, not interrupted", f"loss {whole['losses'][0]:.4f} → {whole['losses'][-1]:.4f}")
            try:
                workers.run(files.fit, f"{folder}/cut", 8, None, 4, world, options)
            except RuntimeError as error:
                if "exit code -9" not in str(error):
                    raise
                told(f"{world} processes, rank {world - 1} gets SIGKILL in step 5", str(error))
            else:
                raise RuntimeError("the run that was to be killed came to its end")
            for members, stop in ((other, 6), (workers, 8)):
                ckpt = max(Path(f"{folder}/cut").glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
                if stop == 8:
                    what = f"{world} processes, rank 0 gets SIGKILL half-way through the file of step 7"
                    told(what, killed_in_save(members, folder, ckpt))
                now = members.run(files.fit, f"{folder}/cut", stop, str(ckpt), None, world, options)[0]
                same = f"{now['tensors']} adapter tensors and moments by name, {now['different']} differ from the file"
                told(f"resumed on {members.world} from {ckpt.stem}", same, tensors=now["tensors"], different=now["different"])
                loss = max(abs(a - b) for a, b in zip(now["losses"], whole["losses"][stop - len(now["losses"]) : stop], strict=True))
                told(f"steps up to {stop} against the uninterrupted run", f"losses differ by at most {loss:.2g}", loss_difference=loss)
                if members is other and other is not workers:
                    other.close()
            difference = max((now["adapters"][name] - tensor).abs().max().item() for name, tensor in whole["adapters"].items())
            largest = max(tensor.abs().max().item() for tensor in whole["adapters"].values())
            told("adapters at the end", f"differ by at most {difference:.2g}, largest entry {largest:.2g}", adapter_difference=difference)
    except RuntimeError as error:
        told("failed", str(error))
    finally:
        if other is not workers:
            other.close()


def nf4_rows(workers: Workers, options: argparse.Namespace, say: Callable[[dict[str, Any]], None]) -> None:
    """A 4-bit base under FSDP2."""
    print("\n| NF4 base under FSDP2 | ms | tokens/s | GiB a GPU | collectives |\n|---|---|---|---|---|")
    try:
        ranks = workers.run(runs.measure, "fsdp2", "nf4", options)
    except RuntimeError as error:
        print(f"| {options.shape} | failed: {error} | | | |", flush=True)
        say({"part": "nf4", "failed": str(error)})
        return
    row = {**ranks[0], **{key: max(rank[key] for rank in ranks) for key in ("ms", "peak_gib", "build_gib")}}
    counts = ", ".join(f"{count} {name}" for name, (count, _) in row["traffic"].items()) or "none"
    print(f"| {options.shape} | {row['ms']:.1f} | {row['tokens'] / row['ms'] * 1e3:,.0f} | {row['peak_gib']:.1f} | {counts} |", flush=True)
    say({"part": "nf4", **row})


def fit_rows(workers: Workers, options: argparse.Namespace, say: Callable[[dict[str, Any]], None]) -> None:
    """``lora_fsdp2`` through ``Trainer.fit``."""
    import multi_gpu_fit  # it imports tasks, which need the command line's packages

    multi_gpu_fit.fit_rows(workers, options, say)


def big_rows(workers: Workers, options: argparse.Namespace, say: Callable[[dict[str, Any]], None]) -> None:
    """A model that does not fit one GPU, through ``Trainer.fit``."""
    import multi_gpu_big  # likewise

    multi_gpu_big.big_rows(workers, options, say)


PARTS = {"steps": step_rows, "save": save_rows, "resume": resume_rows, "nf4": nf4_rows, "fit": fit_rows, "big": big_rows}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, help="default: all GPUs")
    parser.add_argument("--cpu", action="store_true", help="gloo processes")
    parser.add_argument("--shape", choices=list(models.SHAPES), default="8b")
    parser.add_argument("--rows", type=int, help="sequences a device; default 4, tiny 2")
    parser.add_argument("--length", type=int, help="tokens a sequence; default 2048, tiny 32")
    parser.add_argument("--steps", type=int, default=10, help="counted steps, after three")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--compile", action="store_true", help="each block compiled")
    parser.add_argument("--pull-frozen", action="store_true", help="of the parts resume and nf4: LoRAFSDP2Strategy(pull_frozen=True)")
    parser.add_argument("--profile", action="store_true", help="milliseconds by kind of kernel, under each row")
    parser.add_argument("--only", nargs="+", choices=list(runs.STRATEGIES), help="these strategies, beside the single device")
    parser.add_argument("--models", nargs="+", choices=list(models.MODELS), default=list(models.MODELS))
    parser.add_argument("--bases", nargs="+", choices=["bf16", "fp8"], default=["bf16"], help="of the part fit")
    parser.add_argument("--ways", nargs="+", default=["one", "fsdp2", "auto"], help="of the part fit, see multi_gpu_fit.py")
    parser.add_argument("--layers", type=int, help="of the part big: at most so many blocks")
    parser.add_argument("--recompute", choices=["full", "selective"], help="of the part big: LoRACallback(checkpointing=...)")
    parser.add_argument("--big", nargs="+", help="of the part big: these rows, as strategy/base/model")
    parser.add_argument("--worlds", type=int, nargs="+", help="of the part big: numbers of devices; default: the last three powers of 2")
    parser.add_argument("--warmup", type=int, default=2, help="of the part big: steps before the counted ones")
    parser.add_argument("--save", action="store_true", help="of the part big: save a checkpoint after each run of ours")
    parser.add_argument("--budget", type=float, default=1e9, help="of the part big: seconds after which no row begins")
    parser.add_argument("--row-timeout", type=float, default=600.0, help="of the part big: seconds of a row")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=["steps", "save", "resume"])
    parser.add_argument("--json", type=Path, default=Path("runs/multi_gpu.json"))
    options = parser.parse_args(argv)
    tiny = options.shape == "tiny"
    options.rows, options.length = options.rows or (2 if tiny else 4), options.length or (32 if tiny else 2048)
    devices = options.devices or (1 if options.cpu else torch.cuda.device_count())
    if not options.cpu and devices > torch.cuda.device_count():
        parser.error(f"--devices {devices}, but {torch.cuda.device_count()} GPUs are visible; --cpu runs gloo processes")
    if not devices:
        parser.error("no GPU is visible; --cpu --shape tiny --devices 2 runs gloo processes")
    for name, value in (("NCCL_NVLS_ENABLE", "0"), ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")):  # no NVLink multicast
        os.environ.setdefault(name, value)

    name = f"{devices} x {torch.cuda.get_device_name()}" if not options.cpu else f"{devices} gloo processes"
    head = f"{name}, torch {torch.__version__}, {options.shape}, {options.rows} x {options.length} tokens a device"
    head += ", gradient checkpointing" * options.checkpointing + ", blocks compiled" * options.compile
    print(head, flush=True)
    results: list[dict[str, Any]] = []
    options.json.parent.mkdir(parents=True, exist_ok=True)

    def say(row: dict[str, Any]) -> None:
        results.append(row)
        options.json.write_text(json.dumps({"run": head, "rows": results}, indent=1))

    workers = Workers(devices, options.cpu)
    try:
        for part in options.parts:
            PARTS[part](workers.under({}), options, say)
    finally:
        workers.close()
    return results


if __name__ == "__main__":
    main()
