"""Weights taken apart for an operation and put together again; `lora_linears` and the gated MLP over packed ones."""

import weakref

import pytest
import torch
from torch import library
from torch.nn.functional import linear, silu
from torch.testing import assert_close

from lightning_lora.ops import fused_linear, plain
from lightning_lora.ops.frozen_weight import FrozenWeight, flatten_weights, unflatten_weights
from lightning_lora.ops.fused_linear import lora_linears
from lightning_lora.quantization.bitsandbytes import FrozenWeight4bit
from tests.quantized import stored4bit

ROWS, IN, OUTS, RANKS, SCALES = 6, 16, (32, 48, 24), (3, 2, 4), (0.7, 2.0, 0.7)
PACKED = {"nf4": {}, "nf4, plain scales": {"nested": False}, "fp4": {"kind": "fp4"}}


@pytest.fixture
def one_at_a_time(monkeypatch):
    """How often a weight was unpacked for a gradient; fails as soon as two are there at once."""
    made = []

    unpack = FrozenWeight4bit.dense

    def dense(self, dtype):
        assert not any(ref() is not None for ref in made), "the dense weight before this one is still there"
        weight = unpack(self, dtype)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(FrozenWeight4bit, "dense", dense)
    return made


def operands(shapes, **options):
    """x, the weights as they are stored and unpacked, biases and factors, in fp32."""
    pairs = [stored4bit(*shape, **options) for shape in shapes]
    torch.manual_seed(0)
    x = torch.randn(ROWS, shapes[0][1], requires_grad=True)
    biases = [torch.randn(shapes[0][0]), *[None] * (len(shapes) - 1)]
    A_list = [(torch.randn(r, width) * 0.3).requires_grad_() for r, (_, width) in zip(RANKS, shapes, strict=False)]
    B_list = [(torch.randn(out, r) * 0.3).requires_grad_() for r, (out, _) in zip(RANKS, shapes, strict=False)]
    return x, [stored for stored, _ in pairs], [dense.double() for _, dense in pairs], biases, A_list, B_list


def siblings(n=3, **options):
    return operands([(out, IN) for out in OUTS[:n]], **options)


def definition(x, Ws, biases, A_list, B_list, keep=1.0):
    """In float64."""
    x, biases = x.double(), [None if b is None else b.double() for b in biases]
    rows = zip(Ws, biases, A_list, B_list, SCALES[: len(Ws)], strict=True)
    return [linear(x, W, b) + linear(linear(x * keep, A.double()), B.double()) * s for W, b, A, B, s in rows]


def gradients(outputs, leaves, **options):
    torch.manual_seed(1)
    return torch.autograd.grad(sum((y * torch.randn(y.shape).to(y.dtype)).sum() for y in outputs), leaves, **options)


def close(mine, exact):
    for ours, other in zip(mine, exact, strict=True):
        assert (ours.double() - other).norm() <= 2e-6 * other.norm()


def test_plain_and_packed_weights_side_by_side():
    x, stored, Ws, biases, A_list, B_list = siblings()
    stored[1] = Ws[1].float()
    mine, exact = lora_linears(x, stored, biases, A_list, B_list, SCALES), definition(x, Ws, biases, A_list, B_list)
    close(mine, exact)
    close(gradients(mine, [x, *A_list, *B_list]), gradients(exact, [x, *A_list, *B_list]))


def test_mixed_weights_are_put_together_as_they_were():
    packed, plain_weight, flat = stored4bit(32, IN)[0], torch.randn(3, IN), stored4bit(24, IN, nested=False)[0]
    tensors, weights = flatten_weights([packed, plain_weight, flat])
    assert unflatten_weights(tensors, weights) is weights  # eager code hands on the weights themselves
    layouts = [weight.layout for weight in weights]
    assert (len(tensors), layouts) == (10, [packed.layout, "", flat.layout])
    for made, given in zip(unflatten_weights(tensors, layouts), weights, strict=True):
        assert type(made) is type(given) and made.layout == given.layout
        assert all(a is b for a, b in zip(made.tensors, given.tensors, strict=True))
        assert torch.equal(made.dense(torch.float32), given.dense(torch.float32))
    assert FrozenWeight(plain_weight).dense(torch.float32) is plain_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_in_another_dtype_leaves_its_description_alone(dtype):
    packed, dense = stored4bit(32, IN)
    before = packed.state.dtype
    assert torch.equal(packed.dense(dtype), dense.to(dtype))
    assert packed.state.dtype == before


