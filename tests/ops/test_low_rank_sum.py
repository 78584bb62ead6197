"""The sum W + s·P·Q in place of a weight: every product as with the dense sum, and nothing else."""

import pytest
import torch
import torch.nn.functional as F

from lightning_lora.ops import low_rank_sum
from lightning_lora.ops.grouped_linear import grouped_lora_linear
from lightning_lora.ops.low_rank_sum import LowRankSum

E, M, N, R, S = 3, 8, 12, 2, 0.7


def parts(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in ((E, M, N), (E, M, R), (E, R, N))]


def dense(W, P, Q):
    return W + S * P @ Q


def x(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()


PRODUCTS = {
    "linear": lambda T: F.linear(x(5, N), T[1], torch.ones(M, dtype=torch.float64)),
    "linear by index tensor": lambda T: F.linear(x(5, N), T[torch.tensor(2)]),
    "matmul": lambda T: x(5, M) @ T[0],
    "matmul of the transposed": lambda T: x(5, N).matmul(T[0].T),
    "from the left": lambda T: T[2] @ x(N, 5),
    "bmm": lambda T: torch.bmm(x(E, 4, M), T),
    "bmm of the transposed": lambda T: torch.bmm(x(E, 4, N), T.transpose(1, 2)),
    "bmm, some of them, from the left": lambda T: torch.bmm(T[torch.tensor([2, 0, 2, 1])], x(4, N, 1)),
    "matmul of all": lambda T: torch.matmul(x(E, 4, N), T.mT),
    "matmul of a contiguous one": lambda T: torch.matmul(x(E, 4, N), T.mT.contiguous()),
    "matmul of a slice": lambda T: torch.matmul(x(2, 4, M), T[1:]),
    "as transformers' own operator": lambda T: torch.ops.transformers.grouped_mm_fallback(x(6, M), T, offs=torch.tensor([2, 2, 6])),
}


@pytest.fixture(scope="module", autouse=True)
def _the_operator():
    import transformers.integrations.moe  # noqa: F401


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_products_and_gradients_are_those_of_the_dense_sum(product):
    mine, theirs = parts(), parts()
    found, wanted = product(LowRankSum(*mine, S)), product(dense(*theirs))
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for (a,), (b,) in zip(
        [torch.autograd.grad((found * weights).sum(), [p], retain_graph=True) for p in mine],
        [torch.autograd.grad((wanted * weights).sum(), [p], retain_graph=True) for p in theirs],
        strict=True,
    ):
        torch.testing.assert_close(a, b)
        assert b.any()


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products(rank, transposed):
    """float32: torch has no float64 there. Ranks whose rows are not aligned are filled with zeros."""
    generator = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(shape, generator=generator) for shape in ((E, M, N), (E, rank, N), (E, M, rank)))
    given, offsets = x(6, N, dtype=torch.float32), torch.tensor([2, 2, 6], dtype=torch.int32)
    T = LowRankSum(W.mT.contiguous(), A.mT, B.mT, S) if transposed else LowRankSum(W, B, A, S).transpose(-2, -1)
    found = F.grouped_mm(given, T, offs=offsets)
    wanted = torch.cat([given[:2] @ (W + S * B @ A)[0].T, given[2:] @ (W + S * B @ A)[2].T])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_grouped_product_is_one_operation_unless_something_else_is_asked(monkeypatch):
    calls = []
    monkeypatch.setattr(low_rank_sum, "grouped_lora_linear", lambda *args: calls.append(args) or grouped_lora_linear(*args))
    W, A, B = (torch.ones(shape) for shape in ((E, M, N), (E, 4, N), (E, M, 4)))
    given, offsets = x(6, N, dtype=torch.float32), torch.tensor([2, 2, 6], dtype=torch.int32)
    T = LowRankSum(W, B, A, S).transpose(-2, -1)
    found = F.grouped_mm(given, T, offs=offsets)
    assert len(calls) == 1 and calls[0][1].shape == (E, N, M)
    W.requires_grad_()  # trained too
    torch.testing.assert_close(F.grouped_mm(given, T, offs=offsets), found)
    assert len(calls) == 1


def test_the_factors_take_the_products_dtype():
    W, P, Q = parts(torch.float32)
    found = F.linear(x(5, N, dtype=torch.float32).bfloat16(), LowRankSum(W.bfloat16(), P, Q, S)[0])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), x(5, N, dtype=torch.float32) @ dense(W, P, Q)[0].T, rtol=0.05, atol=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x(5, N, dtype=torch.float32), LowRankSum(W, P, Q, S)[0]).dtype == torch.bfloat16


def test_the_factors_of_all_matrices_are_cast_at_once():
    W, P, Q = parts(torch.float32)
    given, T = x(5, N, dtype=torch.bfloat16), LowRankSum(W.detach().bfloat16(), P, Q, S)
    with torch.profiler.profile() as profiler:
        found = [F.linear(given, T[k]) for k in range(E)]
    assert all(y.dtype == torch.bfloat16 for y in found)
    assert sum(event.name == "aten::_to_copy" for event in profiler.events()) == 2


def test_dropout_is_on_the_factors_input():
    W, P, Q = parts()
    given = x(5, N)
    torch.manual_seed(3)
    found = F.linear(given, LowRankSum(W, P, Q, S, dropout=0.5)[0])
    torch.manual_seed(3)
    dropped = F.dropout(given, 0.5)
    torch.testing.assert_close(found, given @ W[0].T + S * dropped @ Q[0].T @ P[0].T)
    assert not torch.equal(dropped, given)


def test_what_the_code_may_ask():
    T = LowRankSum(*parts(), S)
    assert (tuple(T.shape), T.dtype, T.ndim, T.size(0), len(T), T.device.type) == ((E, M, N), torch.float64, 3, E, E, "cpu")
    assert tuple(T[0].t().shape) == (N, M) and not hasattr(T, "grad_fn")


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (lambda T: T[0] + 1, None),
        (lambda T: torch.relu(T), "relu"),
        (lambda T: T[0][:, :2], r"\["),
        (lambda T: T.transpose(0, 1), "transpose"),
        (lambda T: T[torch.tensor([True, False, True])], r"\["),
        (lambda T: torch.einsum("ni,eio->neo", x(2, M), T), "einsum"),
        (lambda T: torch.bmm(T, T), "bmm"),
        (lambda T: F.linear(T[0], x(4, N)), "linear"),
        (lambda T: T.abs(), "abs"),
    ],
)
def test_anything_else_raises_and_names_it(use, name):
    with pytest.raises(
        (ValueError, AttributeError, TypeError), match=None if name is None else rf"{name}.* of a weight with LoRA is not known"
    ):
        use(LowRankSum(*parts(), S))
