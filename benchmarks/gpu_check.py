"""What CI cannot check without a GPU: the update, merging, and FSDP2 over NCCL on one device, held against plain references.

    python benchmarks/gpu_check.py            # a 1B Llama shape, bf16 base and fp32 adapters
    python benchmarks/gpu_check.py --tiny     # the same steps in seconds, on a CPU too

Every line is a measurement; the last says whether all stayed within their bounds.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import time
import warnings
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, get_lora_parameters, merge_lora, merge_report, unmerge_lora
from lightning_lora.layers.base import lora_layers
from lightning_lora.ops.low_rank import lora_update, lora_update_reference
from lightning_lora.strategies import LoRAFSDP2Strategy

FAILED: list[str] = []


def check(what: str, value: float, bound: float) -> None:
    print(f"{what}: {value:.3g} (bound {bound:g})", flush=True)
    if not value <= bound:
        FAILED.append(what)


def shape(tiny: bool) -> LlamaConfig:
    sizes = (64, 128, 2, 4, 2, 256) if tiny else (2048, 8192, 16, 32, 8, 128256)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return LlamaConfig(**dict(zip(names, sizes, strict=True)), tie_word_embeddings=True, use_cache=False)


def check_update(device: str) -> None:
    """The fast update against the definition in float64: outputs and every gradient."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for dropout in (0.0, 0.1):
            torch.manual_seed(0)
            shapes = ((4, 37, 96), (4, 37, 64), (8, 64), (96, 8))
            y, x, A, B = (torch.randn(s, device=device, dtype=torch.float64) for s in shapes)
            low = [t.to(dtype).requires_grad_() for t in (y, x)] + [t.float().requires_grad_() for t in (A, B)]
            wide = [t.detach().double().requires_grad_() for t in low]
            if dropout:  # masks differ: compare means over many draws
                out = torch.stack([lora_update(*low, 0.5, dropout) for _ in range(2000)]).double().mean(0)
                reference = lora_update_reference(*wide, 0.5)
                check(f"update {dtype}, dropout, mean of 2000", ((out - reference).abs().mean() / reference.abs().mean()).item(), 2e-2)
                continue
            out, reference = lora_update(*low, 0.5), lora_update_reference(*wide, 0.5)
            g = torch.randn_like(reference)
            out.backward(g.to(dtype))
            reference.backward(g)
            pairs = [(out, reference), *((a.grad, b.grad) for a, b in zip(low, wide, strict=True))]
            check(f"update {dtype}", max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs), bound)


def check_merge(config: LlamaConfig, device: str) -> None:
    """Merging in bf16 with TF32 allowed for training: full-precision update, base back to the bit, also after a move to the CPU."""
    torch.set_float32_matmul_precision("high")
    with torch.device(device):
        model = LlamaForCausalLM(config).bfloat16()
    apply_lora(model, config=LoRAConfig(rank=16, target_modules="all-linear"))
    torch.manual_seed(0)
    for parameter in get_lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.005)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    started = time.perf_counter()
    merge_lora(model)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"merge: {time.perf_counter() - started:.2f} s, worst share lost {max(merge_report(model).values()):.3f}")
    records = [layer.lora_state.merge for _, layer in lora_layers(model)]
    undo = sum(record.undo.nbytes for record in records if record is not None)
    weights = sum(layer.weight.nbytes for layer in model.modules() if getattr(layer, "merged", False))
    print(f"way back: {undo / weights:.1%} of the merged weights' bytes")
    model.cpu()
    unmerge_lora(model)
    different = sum(int((model.state_dict()[name] != tensor.cpu()).sum()) for name, tensor in base.items())
    check("entries that unmerging missed", different, 0)
    torch.set_float32_matmul_precision("highest")


class Task(L.LightningModule):
    def __init__(self, config: LlamaConfig, checkpointing: bool, compiled: bool, batch: tuple[int, int], steps: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = LlamaForCausalLM(config).train()
        if checkpointing:
            self.net.gradient_checkpointing_enable({"use_reentrant": False})
        self.compiled, self.batch, self.steps = compiled, batch, steps
        self.losses: list[float] = []

    def on_fit_start(self) -> None:
        for block in self.net.model.layers if self.compiled else ():
            block.compile()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.net(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, self.net.config.vocab_size, self.batch, generator=generator)
        return DataLoader([ids] * self.steps, batch_size=None)


def fit(
    name: str,
    strategy: Any,
    options: argparse.Namespace,
    device: str,
    checkpointing: bool = False,
    compiled: bool = False,
    precision: str = "bf16-true",
) -> list[float]:
    gc.collect()  # a trainer and its module are a cycle: the model of the mode before would count as this one's memory
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    batch = (2, 32) if options.tiny else (2, 1024)
    task = Task(shape(options.tiny), checkpointing, compiled, batch, options.steps)
    torch.manual_seed(2)
    trainer = L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", devices=1, strategy=strategy, precision=precision, max_epochs=1, logger=False,
        callbacks=[LoRACallback(LoRAConfig(rank=16, target_modules="all-linear"), merge_on_fit_end=False)], enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.fit(task)
    dtypes = {str(p.dtype) for p in get_lora_parameters(task)} | {str(task.net.model.layers[0].mlp.up_proj.weight.dtype)}
    memory = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device == "cuda" else ""
    print(f"{name}: loss {task.losses[0]:.4f} → {task.losses[-1]:.4f} in {time.perf_counter() - started:.0f} s{memory}, {sorted(dtypes)}")
    return task.losses


def main(argv: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small shape")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)
    FAILED.clear()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, lightning {L.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}")
    check_update(device)
    check_merge(shape(options.tiny), device)

    modes: dict[str, dict[str, Any]] = {"eager": {}, "checkpointing": {"checkpointing": True}}
    if device == "cuda":
        modes |= {"blocks compiled": {"compiled": True}, "compiled, checkpointing": {"compiled": True, "checkpointing": True}}
    single = {mode: fit(f"single device, {mode}", "auto", options, device, **arguments) for mode, arguments in modes.items()}
    if device == "cuda":  # the scaler has to find fp32 gradients; under FSDP2 Lightning itself refuses this precision
        losses = fit("single device, 16-mixed", "auto", options, device, precision="16-mixed")
        check("worst loss difference, 16-mixed from bf16-true", max(abs(a - b) for a, b in zip(losses, single["eager"], strict=True)), 0.1)
    rendezvous = {"LOCAL_RANK": "0", "RANK": "0", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    for mode, arguments in modes.items():
        os.environ.update(rendezvous, WORLD_SIZE="1")
        strategy = LoRAFSDP2Strategy(process_group_backend="nccl" if device == "cuda" else "gloo")
        losses = fit(f"lora_fsdp2, {mode}", strategy, options, device, **arguments)
        check(f"worst loss difference, {mode}", max(abs(a - b) for a, b in zip(losses, single[mode], strict=True)), 2e-2)
    print("all within bounds" if not FAILED else f"OUT OF BOUNDS: {', '.join(FAILED)}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return FAILED


if __name__ == "__main__":
    raise SystemExit(bool(main()))
