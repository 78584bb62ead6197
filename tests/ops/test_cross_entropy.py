import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.ops import cross_entropy
from lightning_lora.ops.cross_entropy import chunked_cross_entropy, unchunkable

N, D, V = 70, 16, 33


def make(bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    labels = torch.randint(0, V, (N,))
    labels[::5] = -100
    return [t.to(dtype) for t in (hidden, weight)] + [labels, torch.randn(V, dtype=torch.float64).to(dtype) if bias else None]


def plain(hidden, weight, labels, bias=None):
    return F.cross_entropy(F.linear(hidden, weight, bias), labels)


def both(loss, hidden, factor=3.0):
    hidden = hidden.detach().requires_grad_()
    value = loss(hidden)
    return value, torch.autograd.grad(value * factor, hidden)[0]


@pytest.mark.parametrize("chunk", [1, 32, 35, 70, 2048])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient_are_those_of_cross_entropy(chunk, bias):
    hidden, *rest = make(bias)
    ours, theirs = (both(lambda h, f=f: f(h, *rest), hidden) for f in (lambda *a: chunked_cross_entropy(*a, chunk=chunk), plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [32, 2048])
def test_each_rows_loss_and_its_gradient_are_those_of_cross_entropy(chunk):
    hidden, weight, labels, bias = make()
    scales = torch.randn(N, dtype=torch.float64)
    ours, theirs = (
        both(lambda h, f=f: (f(h, weight, labels, bias, reduction="none") * scales).sum(), hidden)
        for f in (
            lambda *args, **kw: chunked_cross_entropy(*args, chunk=chunk, **kw),
            lambda h, w, y, b, **kw: F.cross_entropy(F.linear(h, w, b), y, **kw),
        )
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="reduction='sum' is not known"):
        chunked_cross_entropy(hidden, weight, labels, reduction="sum")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [None, "hidden", "rows"])
@pytest.mark.parametrize("bias", [False, True])
def test_replaced_rows_and_their_gradient_are_those_of_the_whole_weight(bias, frozen, reduction):
    hidden, weight, labels, b = make(bias)
    index, rows = torch.tensor([30, 2, 7]), torch.randn(3, D, dtype=torch.float64)
    labels[1] = 2
    scales = torch.randn(N, dtype=torch.float64)

    def both_ways(loss):
        given = {"hidden": hidden.clone(), "rows": rows.clone()}
        trained = [tensor.requires_grad_() for name, tensor in given.items() if name != frozen]
        value = loss(given["hidden"], given["rows"])
        value = value if reduction == "mean" else (value * scales).sum()
        return value, torch.autograd.grad(value * 3.0, trained)

    ours = both_ways(lambda h, r: chunked_cross_entropy(h, weight, labels, b, chunk=32, reduction=reduction, replaced=(index, r)))
    theirs = both_ways(lambda h, r: F.cross_entropy(F.linear(h, weight.index_copy(0, index, r), b), labels, reduction=reduction))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    trains = chunked_cross_entropy(hidden, weight.clone().requires_grad_(), labels, b, replaced=(index, rows))
    torch.testing.assert_close(trains, plain(hidden, weight.index_copy(0, index, rows), labels, b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_loses_no_more_than_the_plain_way(autocast):
    """bf16 itself, and fp32 under autocast, against float64; most rows are nearly sure of their label, where digits get lost."""
    hidden, weight, labels, _ = make(bias=False)
    weight = weight * 3
    labels = torch.where(torch.arange(N) % 3 > 0, (hidden @ weight.t()).argmax(-1), labels)
    exact, exact_grad = both(lambda h: plain(h, weight, labels), hidden)
    dtype = torch.float32 if autocast else torch.bfloat16
    low, low_weight = hidden.to(dtype), weight.to(dtype)
    errors = []
    for f in (
        lambda h: chunked_cross_entropy(h, low_weight, labels, chunk=16),
        lambda h: F.cross_entropy((h @ low_weight.t()).float(), labels),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value, grad = both(f, low)
        assert value.dtype == torch.float32 and grad.dtype == dtype
        errors.append(((value - exact).abs().item(), ((grad - exact_grad).norm() / exact_grad.norm()).item()))
    (ours, ours_grad), (theirs, theirs_grad) = errors
    assert ours <= theirs + 1e-3 and ours_grad <= 1.2 * theirs_grad


def test_scaled_loss_in_fp16_neither_over_nor_underflows():
    """What a gradient scaler does to the loss, with one row and with many."""
    hidden, weight, labels, _ = make(bias=False)
    for rows in (slice(1, 2), slice(None)):
        _, exact = both(lambda h, r=rows: plain(h, weight, labels[r]), hidden[rows], 2.0**12)
        _, grad = both(lambda h, r=rows: chunked_cross_entropy(h, weight.half(), labels[r]), hidden[rows].half(), 2.0**12)
        torch.testing.assert_close(grad.double(), exact, rtol=2e-2, atol=2e-2 * exact.abs().max().item())
        small = both(lambda h, r=rows: chunked_cross_entropy(h, weight.half(), labels[r]), hidden[rows].half(), 2.0**16)[1]
        assert not small.isnan().any()


class Widest(TorchDispatchMode):
    """The most rows of logits that any tensor had."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape[-1:] == (V,):
            self.rows = max(self.rows, out.numel() // V)
        return out


def test_logits_never_exist_all_at_once():
    hidden, *rest = make()
    with Widest() as widest:
        both(lambda h: chunked_cross_entropy(h, *rest, chunk=32), hidden)
    assert widest.rows == 32


def test_without_gradients_only_the_loss_is_computed():
    hidden, *rest = make()
    products = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            products.extend([1] * (func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)))
            return func(*args, **(kwargs or {}))

    for context in (torch.no_grad(), torch.enable_grad()):
        with context, Count():
            value = chunked_cross_entropy(hidden.clone().requires_grad_(torch.is_grad_enabled()), *rest)
        torch.testing.assert_close(value, plain(hidden, *rest))
    assert len(products) == 1 + 2


def test_no_row_that_counts():
    hidden, weight, labels, bias = make()
    ours, theirs = (both(lambda h, f=f: f(h, weight, torch.full_like(labels, -100), bias), hidden) for f in (chunked_cross_entropy, plain))
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert chunked_cross_entropy(hidden[:0], weight, labels[:0]).isnan()


@pytest.mark.parametrize("which", [1, 3])
def test_a_head_that_trains_gets_its_gradient(which):
    tensors = make()
    tensors[which].requires_grad_()
    ours, theirs = (torch.autograd.grad(f(*tensors), tensors[which])[0] for f in (chunked_cross_entropy, plain))
    torch.testing.assert_close(ours, theirs)


def test_second_derivatives_are_refused():
    hidden, *rest = make()
    hidden.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(chunked_cross_entropy(hidden, *rest), hidden, create_graph=True)


def test_backward_may_run_twice():
    hidden, *rest = make()
    hidden.requires_grad_()
    loss = chunked_cross_entropy(hidden, *rest)
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_compiled_it_is_the_same_and_takes_any_number_of_rows(monkeypatch):
    hidden, *rest = make()
    weight, labels, bias = rest
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(cross_entropy._loss_and_gradient, backend=counter)
    monkeypatch.setattr(cross_entropy, "_compiled", lambda: compiled)
    for rows in (70, 50, 64, 31, 70):
        ours, theirs = (
            both(lambda h, f=f, n=rows: f(h, weight, labels[:n], bias), hidden[:rows])
            for f in (lambda *a: chunked_cross_entropy(*a, chunk=32, compiled=True), plain)
        )
        torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 1


def test_chunk_is_checked():
    with pytest.raises(ValueError, match="chunk=0 must be"):
        chunked_cross_entropy(*make(), chunk=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda head: head.requires_grad_(True), "trains"),
        (lambda head: apply_lora(nn.Sequential(head), config=LoRAConfig(rank=2, target_modules="all-linear")), "LoRALinear"),
        (lambda head: setattr(head, "forward", lambda x: x), "forward of its own"),
        (lambda head: setattr(head, "weight", nn.Parameter(torch.zeros(7), requires_grad=False)), "sharded"),
        (lambda head: head._parameters.pop("weight"), "sharded"),
        (lambda head: None, None),
    ],
)
def test_which_heads_can_be_chunked(change, reason):
    head = nn.Linear(4, 7).requires_grad_(False)
    change(head)
    assert (unchunkable(head) is None) if reason is None else (reason in unchunkable(head))
    assert "NoneType" in unchunkable(None)
