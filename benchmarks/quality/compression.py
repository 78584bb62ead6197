"""What an adapter of a 7B model is in parameters and on disk, against the model: counted, and measured on files that are really written.

    python -m benchmarks.quality.compression --out compression.jsonl                   # adapters, a minute
    python -m benchmarks.quality.compression --out compression.jsonl --checkpoint 0 2  # training checkpoints too, of these rows: minutes

The models have the shape of Llama-2-7B and Llama-3-8B. Each weight is one stored number, seen in the weight's shape, so the base takes no
memory. The files are as over real weights, because no base weight is in them: `find_targets` counts, `save_adapter` writes the adapter, and
`LoRACallback` in a `Trainer` writes the checkpoint after one step of AdamW on the adapters alone. What full fine-tuning takes is computed
from the number of parameters: 2 bytes each in bf16, and in a checkpoint 8 more for AdamW's two moments in fp32.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality.trial import surroundings
from lightning_lora import LoRACallback, LoRAConfig, apply_lora, find_targets, save_adapter

# Hidden and inner width, vocabulary, heads of keys and values (Llama 2, arXiv:2307.09288; Llama 3, arXiv:2407.21783).
SHAPES: dict[str, dict[str, int]] = {
    "Llama-2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000, "num_key_value_heads": 32},
    "Llama-3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 128, "num_key_value_heads": 2},
}
QV, QKVO, ALL = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear"
# The first two are rows of the document's table.
ROWS: list[dict[str, Any]] = [
    {"rank": 8, "target_modules": QV},
    {"rank": 16, "target_modules": QKVO},
    {"rank": 16, "target_modules": ALL},
    {"rank": 64, "target_modules": ALL},
]


def model_of(shape: str) -> LlamaForCausalLM:
    """Return a Llama of that shape in bf16, each weight one stored number."""
    layers, heads = (2, 4) if shape == "tiny" else (32, 32)
    config = LlamaConfig(**SHAPES[shape], num_hidden_layers=layers, num_attention_heads=heads)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                one = torch.ones((), dtype=torch.bfloat16)
                module._parameters[name] = nn.Parameter(one.expand(parameter.shape), requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return model


class AdaptersOnly(L.LightningModule):
    """A step that reads nothing but what trains: every adapter gets a gradient, and no product with the base is computed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return torch.stack([p.square().sum() for p in self.parameters() if p.requires_grad]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(1, 1))


def measured(shape: str, row: dict[str, Any], checkpoint: bool) -> dict[str, Any]:
    """Return the counts and sizes of one configuration."""
    config, model = LoRAConfig(**row), model_of(shape)
    report = find_targets(model, config)
    sizes = {"full_bf16": 2 * report.total, "full_fp32": 4 * report.total, "full_checkpoint": 10 * report.total}
    sizes["adapter_computed"] = 4 * report.parameters
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint:
            task = AdaptersOnly(model)
            quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
            trainer = L.Trainer(max_steps=1, accelerator="cpu", callbacks=LoRACallback(config, merge_on_fit_end=False), **quiet)
            trainer.fit(task)
            trainer.save_checkpoint(f"{folder}/last.ckpt")
            sizes["checkpoint"] = Path(folder, "last.ckpt").stat().st_size
        else:
            apply_lora(model, config=config)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        adapter = save_adapter(model, Path(folder, "adapter"))
        sizes["adapter"] = sum(file.stat().st_size for file in adapter.iterdir())
    if trainable != report.parameters:
        raise RuntimeError(f"{shape}, {row}: {report.parameters:,} parameters counted, {trainable:,} train")
    return {"trainable": trainable, "total": report.total, "bytes": sizes}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a file that one line of JSON a configuration is added to")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["Llama-2-7B", "Llama-3-8B"])
    parser.add_argument("--rows", nargs="+", type=int, default=range(len(ROWS)), help="which configurations, counted from 0; default all")
    parser.add_argument("--checkpoint", nargs="+", type=int, default=(), help="rows of which a training checkpoint is measured too")
    options = parser.parse_args(argv)
    records = []
    for shape in options.shapes:
        for number in options.rows:
            found = measured(shape, ROWS[number], number in options.checkpoint)
            record = {"study": "compression", "base": shape, "method": "lora", "config": ROWS[number], **found}
            records.append(record | surroundings())
            with options.out.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")
            print(json.dumps(records[-1]), flush=True)
    return records


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*number of training batches.*|rank=.*")
    main()
