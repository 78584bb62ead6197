"""GaLore: the library's steps against the paper's algorithm in float64, the groups, the states that a checkpoint can hold."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.optim import GaLoreConfig, galore_optimizer, galore_param_groups
from lightning_lora.optim.galore import SIDES
from tests.conftest import ConvNet, TinyModel, same_bits
from tests.lit import LitNet, trainer


class Projected(nn.Module):
    """One matrix whose gradient is set by hand."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.linear = nn.Linear(columns, rows, bias=False, dtype=dtype)


def gradients(shape: tuple[int, int], steps: int) -> list[Tensor]:
    """Matrices with well separated singular values, so that float32's singular vectors are the right ones."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(steps):
        u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
        made.append(u * torch.tensor([2.0**-i for i in range(min(shape))], dtype=torch.float64) @ vh)
    return made


def papers(weight: Tensor, grads: list[Tensor], fresh: set[int], side: str, rank: int, lr: float, scale: float, eps: float) -> Tensor:
    """Algorithm 2 of arXiv:2403.03507 with Adam's bias correction; a subspace is taken at the steps in ``fresh`` (from 1)."""
    moments: tuple[Any, Any] = (0.0, 0.0)
    tall = weight.shape[0] >= weight.shape[1]
    left = side in ("left", "full") or (side == "std" and not tall) or (side == "reverse_std" and tall)
    right = side == "full" or not left
    for step, grad in enumerate(grads, 1):
        if step in fresh:
            u, _, vh = torch.linalg.svd(grad)
            p = u[:, :rank] if left else torch.eye(weight.shape[0], dtype=weight.dtype)
            q = vh[:rank] if right else torch.eye(weight.shape[1], dtype=weight.dtype)
        low = p.t() @ grad @ q.t()
        moments = (0.9 * moments[0] + 0.1 * low, 0.999 * moments[1] + 0.001 * low**2)
        mean, square = moments[0] / (1 - 0.9**step), moments[1] / (1 - 0.999**step)
        adam = mean / (square.sqrt() + eps / math.sqrt(1 - 0.999**step))
        weight = weight - lr * scale * (p @ adam @ q)
    return weight


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)], ids=["tall", "wide", "square"])
def test_steps_are_the_papers_in_float64(shape: tuple[int, int], side: str) -> None:
    model, rank, gap, eps = Projected(*shape), 2, 3, 1e-3
    start = model.linear.weight.detach().clone()
    optimizer = galore_optimizer(
        galore_param_groups(model, lr=0.1, rank=rank, update_proj_gap=gap, scale=0.5, projection_type=side), eps=eps
    )
    grads = gradients(shape, 7)
    for grad in grads:
        model.linear.weight.grad = grad.clone()
        optimizer.step()
    # The library counts steps from 1 and takes a subspace at the first and at multiples of the gap: after 1, 3, 6, the paper after 1, 4, 7.
    expected = papers(start, grads, {1, 3, 6}, side, rank, 0.1, 0.5, eps)
    torch.testing.assert_close(model.linear.weight.detach(), expected, rtol=0, atol=2e-5)
    assert (expected - start).abs().max() > 0.05
    assert (papers(start, grads, {1, 4, 7}, side, rank, 0.1, 0.5, eps) - expected).abs().max() > 1e-3  # the comparison sees such things


def test_what_is_not_projected_takes_adamws_step(make: Any, ids: Tensor) -> None:
    ours, theirs = make(TinyModel), make(TinyModel)
    groups = galore_param_groups(ours, lr=1e-2, weight_decay=0.1, rank=2, target_modules=["mlp"])
    kept = [p for group in groups[1:] for p in group["params"]]
    optimizer = galore_optimizer(groups, eps=1e-14)
    names = {id(p): name for name, p in ours.named_parameters()}
    there = dict(theirs.named_parameters())
    reference = torch.optim.AdamW(
        [{"params": [there[names[id(p)]] for p in g["params"]], "weight_decay": g["weight_decay"]} for g in groups[1:]], lr=1e-2, eps=1e-14
    )
    for model, step in ((ours, optimizer), (theirs, reference)):
        model(ids).square().mean().backward()
        step.step()
    for p in kept:
        torch.testing.assert_close(p, there[names[id(p)]], rtol=0, atol=2e-5, msg=names[id(p)])


