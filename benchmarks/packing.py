"""Useful tokens per second on documents of chat length: full rows, packed rows, padded batches, and PEFT's packed rows.

    PYTHONPATH=. python benchmarks/packing.py                                            # one GPU, 8B shape, 4 x 2048 tokens
    PYTHONPATH=. python benchmarks/packing.py --shape small --rows 2 --length 512 --median 90 --steps 5       # a CPU

Lengths are lognormal. Every mode trains on documents drawn from the same list, about as many useful tokens per batch:

    full            one document of the row's full length per row, the same kernel: what packed rows are compared with
    full sdpa       the same rows as rows that are not packed: torch's fastest causal kernel
    packed          best-fit decreasing, attention over documents of varying length
    packed sdpa     the same rows, transformers' mask for its sdpa
    packed fp8      packed, on an FP8 base; its products are FP8 where the GPU has tensor cores for it. Beside it: full fp8
    packed flex     the same rows, transformers' block mask for flex attention (on a GPU)
    peft            PEFT on the same packed rows as TRL prepares them (position_ids), transformers' mask, Hugging Face's loss under autocast
    peft fast       PEFT with our attention, our chunked loss and bf16 adapters: the most that its layers allow
    grouped         batches of documents of similar length, padded
    padded          batches in random order, padded
    flat            the grouped batches, laid end to end in one row without padding (padding-free)

Modes of one kind alternate step by step in one run. Ours is compiled layer by layer on a GPU. `--graphs` also records CUDA graphs, apart.
Random weights and tokens, bf16 on a GPU and fp32 on a CPU, all-linear r=16, AdamW, medians.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from floor_modes import DEVICE, SHAPES, Setting, build, ours, peft
from torch import Tensor

from lightning_lora import chunked_cross_entropy, compile_layers, cuda_graph_step, get_lora_parameters, quantize_base
from lightning_lora.data.batching import Example, LengthGroupedSampler, collate_answers
from lightning_lora.data.packing import PackedRows
from lightning_lora.ops.cross_entropy import POSITIONS
from lightning_lora.tasks.packed_attention import NAME, packed_rows, register
from lightning_lora.tasks.padding import end_to_end

GPU = DEVICE == "cuda"
BATCHES = 4  # taken in turn


class Documents(list):
    """Examples with their lengths."""

    @property
    def lengths(self) -> list[int]:
        return [len(example) for example in self]


@dataclass(frozen=True)
class Mode:
    """A model, its attention, and the batches that it takes."""

    model: str  # ours, ours fp8, ours ragged, ours graphs, peft, peft fast
    attention: str
    batches: str


def modes(flex: bool) -> dict[str, dict[str, Mode]]:
    """Groups of modes that alternate."""
    fixed = {
        "full": Mode("ours", NAME, "full"),
        "full sdpa": Mode("ours", "sdpa", "full"),
        "packed": Mode("ours", NAME, "packed"),
        "packed sdpa": Mode("ours", "sdpa", "packed"),
        "full fp8": Mode("ours fp8", NAME, "full"),
        "packed fp8": Mode("ours fp8", NAME, "packed"),
        "peft": Mode("peft", "sdpa", "packed"),
        "peft fast": Mode("peft fast", NAME, "packed"),
    }
    ragged = {name: Mode("ours ragged", NAME if name == "flat" else "sdpa", name) for name in ("grouped", "padded", "flat")}
    graphs = {"packed, recorded": Mode("ours graphs", NAME, "packed"), "full, recorded": Mode("ours graphs", NAME, "full")}
    flexible = {"packed flex": Mode("ours ragged", "flex_attention", "packed")} if flex else {}
    return {"fixed": fixed, "ragged": ragged, "graphs": graphs, "flex": flexible}


def documents(options: argparse.Namespace, vocab: int) -> Documents:
    generator = torch.Generator().manual_seed(0)
    logs = torch.randn(options.documents, generator=generator) * options.sigma
    lengths = (options.median * logs.exp()).clamp(16, options.length).int().tolist()
    made = [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]
    return Documents(Example(ids, ids) for ids in made)


def batches(kind: str, options: argparse.Namespace, vocab: int) -> list[dict[str, Any]]:
    """Batches on the device, each with the number of its useful tokens."""
    found = documents(options, vocab)
    if kind in ("full", "packed"):
        if kind == "full":  # in tensors of the same shape, so that one graph serves both
            whole = torch.randint(vocab, (options.rows * BATCHES, options.length), generator=torch.Generator().manual_seed(1)).tolist()
            packed = PackedRows(Documents(Example(ids, ids) for ids in whole), options.length, options.rows)
            packed.documents, packed.longest = (
                getattr(PackedRows(found, options.length, options.rows), name) for name in ("documents", "longest")
            )
        else:
            packed = PackedRows(found, options.length, options.rows)
            print(packed, f"at most {packed.documents} in one of them", flush=True)
        order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(1)).tolist()
        rows = [[packed[i] for i in order[k * options.rows : (k + 1) * options.rows]] for k in range(BATCHES)]
        made = [packed.collate(batch, pad=0) | {"useful": sum(len(e) for pack in batch for e in pack)} for batch in rows]
    else:
        size = round(options.rows * options.length / statistics.mean(found.lengths))
        sampler = LengthGroupedSampler(found.lengths, size, (lambda: 0) if kind != "padded" else None)
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(1)).tolist() if kind == "padded" else list(sampler)
        examples = [[found[i] for i in order[k * size : (k + 1) * size]] for k in range(BATCHES)]
        made = [flat(batch) if kind == "flat" else collate_answers(batch, pad=0) for batch in examples]
        made = [batch | {"useful": sum(map(len, rows))} for batch, rows in zip(made, examples, strict=True)]
    return [{name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in batch.items()} for batch in made]


def flat(examples: Sequence[Example]) -> dict[str, Any]:
    """A padded batch, laid end to end as the task does it."""
    batch = collate_answers(examples, pad=0)
    batch["labels"][:, 0] = -100  # nothing in its document predicts a first token
    rows = end_to_end(batch["attention_mask"])
    if rows is None:  # nothing is padded
        return batch
    index = rows.pop("index")
    return rows | {name: batch[name].flatten()[index][None] for name in ("input_ids", "labels")}


def loss_of(mode: Mode, model: Any, batch: dict[str, Any]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "useful", POSITIONS)}
    with packed_rows() if "position_ids" in batch else nullcontext():
        if mode.model == "peft":
            with torch.autocast(DEVICE, torch.bfloat16) if GPU else nullcontext():
                return model(**inputs, labels=batch["labels"]).loss
        base = model.get_base_model() if mode.model == "peft fast" else model
        if mode.batches == "full" and mode.attention == "sdpa":
            inputs = {"input_ids": batch["input_ids"]}
        hidden = base.model(**inputs).last_hidden_state.flatten(0, 1)
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100).flatten()
        return chunked_cross_entropy(hidden, base.lm_head.weight, labels, compiled=GPU)


def trained_model(name: str, options: argparse.Namespace) -> tuple[Any, torch.optim.Optimizer]:
    setting = Setting(shape=options.shape, layers=options.layers, seq=options.length)
    base = build(setting) if GPU else build(setting).float()
    if name.startswith("peft"):
        model = peft(base, setting, 0.0, {"chunk"} if name == "peft fast" and GPU else set())
    else:
        base = quantize_base(base, "fp8") if name == "ours fp8" else base
        model = ours(base, setting, 0.0, set())
        if name == "ours ragged":
            base.enable_input_require_grads()
        if GPU and not options.eager:
            compile_layers(model, cuda_graphs=name == "ours graphs")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-5, fused=GPU)


def alternate(group: dict[str, Mode], options: argparse.Namespace, vocab: int) -> None:
    """Train every mode of a group in turn, step by step; print its row."""
    names = [name for name in group if not options.only or name in options.only]
    models = {key: trained_model(key, options) for key in dict.fromkeys(group[name].model for name in names)}
    data = {kind: batches(kind, options, vocab) for kind in dict.fromkeys(group[name].batches for name in names)}
    milliseconds: dict[str, list[float]] = {name: [] for name in names}
    speeds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for step in range(options.warmup + options.steps):
        for name in list(names) if step % 2 else names[::-1]:
            mode, (model, optimizer) = group[name], models[group[name].model]
            batch = data[mode.batches][step % BATCHES]
            (model.get_base_model() if mode.model.startswith("peft") else model).set_attn_implementation(mode.attention)
            try:
                seconds, losses[name], peak = timed(partial(train, mode, model, optimizer, batch))
            except Exception as error:  # out of memory, or anything that a mode fails by: its row says so
                print(f"| {name} | {type(error).__name__}: {' '.join(str(error).split())[:300]} |", flush=True)
                names.remove(name)
                continue
            if step >= options.warmup:
                milliseconds[name].append(1000 * seconds)
                speeds[name].append(batch["useful"] / seconds)
                peaks[name] = max(peak, peaks.get(name, 0.0))
    for name in names:
        row(name, milliseconds[name], speeds[name], peaks[name], losses[name])


def train(mode: Mode, model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> Tensor:
    with cuda_graph_step(get_lora_parameters(model)) if mode.model == "ours graphs" else nullcontext():
        loss = loss_of(mode, model, batch)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def timed(step: Callable[[], Tensor]) -> tuple[float, float, float]:
    """Seconds, loss, and GiB at the peak above what was there."""
    if not GPU:
        began = time.process_time()
        loss = step()
        return time.process_time() - began, loss.item(), 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    loss = step()
    torch.cuda.synchronize()
    return time.perf_counter() - began, loss.item(), (torch.cuda.max_memory_allocated() - before) / 2**30


REFERENCE: dict[str, float] = {}


def row(name: str, milliseconds: list[float], speeds: list[float], peak: float, loss: float) -> None:
    speed = REFERENCE[name] = statistics.median(speeds)
    ratios = [f"{speed / REFERENCE[other]:.3f}" if other in REFERENCE else "–" for other in ("full", "peft")]
    print(f"| {name} | {statistics.median(milliseconds):.1f} | {speed:.0f} | {' | '.join(ratios)} | {peak:.1f} | {loss:.4f} |", flush=True)


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--rows", type=int, default=4, help="rows per batch")
    parser.add_argument("--length", type=int, default=2048, help="tokens per row, and of the longest document")
    parser.add_argument("--median", type=float, default=350, help="median length of a document, in tokens")
    parser.add_argument("--sigma", type=float, default=0.8, help="standard deviation of the lengths' logarithm")
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--eager", action="store_true", help="compile nothing on a GPU")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--groups", nargs="*", default=["fixed", "ragged"], choices=["fixed", "ragged", "graphs", "flex"])
    parser.add_argument("--only", nargs="*", default=[], help="these modes alone")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    options = options_of(argv)
    torch.set_num_threads(options.threads)
    register()
    REFERENCE.clear()
    for name, group in modes(GPU).items():
        if name in options.groups and group:
            print("\n| | ms | useful tokens/s | x full | x peft | GiB | loss |\n|---|---|---|---|---|---|---|", flush=True)
            # Batches of every length share one graph where lengths differ; a first block whose input needs no gradient would have another.
            with torch._dynamo.config.patch(assume_static_by_default=name != "ragged"):
                alternate(group, options, SHAPES[options.shape][-1])
            torch._dynamo.reset()
            gc.collect()
            if GPU:
                torch.cuda.empty_cache()
    return dict(REFERENCE)


if __name__ == "__main__":
    main()
