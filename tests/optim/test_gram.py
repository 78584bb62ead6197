"""Preconditioned gradients against the formula on the dense gradient, kind by kind in float64; their invariance and their cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_lora import LoRAConfig, apply_lora, lora_layers
from lightning_lora.layers.slices import Sliced
from lightning_lora.optim import gram
from lightning_lora.optim.preconditioning import METHODS, pairs_of
from tests.conftest import fill
from tests.layers.experts import tiny_qwen3_moe
from tests.layers.fused import MODELS
from tests.layers.kinds import CASES

DELTA = 1e-3


def of_models(name: str) -> nn.Module:
    model, targets = {
        "experts": (lambda: tiny_qwen3_moe(), ["experts"]),
        "slices": (MODELS["phi3"], ["q_proj", "v_proj", "up_proj"]),
        "interleaved slices": (MODELS["gpt-neox"], ["q_proj", "v_proj"]),
        "mixed": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 6), nn.Embedding(7, 6)), ["0", "1", "2", "3"]),
    }[name]
    torch.manual_seed(3)
    return apply_lora(model().double(), config=LoRAConfig(rank=2, alpha=5, target_modules=targets))


def parts_of(model: nn.Module) -> Iterator[Any]:
    for _, layer in lora_layers(model):
        yield from layer.by_weight().values()


def preconditioned(model: nn.Module, name: str, damping: float = DELTA) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    gram.precondition(pairs_of(model, name, optimizer), damping)


def products(part: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(B, A, rows of the dense matrix) of each product, from what the layer computes: columns of B's block form, where it has one."""
    A, B = part.factor_matrices()
    if A.ndim == 3:
        return [(b, a, torch.arange(len(b))) for a, b in zip(A, B, strict=True)]
    r = part.lora_B.shape[1]
    found = []
    for k in range(A.shape[0] // r):
        b = B[:, k * r : (k + 1) * r]
        rows = b.any(1).nonzero().flatten() if isinstance(part, Sliced) else torch.arange(len(b))
        found.append((b[rows], A[k * r : (k + 1) * r], rows))
    return found


def new_factors(part: Any, A: Tensor, B: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`products` of the layer with other values in A and B."""
    kept = part.lora_A.data, part.lora_B.data
    part.lora_A.data, part.lora_B.data = A, B
    try:
        return [tuple(t.clone() for t in each) for each in products(part)]  # type: ignore[misc]
    finally:
        part.lora_A.data, part.lora_B.data = kept


def check(model: nn.Module, name: str) -> None:
    fill(model)
    dense = {}
    loss: Any = 0.0
    for part in parts_of(model):
        generator = torch.Generator().manual_seed(4)
        delta = part.lora_delta()
        dense[part.lora_A] = C = torch.randn(delta.shape, generator=generator, dtype=delta.dtype)
        loss = loss + (delta * C).sum()
    loss.backward()
    trained = {p: p.requires_grad for part in parts_of(model) for p in (part.lora_A, part.lora_B)}
    preconditioned(model, name)
    seen = 0
    for part in parts_of(model):
        C = part.to_matrix(dense[part.lora_A])
        gA, gB = (p.grad if p.grad is not None else torch.ones_like(p) for p in (part.lora_A, part.lora_B))
        power, s = part.scaling**-2 if METHODS[name].frozen else 1.0, part.scaling
        for k, ((B, A, rows), (new_B, new_A, _)) in enumerate(zip(products(part), new_factors(part, gA, gB), strict=True)):
            G, eye = (C[k] if C.ndim == 3 else C)[rows], DELTA * torch.eye(A.shape[0], dtype=A.dtype)
            if trained[part.lora_A]:
                torch.testing.assert_close(new_A, power * torch.linalg.solve(B.T @ B + eye, s * B.T @ G), rtol=1e-9, atol=1e-12)
            if trained[part.lora_B]:
                torch.testing.assert_close(new_B, power * s * G @ A.T @ torch.linalg.inv(A @ A.T + eye), rtol=1e-9, atol=1e-12)
            seen += 1
    assert seen


@pytest.mark.parametrize(("name", "variant"), [("riemannian", "plain"), ("riemannian", "lora_fa"), ("lora_fa", "lora_fa")])
@pytest.mark.parametrize("kind", CASES)
def test_every_kind_is_the_formula(kind: str, name: str, variant: str) -> None:
    check(nn.ModuleList([CASES[kind].layer(torch.float64, variant=variant, alpha=12)]), name)


@pytest.mark.parametrize("model", ["experts", "slices", "interleaved slices", "mixed"])
def test_experts_and_slices_are_the_formula_product_by_product(model: str) -> None:
    check(of_models(model), "riemannian")


@pytest.mark.parametrize("at_once", [gram.AT_ONCE, 1])
@pytest.mark.parametrize("over_active", [False, True])
@pytest.mark.parametrize(("name", "variant"), [("riemannian", "plain"), ("lora_fa", "lora_fa")])
def test_a_factor_that_experts_share_has_the_sum_of_their_gram_matrices(
    name: str, variant: str, over_active: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ↦ (B₁A, …) and B ↦ (BA₁, …) have the metrics Σ BₑᵀBₑ and Σ AₑAₑᵀ. Token rows beside them are left as they are."""
    monkeypatch.setattr(gram, "AT_ONCE", at_once)
    options = {"experts": {"shared_outer": True, "rank_over_active": over_active}}
    config = LoRAConfig(rank=4, alpha=5, target_modules=["experts"], variant=variant, kind_options=options, trainable_token_indices=[3])
    model = fill(apply_lora(tiny_qwen3_moe().double(), config=config))
    rows = model.get_input_embeddings().lora_rows
    parts = [part for _, layer in lora_layers(model) if layer.low_rank for part in layer.by_weight().values()]
    dense = [torch.randn(part.lora_delta().shape, dtype=torch.float64) for part in parts]
    (sum((part.lora_delta() * C).sum() for part, C in zip(parts, dense, strict=True)) + rows.sum()).backward()
    preconditioned(model, name)
    assert bool((rows.grad == 1).all())
    for part, C in zip(parts, dense, strict=True):
        (A, B), G, s = part.factor_matrices(), part.to_matrix(C), part.scaling
        power, eye = s**-2 if METHODS[name].frozen else 1.0, DELTA * torch.eye(A.shape[1], dtype=A.dtype)
        gA, gB, gram_A, gram_B = s * B.mT @ G, s * G @ A.mT, A @ A.mT, B.mT @ B
        if part.outer == "lora_A":
            gA, gram_B = gA.sum(0, keepdim=True), gram_B.sum(0, keepdim=True)
        else:
            gB, gram_A = gB.sum(0, keepdim=True), gram_A.sum(0, keepdim=True)
        if part.lora_A.requires_grad:
            torch.testing.assert_close(
                part.lora_A.grad, (power * torch.linalg.solve(gram_B + eye, gA)).flatten(0, 1), rtol=1e-9, atol=1e-12
            )
        torch.testing.assert_close(part.lora_B.grad, (power * gB @ torch.linalg.inv(gram_A + eye)).flatten(0, 1), rtol=1e-9, atol=1e-12)


def test_many_layers_at_a_time_or_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "AT_ONCE", 1)
    check(of_models("slices"), "riemannian")


@pytest.mark.parametrize("name", ["riemannian", "none"])
def test_an_sgd_step_of_the_product_does_not_depend_on_how_it_is_divided(name: str) -> None:
    """(B·M, M⁻¹·A) is the same update: to first order, so is its change. Without preconditioning it is another."""
    M = torch.randn(4, 4, dtype=torch.float64) + 2 * torch.eye(4, dtype=torch.float64)
    changes = []
    for mixed in (torch.eye(4, dtype=torch.float64), M):
        layer = CASES["linear"].layer(torch.float64)
        layer.lora_B.data, layer.lora_A.data = layer.lora_B.data @ mixed, torch.linalg.inv(mixed) @ layer.lora_A.data
        layer(CASES["linear"].x(torch.float64)).square().sum().backward()
        if name != "none":
            preconditioned(layer, name, 1e-14)
        changes.append(layer.lora_B.grad @ layer.lora_A + layer.lora_B @ layer.lora_A.grad)
    apart = (changes[0] - changes[1]).norm() / changes[0].norm()
    assert apart < 1e-9 if name == "riemannian" else apart > 0.1


def test_an_ill_conditioned_factor_in_float32_is_the_float64_result() -> None:
    """The Gram matrix of B has a condition number of 1e10, δ is 1e-6: in float32 the weak columns would be lost."""
    layer = CASES["linear"].layer(torch.float32)
    with torch.no_grad():
        layer.lora_B.copy_(torch.linalg.qr(torch.randn(10, 4))[0] * torch.tensor([10.0, 1.0, 1e-2, 1e-4]))
    layer.lora_A.grad, layer.lora_B.grad = layer.lora_A.data.clone(), layer.lora_B.data.clone()
    B, gA = (t.double() for t in (layer.lora_B.data, layer.lora_A.grad))
    torch.set_float32_matmul_precision("high")
    preconditioned(layer, "riemannian", 1e-6)
    expected = torch.linalg.solve(B.T @ B + 1e-6 * torch.eye(4, dtype=torch.float64), gA)
    torch.testing.assert_close(layer.lora_A.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_gradient_keeps_its_place_and_layout() -> None:
    """In place: DDP's buckets and an optimizer's lists hold the same tensor. A convolution's may be channels last."""
    layer = CASES["conv2d"].layer(torch.float64)
    layer(CASES["conv2d"].x(torch.float64)).square().sum().backward()
    layer.lora_A.grad = layer.lora_A.grad.to(memory_format=torch.channels_last)
    before, where = layer.lora_A.grad.clone(), layer.lora_A.grad
    preconditioned(layer, "riemannian")
    assert layer.lora_A.grad is where and where.is_contiguous(memory_format=torch.channels_last) and not torch.equal(where, before)


def test_missing_gradients_and_other_parameters_are_passed_over() -> None:
    model = of_models("mixed")
    fill(model)
    model[0].bias.requires_grad_(True)
    for part in (model[0], model[2]):
        part.lora_A.grad = torch.ones_like(part.lora_A)
    model[0].bias.grad = torch.ones_like(model[0].bias)
    preconditioned(model, "riemannian")
    assert model[0].lora_B.grad is None and model[1].lora_A.grad is None and bool((model[0].bias.grad == 1).all())
    assert all(not torch.equal(part.lora_A.grad, torch.ones_like(part.lora_A)) for part in (model[0], model[2]))


VIEWS = {"detach", "unbind", "select", "view", "transpose", "diagonal", "_unsafe_view", "expand", "_reshape_alias"}


class Operations(TorchDispatchMode):
    """Counts what launches work."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def stack_of(number: int) -> nn.Module:
    model = apply_lora(nn.Sequential(*(nn.Linear(24, 16) for _ in range(number))), config=LoRAConfig(rank=4, target_modules=r"\d+"))
    fill(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    return model


def test_the_cost_is_counted() -> None:
    """4·r²·(in + out) products a layer: two Gram matrices and two applications, 2·r² flops each per row. Launches do not grow."""
    model = stack_of(6)
    with FlopCounterMode(display=False) as flops:
        preconditioned(model, "riemannian")
    assert flops.get_total_flops() == 6 * 4 * 4**2 * (24 + 16)
    counts = []
    for number in (2, 12):
        model = stack_of(number)
        with Operations() as seen:
            preconditioned(model, "riemannian")
        counts.append([name for name in seen.names if name not in VIEWS])
    assert counts[0] == counts[1] and len(counts[0]) == 22, counts