def test_groups_hold_every_parameter_once(make: Any) -> None:
    model = make(TinyModel, tied=True)
    groups = {
        group["name"]: group
        for group in galore_param_groups(model, lr=0.1, weight_decay=0.01, rank=3, scale=0.5, exclude_modules=["lm_head"])
    }
    held = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters()) and len(set(held)) == len(held)
    names = {id(p): name for name, p in model.named_parameters()}
    projected = {names[id(p)] for p in groups["galore"]["params"]}
    assert projected == {f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("attn.q_proj", "attn.v_proj", "mlp")}
    assert [names[id(p)] for p in groups["other"]["params"]] == ["embed.weight"]  # the head is tied to it
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "galore": (0.1, 0.01),
        "other": (0.1, 0.01),
        "no_decay": (0.1, 0.0),
    }
    how = {"rank": 3, "update_proj_gap": 200, "scale": 0.5, "projection_type": "std"}
    assert {key: value for key, value in groups["galore"].items() if key in how} == how
    assert not set(groups["other"]) & set(how)
    fewer = galore_param_groups(model, lr=0.1, rank=3, exclude_modules=["q_proj", "lm_head", r".*\.1\..*"])
    assert [names[id(p)] for p in fewer[0]["params"]] == ["layers.0.attn.v_proj.weight", "layers.0.mlp.weight"]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, times: int) -> None:
    for _ in range(times):
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_is_plain_tensors_and_resumes_to_the_bit(make: Any, ids: Tensor, side: str, dtype: torch.dtype) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make(TinyModel).to(dtype)
        groups = galore_param_groups(model, lr=1e-2, weight_decay=0.1, rank=2, update_proj_gap=4, projection_type=side)
        return model, galore_optimizer(groups)

    (whole, optimizer), (resumed, again) = start(), start()
    step(whole, optimizer, ids, 6)  # in the middle of a subspace
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    slots = saved["optimizer"]["state"][0]
    assert slots["projector"].shape == ((8, 2) if side in ("left", "reverse_std", "full") else (2, 8)) and slots["projector_step"] == 4
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    for (key, mine), theirs in zip(again.state_dict()["state"][0].items(), slots.values(), strict=True):  # saved before any step
        assert same_bits(mine, theirs) if isinstance(mine, Tensor) else mine == theirs, key
    for model, its in ((whole, optimizer), (resumed, again)):
        step(model, its, ids, 5)  # over a new subspace at 8
    assert all(same_bits(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert all("projector_step" not in slots for slots in again.state.values())


def test_moments_are_small(make: Any, ids: Tensor) -> None:
    model = make(TinyModel, size=32)
    optimizer = galore_optimizer(galore_param_groups(model, lr=1e-2, rank=4))
    step(model, optimizer, ids, 1)
    for _, weight in ((n, p) for n, p in model.named_parameters() if p.shape == (32, 32)):
        slots = optimizer.state[weight]
        assert slots["exp_avg"].shape == slots["exp_avg_sq"].shape == (32, 4) and slots["projector"].ortho_matrix.shape == (4, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, r"rank=0: give a whole number ≥ 1"),
        ({"rank": 2.5}, r"rank=2\.5: give a whole number"),
        ({"update_proj_gap": 0}, r"update_proj_gap=0"),
        ({"scale": -1}, r"scale=-1: give a finite number > 0"),
        ({"scale": float("nan")}, r"scale=nan"),
        ({"projection_type": "random"}, r"projection_type='random': choose one of std, reverse_std, left, right, full"),
        ({"target_modules": []}, r"target_modules=\(\) names nothing"),
        ({"rank": 2, "target_modules": ["q_prej"]}, r"q_prej.*q_proj"),
        (
            {"rank": 9},
            r"layers\.0\.attn\.q_proj\.weight is 8×8, and rank=9 is above its smaller side: give a smaller rank, or leave it out",
        ),
    ],
)
def test_what_is_refused(make: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        galore_param_groups(make(TinyModel), lr=0.1, **fields)


def test_weights_that_cannot_be_projected_are_refused_by_name(make: Any) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.q_proj\.weight is frozen, .* train without LoRA"):
        galore_param_groups(apply_lora(make(TinyModel), config=LoRAConfig(rank=2)), lr=0.1, rank=2)
    with pytest.raises(ValueError, match=r"conv\.weight has shape \(4, 3, 3, 3\), and only matrices are projected"):
        galore_param_groups(make(ConvNet), lr=0.1, rank=2, target_modules=["conv"])
    with pytest.raises(ValueError, match="config and rank are both given"):
        galore_param_groups(make(TinyModel), lr=0.1, config=GaLoreConfig(), rank=2)


def test_without_the_library_the_error_names_the_extra(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pytorch_optimizer.optimizer.galore", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-lora\[galore\]'"):
        galore_optimizer(galore_param_groups(make(TinyModel), lr=0.1, rank=2))


class Lit(LitNet):
    """LitNet without LoRA, its gradients projected; a subspace lasts three optimizer steps."""

    def configure_optimizers(self) -> Any:
        return galore_optimizer(galore_param_groups(self, lr=1e-2, weight_decay=0.1, rank=2, update_proj_gap=3))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory")
def test_lightning_accumulates_and_resumes_to_the_bit(tmp_path: Path) -> None:
    whole, first, second = Lit(), Lit(), Lit()
    trainer(tmp_path, max_epochs=4, accumulate_grad_batches=2).fit(whole)
    saving = ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
    trainer(tmp_path, saving, max_epochs=2, accumulate_grad_batches=2).fit(first)
    run = trainer(tmp_path, max_epochs=4, accumulate_grad_batches=2)
    run.fit(second, ckpt_path=tmp_path / "last.ckpt")
    assert first.losses + second.losses == whole.losses and run.global_step == 8
    assert all(same_bits(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))

    plain = Lit()  # the same by hand: one step on the mean of two batches' gradients
    optimizer = plain.configure_optimizers()
    for _ in range(4):
        for index, batch in enumerate(plain.train_dataloader()):
            (plain.step(batch) / 2).backward()
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
    for (name, p), q in zip(plain.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=name)
