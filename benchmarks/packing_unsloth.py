"""Unsloth on the packed rows of ``packing.py``, in a process of its own: importing it changes transformers' classes.

    PYTHONPATH=. python benchmarks/packing.py --groups fixed && PYTHONPATH=. python benchmarks/packing_unsloth.py     # one GPU

``unsloth``, ``unsloth_zoo`` and what they import must be there. Its packed batch is what its trainer's collator makes of the same rows: all
in one, with the documents' lengths in ``packed_seq_lengths``. Steps are as in ``packing.py``: bf16 base, all-linear r=16, no dropout, fused
AdamW, no gradient checkpointing; its adapters and autocast are what its trainer has with ``bf16=True``. *unsloth full* has rows of one
document each.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import unsloth  # first: it changes what comes after
from floor_modes import LINEARS, SHAPES, Setting, build
from packing import BATCHES, batches, options_of, row, timed
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from unsloth.utils import attention_dispatch as attention
from unsloth.utils.packing import mark_allow_overlength


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    options = options_of(argv)
    with tempfile.TemporaryDirectory() as folder:
        model = adapted(folder, build(Setting(shape=options.shape, layers=options.layers, seq=options.length)), options.length)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    print(f"unsloth {unsloth.__version__}: FlashAttention {attention.HAS_FLASH_ATTENTION}, xformers {attention.HAS_XFORMERS}")
    data = {name: [laid_out(batch, name) for batch in batches(name, options, SHAPES[options.shape][-1])] for name in ("packed", "full")}
    milliseconds: dict[str, list[float]] = {name: [] for name in data}
    speeds: dict[str, list[float]] = {name: [] for name in data}
    peaks, losses = dict.fromkeys(data, 0.0), dict.fromkeys(data, 0.0)
    for step in range(options.warmup + options.steps):
        for name in data:
            batch = data[name][step % BATCHES]
            seconds, losses[name], peak = timed(partial(train, model, optimizer, batch["inputs"]))
            if step >= options.warmup:
                milliseconds[name].append(1000 * seconds)
                speeds[name].append(batch["useful"] / seconds)
                peaks[name] = max(peak, peaks[name])
    print("\n| | ms | useful tokens/s | x full | x peft | GiB | loss |\n|---|---|---|---|---|---|---|", flush=True)
    for name in data:
        row("unsloth" if name == "packed" else "unsloth full", milliseconds[name], speeds[name], peaks[name], losses[name])
    return {name: statistics.median(found) for name, found in speeds.items()}


def adapted(folder: str, base: Any, length: int, rank: int = 16) -> Any:
    """A model of these weights, loaded and adapted by Unsloth. It loads from a folder only."""
    base.save_pretrained(folder, save_original_format=False)  # which would take a mixture's experts apart
    del base
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), **special).save_pretrained(folder)
    torch.cuda.empty_cache()
    loaded, _ = unsloth.FastLanguageModel.from_pretrained(folder, max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=False)
    model = unsloth.FastLanguageModel.get_peft_model(
        loaded, r=rank, lora_alpha=2 * rank, lora_dropout=0, bias="none", target_modules=LINEARS, use_gradient_checkpointing=False,
        random_state=0,
    )  # fmt: skip
    mark_allow_overlength(model)
    return model.train()


def laid_out(batch: dict[str, Any], name: str) -> dict[str, Any]:
    """What Unsloth's model takes of a batch, and the batch's useful tokens."""
    inputs = {key: batch[key] for key in ("input_ids", "labels")}
    if name == "packed":
        lengths = batch["cu_seq_lens_q"].diff()
        inputs = {key: value.view(1, -1) for key, value in (inputs | {"position_ids": batch["position_ids"]}).items()}
        inputs["packed_seq_lengths"] = lengths[lengths > 0].int()
    return {"inputs": inputs, "useful": batch["useful"]}


def train(model: Any, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


if __name__ == "__main__":
    main()
