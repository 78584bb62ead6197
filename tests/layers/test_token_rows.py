"""Rows of an embedding and of a head that train: values and gradients against the dense weight, cost, dtypes, copies."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import LoRAConfig, apply_lora, merge_lora, unmerge_lora
from lightning_lora.ops.token_rows import replace_embedded, replace_projected

V, D, ROWS = 61, 8, [40, 7, 12]


class Scaled(nn.Embedding):
    """As Gemma's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class Net(nn.Module):
    def __init__(self, tied=True, bias=False, embedding=nn.Embedding, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embed = embedding(V, D, **options)
        self.mix = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.embed(ids))))


IDS = torch.tensor([[40, 1, 7, 60], [12, 40, 0, 2]])


def adapted(net, rows=ROWS, std=0.5):
    apply_lora(net, LoRAConfig(rank=2, target_modules=["mix"], trainable_token_indices=rows))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=std)
    return net


def dense(net, ids):
    """The same function with whole weights, and its gradients at the rows: of one weight if the two are tied."""
    index = torch.tensor(net.embed.spec.rows)
    rows = net.embed.lora_rows.detach().clone().requires_grad_()
    weight = net.embed.weight.detach().index_copy(0, index, rows.to(net.embed.weight.dtype))
    embedded = F.embedding(ids, weight, padding_idx=net.embed.padding_idx) * getattr(net.embed, "embed_scale", 1.0)
    head = weight if net.head.weight is net.embed.weight else net.head.weight.detach()
    y = F.linear(torch.tanh(net.mix(embedded)), head, net.head.bias)
    return y, rows


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tied": False},
        {"bias": True},
        {"embedding": Scaled},
        {"padding_idx": 7},
        {"padding_idx": 7, "tied": False},
        {"sparse": True},
    ],
    ids=str,
)
def test_values_and_gradients_are_the_dense_weights(options):
    net = adapted(Net(**options).double())
    expected, rows = dense(net, IDS)
    y = net(IDS)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    (wanted,) = torch.autograd.grad(expected, rows, g)
    (got,) = torch.autograd.grad(y, net.embed.lora_rows, g)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)
    assert got.layout is torch.strided
    if options.get("padding_idx") == 7 and not options.get("tied", True):
        assert not got[ROWS.index(7)].any()  # as in the base, which never trains that row


def test_no_step_makes_a_tensor_of_the_weights_size():
    """PEFT copies the weight in every forward pass, and its gradient has the weight's size."""
    sizes = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            own = not func.is_view and func is not torch.ops.aten.detach.default
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if own and isinstance(t, torch.Tensor))
            return out

    net = adapted(Net())
    with Record():
        net(IDS[:, :3]).sum().backward()
    assert sizes
    assert V * D not in sizes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merge_writes_the_rows_and_an_unmerge_is_exact(dtype, tied):
    net = adapted(Net(tied=tied).to(dtype))
    assert net.embed.lora_rows.dtype == torch.float32
    base, keys = net.embed.weight.detach().clone(), set(Net().state_dict())
    embedded = net.embed(IDS)
    merge_lora(net)
    assert torch.equal(net.embed(IDS), embedded)
    assert torch.equal(net.embed.weight[ROWS], net.embed.lora_rows.to(dtype))
    others = [row for row in range(V) if row not in ROWS]
    assert torch.equal(net.embed.weight[others], base[others])
    assert (net.head.weight is net.embed.weight) == tied
    assert set(net.state_dict()) == keys
    unmerge_lora(net)
    assert torch.equal(net.embed.weight, base)
    assert torch.equal(net.embed(IDS), embedded)


def test_the_whole_weight_is_checked_when_it_is_unmerged():
    net = merge_lora(adapted(Net()))
    with torch.no_grad():
        net.embed.weight[0] += 1
    with pytest.raises(ValueError, match=r"'(embed|head)'.* would not come back bit for bit: the merged weight changed since the merge"):
        unmerge_lora(net)
    assert net.embed.merged


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_one_parameter_too(how):
    net = adapted(Net().double())
    if how == "deepcopy":
        other = copy.deepcopy(net)
    else:
        file = io.BytesIO()
        torch.save(net, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(other(IDS), net(IDS))
    assert other.head.lora_source is other.embed
    other.embed.lora_rows.data.zero_()
    assert not torch.equal(other(IDS), net(IDS))
    assert [name for name, _ in other.named_parameters() if "lora_rows" in name] == ["embed.lora_rows"]


def test_a_base_that_is_loaded_later_brings_its_rows():
    net, other = apply_lora(Net(), LoRAConfig(target_modules=["mix"], trainable_token_indices=ROWS)), Net()
    other.embed.weight.data.normal_()
    net.load_state_dict(other.state_dict())
    torch.testing.assert_close(net(IDS), other(IDS))
    net.embed.lora_rows.data += 1  # it has trained: a base alone is no whole state any more
    with pytest.raises(RuntimeError, match=r"Missing key.*embed\.lora_rows"):
        net.load_state_dict(Net().state_dict())


def test_on_the_meta_device_the_rows_come_with_the_base():
    with torch.device("meta"):
        net = Net()
    apply_lora(net, LoRAConfig(target_modules=["mix"], trainable_token_indices=ROWS))
    net.to_empty(device="cpu")
    net.head.weight = net.embed.weight  # what materializing breaks, as for any tied model
    for module in (net.embed, net.mix, net.head):
        module.reset_parameters()
    other = Net()
    net.load_state_dict(other.state_dict())
    assert net.embed.lora_index.tolist() == ROWS
    torch.testing.assert_close(net(IDS), other(IDS))


def test_a_state_that_takes_the_place_of_the_meta_devices_brings_the_rows_numbers_along():
    with torch.device("meta"):
        net = Net(tied=False)
    apply_lora(net, LoRAConfig(rank=2, target_modules=["mix"], trainable_token_indices=ROWS))
    other = adapted(Net(tied=False))
    net.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(net(IDS), other(IDS))


def test_under_autocast_and_in_half_precision_the_output_has_the_bases_dtype():
    net = adapted(Net(bias=True))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(IDS)
        assert (net.embed(IDS).dtype, y.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(y.float(), net(IDS), rtol=0.05, atol=0.1)
    y.float().sum().backward()
    assert net.embed.lora_rows.grad.dtype == torch.float32


def test_ids_of_another_integer_type_and_shape():
    rows, weight = torch.randn(3, D), torch.randn(V, D)
    index = torch.tensor(ROWS)
    ascending, order = index.sort()
    whole = weight.index_copy(0, index, rows)
    for ids in (IDS.int(), IDS[0, 0], IDS.t(), IDS[:0]):
        got = replace_embedded(F.embedding(ids, weight), ids, rows, ascending, order)
        assert torch.equal(got, F.embedding(ids, whole))
    x, bias = torch.randn(2, 5, D, dtype=torch.float64), torch.randn(V, dtype=torch.float64)
    got = replace_projected(F.linear(x, weight.double(), bias), x, rows, index, bias)
    torch.testing.assert_close(got, F.linear(x, whole.double(), bias), rtol=0, atol=1e-12)


def test_it_compiles_to_one_graph():
    net = adapted(Net())
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), net(IDS))
