"""What only a GPU shows: the kernels at real sizes in half precision. Everything here is skipped where there is none.

    make gpu

A number counts as right if its error against float64 is no larger than what the plain operations make in the same precision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from torch import Tensor

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, get_lora_parameters, quantize_base
from lightning_lora.layers import lora_layers
from lightning_lora.model.compile import compile_layers, uncompile_layers
from lightning_lora.model.fuse import unfuse
from lightning_lora.ops import backends
from lightning_lora.quantization.formats import format_of
from lightning_lora.trials.turns import Turn

DEVICE = "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("default"),  # a GPU's torch is often another release, with warnings of its own
]
TOKENS = (6, 2048)  # with the hidden size more entries than a compiler keeps for itself


def base(layers: int = 2) -> Any:
    """bf16."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(vocab_size=512, num_hidden_layers=layers, use_cache=False, attn_implementation="sdpa", **sizes)
    return transformers.LlamaForCausalLM(config).to(DEVICE, torch.bfloat16).train()


def llama(layers: int = 2, dropout: float = 0.0, quantize: str | None = None, variant: str = "plain") -> Any:
    """With fp32 adapters that do something."""
    model = base(layers)
    if quantize == "fp8 blocks":
        in_fp8_blocks(model)
    elif quantize is not None:
        quantize_base(model, quantize)
    apply_lora(model, config=LoRAConfig(rank=16, alpha=32, dropout=dropout, target_modules="all-linear", variant=variant))
    for parameter in get_lora_parameters(model):
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:  # a magnitude, which started at the norm
            parameter.data.mul_(1 + 0.1 * torch.randn_like(parameter))
    return model


def in_fp8_blocks(model: Any) -> None:
    """Its linears as transformers loads a model that came in FP8 with a scale a block."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    packed = FP8Linear(linear.in_features, linear.out_features, block_size=(128, 128)).to(DEVICE)
                    scales = torch.full_like(packed.weight_scale_inv, linear.weight.abs().max().item() / 448)
                    packed.weight_scale_inv.data = scales * torch.rand_like(scales).add(1)
                    each = packed.weight_scale_inv.data.repeat_interleave(128, 0).repeat_interleave(128, 1)
                    packed.weight.data = (linear.weight / each).to(torch.float8_e4m3fn)
                    setattr(parent, name, packed)


def batch(k: int = 0) -> Tensor:
    return torch.randint(512, TOKENS, generator=torch.Generator().manual_seed(k)).to(DEVICE)


def run(model: Any) -> list[Tensor]:
    """Loss and every adapter's gradient, in float64."""
    loss = model(input_ids=batch(), labels=batch()).loss
    return [t.detach().double() for t in (loss, *torch.autograd.grad(loss, list(get_lora_parameters(model))))]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error of a tensor."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))