@pytest.mark.parametrize("options", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("n", [1, 3])
def test_linears_are_the_definition_with_every_gradient(n, options, one_at_a_time):
    x, stored, Ws, biases, A_list, B_list = siblings(n, **options)
    mine, exact = lora_linears(x, stored, biases, A_list, B_list, SCALES[:n]), definition(x, Ws, biases, A_list, B_list)
    assert len(one_at_a_time) == 0
    found = gradients(mine, [x, *A_list, *B_list])
    assert len(one_at_a_time) == n
    close(mine, exact)
    close(found, gradients(exact, [x, *A_list, *B_list]))


def test_an_input_without_gradient_unpacks_nothing_backward(one_at_a_time):
    x, stored, Ws, biases, A_list, B_list = siblings()
    found = gradients(lora_linears(x.detach(), stored, biases, A_list, B_list, SCALES), [*A_list, *B_list])
    assert len(one_at_a_time) == 0
    close(found, gradients(definition(x.detach(), Ws, biases, A_list, B_list), [*A_list, *B_list]))


def test_linears_with_dropout(monkeypatch):
    x, stored, Ws, biases, A_list, B_list = siblings()
    mask = torch.rand(ROWS, IN) < 0.4
    monkeypatch.setattr(plain, "draw_drop", lambda rows, p: (plain.Drop(mask), 0.4))
    mine = lora_linears(x, stored, biases, A_list, B_list, SCALES, dropout=0.4)
    exact = definition(x, Ws, biases, A_list, B_list, (~mask) / 0.6)
    close(mine, exact)
    close(gradients(mine, [x, *A_list, *B_list]), gradients(exact, [x, *A_list, *B_list]))


def test_second_derivatives():
    x, stored, Ws, biases, A_list, B_list = siblings(2)
    leaves = [x, *A_list, *B_list]

    def twice(outputs):
        return torch.autograd.grad(
            sum(g.square().sum() for g in gradients([y.square() for y in outputs], leaves, create_graph=True)), leaves
        )

    close(twice(lora_linears(x, stored, biases, A_list, B_list, SCALES[:2])), twice(definition(x, Ws, biases, A_list, B_list)))


def test_biases_can_train():
    x, stored, Ws, biases, A_list, B_list = siblings()
    biases[0].requires_grad_()
    mine, exact = lora_linears(x, stored, biases, A_list, B_list, SCALES), definition(x, Ws, biases, A_list, B_list)
    close(gradients(mine, [biases[0]]), gradients(exact, [biases[0]]))


def test_nothing_dense_is_kept():
    """Of the weights, the packed tensors themselves: no new byte."""
    x, stored, _, biases, A_list, B_list = siblings()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linears(x, stored, biases, A_list, B_list, SCALES)
    given = {t.data_ptr() for t in [x, *biases, *A_list, *B_list, *(t for weight in stored for t in weight.tensors)] if t is not None}
    new = [tuple(t.shape) for t in kept if t.data_ptr() not in given]
    assert new == [(ROWS, sum(RANKS)), (sum(RANKS), IN)]  # t and the A's below one another; the B's are as they were


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiled_the_weight_is_unpacked_out_of_sight(traced, dropout):
    """Two operations, and no dense weight among what the forward graph hands to the backward."""
    x, stored, _, biases, A_list, B_list = siblings()
    compiled, graphs = traced(lora_linears)
    mine = compiled(x, stored, biases, A_list, B_list, SCALES, dropout)
    found = gradients(mine, [x, *A_list, *B_list])
    eager = lora_linears(x, stored, biases, A_list, B_list, SCALES, dropout)
    assert_close((mine, found), (eager, gradients(eager, [x, *A_list, *B_list])))
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert [name for name in targets if "lightning_lora" in name] == [
        f"lightning_lora.linears_{way}.default" for way in ("forward", "backward")
    ]
    assert not [name for name in targets if "bitsandbytes" in name]
    shapes = {tuple(node.meta["val"].shape) for node in graphs[0].graph.nodes if hasattr(node.meta.get("val"), "shape")}
    assert (ROWS, IN) in shapes and not shapes & {(out, IN) for out in OUTS}


@pytest.mark.parametrize("options", PACKED.values(), ids=PACKED)
def test_operations_say_their_shapes_right(options):
    x, stored, _, biases, A_list, B_list = siblings(**options)
    x, A_list, B_list = x.detach(), [A.detach() for A in A_list], [B.detach() for B in B_list]
    tensors, layouts = flatten_weights(stored)[0], [weight.layout for weight in stored]
    out_scales = [torch.rand(len(B_list[0])), None, None]
    forward = (x, None, 0, False, list(SCALES), tensors, layouts, biases, A_list, B_list, out_scales)
    outputs = fused_linear._forward(*forward)
    dys, base_outputs = [torch.randn_like(y) for y in outputs[:3]], [outputs[8], None, None]
    backward = (
        dys,
        x,
        outputs[3],
        None,
        0,
        False,
        list(SCALES),
        tensors,
        layouts,
        biases,
        A_list,
        B_list,
        out_scales,
        outputs[4:8],
        base_outputs,
        True,
    )
    for operation, given in ((torch.ops.lightning_lora.linears_forward, forward), (torch.ops.lightning_lora.linears_backward, backward)):
        library.opcheck(operation.default, given, test_utils=["test_schema", "test_faketensor"])


WIDE = 48
MLP = [(WIDE, IN), (WIDE, IN), (24, WIDE)]


def gated(x, Ws, A_list, B_list, keep=1.0, keep_down=1.0):
    """The MLP's definition, in float64."""

    def project(z, k, mask):
        return linear(z, Ws[k]) + linear(linear(z * mask, A_list[k].double()), B_list[k].double()) * SCALES[k]

    x = x.double()
    return project(silu(project(x, 0, keep)) * project(x, 1, keep), 2, keep_down)


@pytest.mark.parametrize("options", PACKED.values(), ids=PACKED)
def test_a_gated_mlp_is_the_definition_with_every_gradient(options, one_at_a_time):
    pytest.importorskip("triton")
    from lightning_lora.ops.gated_mlp import lora_gated_mlp

    x, stored, Ws, _, A_list, B_list = operands(MLP, **options)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mine = lora_gated_mlp(x, stored, A_list, B_list, SCALES)
    found = gradients([mine], [x, *A_list, *B_list])
    assert len(one_at_a_time) == 3
    assert not {tuple(t.shape) for t in kept} & set(MLP)
    exact = gated(x, Ws, A_list, B_list)
    for ours, other in zip([mine, *found], [exact, *gradients([exact], [x, *A_list, *B_list])], strict=True):
        assert (ours.double() - other).norm() <= 1e-5 * other.norm()


def test_a_gated_mlp_with_dropout_and_second_derivatives():
    pytest.importorskip("triton")
    from lightning_lora.ops import triton_low_rank
    from lightning_lora.ops.gated_mlp import lora_gated_mlp

    x, stored, Ws, _, A_list, B_list = operands(MLP)
    leaves = [x, *A_list, *B_list]
    torch.manual_seed(2)
    mine = lora_gated_mlp(x, stored, A_list, B_list, SCALES, 0.5)
    torch.manual_seed(2)
    masks = []
    for size in (IN, WIDE):  # drawn in this order
        drop, _ = triton_low_rank.draw_drop(x, 0.5)
        masks.append(triton_low_rank.project(torch.ones(ROWS, size), torch.eye(size), drop) * 2)
    exact = gated(x, Ws, A_list, B_list, *masks)
    first, defined = (gradients([y.square()], leaves, create_graph=True) for y in (mine, exact))
    second, exact_second = (torch.autograd.grad(sum(g.square().sum() for g in grads), leaves) for grads in (first, defined))
    for ours, other in zip([mine, *first, *second], [exact, *defined, *exact_second], strict=True):
        assert (ours.double() - other).norm() <= 1e-4 * other.norm()