def served(model: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many times a forward pass asks whether the kernels serve and is told that they do."""
    answers: list[bool] = []
    usable = backends.worth_kernels
    with monkeypatch.context() as patch:
        patch.setattr(backends, "worth_kernels", lambda x: answers.append(usable(x)) or answers[-1])
        with torch.no_grad():
            model(input_ids=batch())
    return sum(answers)


def dequantized(model: Any) -> Any:
    """The same model with plain linears."""
    for _, layer in lora_layers(model):
        if format_of(layer) is not None:
            layer.weight = torch.nn.Parameter(layer.base_weight(), requires_grad=False)
            layer.rebase_class(torch.nn.Linear)
    return model


KINDS = [(None, "plain"), ("nf4", "plain"), ("fp8", "plain"), ("fp8 blocks", "plain"), (None, "dora"), ("nf4", "dora")]


@pytest.mark.parametrize(("quantize", "variant"), KINDS)
def test_a_step_is_as_exact_as_with_plain_operations(quantize: str | None, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    model = llama(quantize=quantize, variant=variant)
    assert served(model, monkeypatch)
    found = {"fused": run(model)}
    compile_layers(model)
    found["compiled"] = run(model)
    uncompile_layers(model)
    unfuse(model)
    monkeypatch.setattr(backends, "worth_kernels", lambda x: False)
    monkeypatch.setattr(backends, "has_kernels", lambda x: False)  # the norms'
    found["plain"] = run(model)
    exact = run(dequantized(model).double())
    errors = {way: error(tensors, exact) for way, tensors in found.items()}
    print(errors)
    assert errors["plain"] < (0.2 if quantize == "fp8" else 0.1)  # FP8 products on either way, where the GPU has them
    assert errors["fused"] < 1.2 * errors["plain"] and errors["compiled"] < 1.2 * errors["plain"]


@pytest.mark.parametrize("compiled", [False, True])
def test_fifty_steps_lose_as_with_plain_operations(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(fused: bool) -> list[float]:
        model = llama()
        if compiled and fused:
            compile_layers(model)
        monkeypatch.setattr(backends, "worth_kernels", usable if fused else lambda x: False)
        optimizer = torch.optim.AdamW(get_lora_parameters(model), lr=1e-3)
        found = []
        for k in range(50):
            loss = model(input_ids=batch(k), labels=batch(k)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    usable = backends.worth_kernels
    mine, plain = losses(True), losses(False)
    print(max(abs(a - b) for a, b in zip(mine, plain, strict=True)))
    assert plain[-1] < plain[0] - 0.05
    assert mine == pytest.approx(plain, abs=1e-3)


def test_dropout_is_unbiased() -> None:
    """Over many draws the mean gradient is the one without dropout."""
    model, plain = llama(1, dropout=0.5), llama(1)
    mean = [torch.zeros_like(t) for t in run(plain)]
    for _ in range(64):
        for total, drawn in zip(mean, run(model), strict=True):
            total += drawn / 64
    assert error(mean[1:], run(plain)[1:]) < 0.2


def test_kernels_reach_entries_beyond_32_bits() -> None:
    """An offset in 32 bits would overflow. The last rows alone, the same rows, have the same results."""
    from lightning_lora.ops import triton_float8, triton_gated_mlp, triton_low_rank
    from lightning_lora.ops.plain import Drop

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

    rows, cols, rank, last = 2**21 + 256, 1024, 16, slice(-256, None)
    x, u, t, A, B = tensor(rows, cols), tensor(rows, cols), tensor(rows, 2 * rank), tensor(rank, cols), tensor(cols, rank)
    keeps_all = Drop(torch.zeros(1, dtype=torch.long, device=DEVICE), 0)
    assert x.numel() > 2**31
    assert torch.equal(triton_low_rank.project(x, A, keeps_all)[last], triton_low_rank.project(x[last], A, keeps_all))
    mine, theirs = (triton_low_rank.add_(y.clone(), s[:, :rank], B) for y, s in ((x, t), (x[last], t[last])))
    assert torch.equal(mine[last], theirs)
    del mine
    only_last = torch.zeros_like(t[:, :rank])
    only_last[last] = t[last, :rank]
    mine, theirs = triton_low_rank.reduce(only_last, x, keeps_all), only_last[last].t().float() @ x[last].float()
    assert error([mine], [theirs]) < 1e-4
    mine, theirs = (triton_float8.quantize_rows([part], [None])[0].view(torch.uint8) for part in (x, x[last]))
    assert torch.equal(mine[last], theirs)
    mine, theirs = (triton_gated_mlp.forward(*parts, B, B, A, None) for parts in ((x, u, t), (x[last], u[last], t[last])))
    assert torch.equal(mine[0][last], theirs[0]) and torch.equal(mine[1][last], theirs[1])
    del mine
    found = [
        triton_gated_mlp.backward(u.clone(), x, u, t, B, B, A, t[:, :rank], None)[:3]
        if part is None
        else triton_gated_mlp.backward(u[part].clone(), x[part], u[part], t[part], B, B, A, t[part, :rank], None)[:3]
        for part in (None, last)
    ]
    assert torch.equal(found[0][0][last], found[1][0]) and torch.equal(found[0][1][last], found[1][1])
    assert error([found[0][2][last].float()], [found[1][2].float()]) < 1e-2  # summed by atomics


class Lit(L.LightningModule):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.model, self.rate, self.losses = base(), rate, []

    def on_fit_start(self) -> None:
        for parameter in get_lora_parameters(self):
            torch.nn.init.normal_(parameter, std=0.02)

    def training_step(self, ids: Tensor, _: int) -> Tensor:
        loss = self.model(input_ids=ids, labels=ids).loss
        self.losses.append(loss.item())
        return loss

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(get_lora_parameters(self), lr=self.rate)


def losses(folder: Path, batches: list[Tensor], graphs: bool, dropout: float = 0.0, rate: float = 1e-3) -> list[float]:
    """Of two batches to check, and then twice of eight that are accumulated in twos, two to validate on after each four."""
    from torch._inductor import cudagraph_trees  # takes seconds, and warns

    torch._dynamo.reset()
    cudagraph_trees.reset_cudagraph_trees()
    module, config = Lit(rate), LoRAConfig(rank=16, alpha=32, dropout=dropout, target_modules="all-linear")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="gpu", devices=1, max_epochs=2, accumulate_grad_batches=2, val_check_interval=4,
        callbacks=[LoRACallback(config, compile="layer", cuda_graphs=graphs, merge_on_fit_end=False)], **quiet,
    )  # fmt: skip
    L.seed_everything(0)
    trainer.fit(module, *(torch.utils.data.DataLoader(each, batch_size=None) for each in (batches, batches[:2])))
    recorder = cudagraph_trees.get_container(torch.cuda.current_device()).tree_manager
    assert graphs is (recorder is not None and bool(recorder.roots))
    return module.losses


def test_recorded_blocks_train_as_compiled_ones(tmp_path: Path) -> None:
    recorded, compiled = (losses(tmp_path, [batch(k) for k in range(8)], graphs) for graphs in (True, False))
    print(max(abs(a - b) for a, b in zip(recorded, compiled, strict=True)))
    assert compiled[-1] < compiled[0] - 0.02
    assert recorded == pytest.approx(compiled, abs=2e-3) and len(recorded) == 2 + 2 * (8 + 2 * 2)


def test_recorded_dropout_draws_anew(tmp_path: Path) -> None:
    found = losses(tmp_path, [batch()] * 8, True, dropout=0.5, rate=0.0)
    assert len(set(found[2:6])) == 4
    assert found[6] == found[7] == found[0]


def test_trials_record_one_after_another(tmp_path: Path) -> None:
    """Each has a thread, and torch keeps recorded graphs by thread."""
    found: list[list[float]] = []
    for _ in range(2):
        turn = Turn(lambda: found.append(losses(tmp_path, [batch(k) for k in range(8)], True)))
        assert not turn.resume() and turn.error() is None
    assert found[0] == pytest.approx(found[1], abs=2e-3)
