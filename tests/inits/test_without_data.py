"""How A and B start: an adapted model is the base, and where B·A is not zero the start is kept beside a base that never changes."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    apply_lora,
    initialize_from_data,
    load_adapter,
    merge_lora,
    save_adapter,
    unload_lora,
    unmerge_lora,
)
from lightning_lora.layers import lora_layers
from lightning_lora.registry import INITS, data_of, has_start
from tests.conftest import base_bits, fill, same_bits, snapshot
from tests.lit import CONFIG, LitNet, bits, make_net, trainer
from tests.quantized import packed_linear

KINDS = {
    "linear": (lambda: nn.Linear(400, 30), "lora_A", 400),
    "embedding": (lambda: nn.Embedding(300, 64), "lora_B", 8),
    "conv": (lambda: nn.Conv2d(32, 32, 3, groups=2), "lora_A", 16 * 9),
}
ZERO = ["gaussian", "kaiming"]
NAMES = sorted(name.replace("[n]", "4") for name in INITS)
DATA = [name for name in NAMES if data_of(name) is not None]  # until it has data, such an adapter starts as kaiming's
START = [name for name in NAMES if has_start(name) and name not in DATA]
X = torch.linspace(-1, 1, 40).view(5, 8)


def layer(kind, **fields):
    model = nn.Module()
    model.layer = KINDS[kind][0]()
    return apply_lora(model, config=LoRAConfig(target_modules=["layer"], **fields)).layer


def test_every_init_is_tested_here():
    assert {*ZERO, *START, *DATA, "orthogonal", "mica", "loftq"} == {*NAMES} and START == ["olora", "pissa", "pissa_niter_4"]


@pytest.mark.parametrize("n", [0, 1, 16])
def test_any_number_of_iterations(n):
    """More of them come nearer to the exact decomposition."""
    model, exact = started("linear", f"pissa_niter_{n}")[0].layer, started("linear", "pissa")[0].layer
    error = (model.lora_B @ model.lora_A - exact.lora_B @ exact.lora_A).norm() / (exact.lora_B @ exact.lora_A).norm()
    assert (error < 1e-3) == (n == 16)


@pytest.mark.parametrize("name", ["pissa_niter_", "pissa_niter_x", "pissa_niter_-1", "pissa_niter_[n]", "niter_4"])
def test_a_number_has_to_be_one(name):
    with pytest.raises(ValueError, match=re.escape(f"init={name!r} is not known; there are corda, eva")):
        layer("linear", init=name)


@pytest.mark.parametrize("n", ["1001", "10000", "9" * 5000])
def test_a_number_has_a_bound(n):
    with pytest.raises(ValueError, match=r"init='pissa_niter_\d+': n is above 1,000; give fewer iterations, such as pissa_niter_16"):
        layer("linear", init=f"pissa_niter_{n}")


@pytest.mark.parametrize("init", ZERO)
@pytest.mark.parametrize("kind", KINDS)
def test_one_factor_is_random_the_other_zero(kind, init):
    adapted = layer(kind, init=init)
    random = KINDS[kind][1]
    assert adapted.lora_parameters()[random].count_nonzero() == adapted.lora_parameters()[random].numel()
    other = {"lora_A": "lora_B", "lora_B": "lora_A"}[random]
    assert adapted.lora_parameters()[other].count_nonzero() == 0
    assert list(adapted.lora_parameters()) == ["lora_A", "lora_B"] and adapted.adds_nothing()


@pytest.mark.parametrize("kind", KINDS)
def test_kaiming_is_uniform_within_one_over_root_fan_in(kind):
    _, random, fan_in = KINDS[kind]
    values = layer(kind, init="kaiming").lora_parameters()[random].detach()
    bound = 1 / math.sqrt(fan_in)
    assert values.abs().max() <= bound
    assert values.abs().max() > 0.97 * bound
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)  # of a uniform distribution
    assert abs(values.mean().item()) < 0.1 * bound


@pytest.mark.parametrize("rank", [2, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_gaussian_has_standard_deviation_one_over_rank(kind, rank):
    values = layer(kind, init="gaussian", rank=rank).lora_parameters()[KINDS[kind][1]].detach()
    assert values.std().item() == pytest.approx(1 / rank, rel=0.2)
    assert values.abs().max() > 2 / rank  # no uniform distribution reaches there


def test_orthogonal_starts_at_random_and_adds_nothing():
    adapted = layer("linear", init="orthogonal", rank=6)
    A, B = adapted.lora_A.detach().double(), adapted.lora_B.detach().double()
    assert A.std() > 0.05 and B.std() > 0.05
    assert (B @ A).abs().max() < 1e-6 and adapted.adds_nothing()
    adapted.lora_B.data[:, 0] += 1e-3
    assert not adapted.adds_nothing()


@pytest.mark.parametrize("init", sorted({*NAMES} - {"loftq"}))
@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_does_not_matter(init, default):
    """Lightning's half precisions set it while a model is configured."""
    base, found = nn.Sequential(nn.Linear(12, 10)), []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            torch.manual_seed(0)
            found.append(apply_lora(copy.deepcopy(base), LoRAConfig(rank=4, init=init, target_modules=["0"])))
        finally:
            torch.set_default_dtype(torch.float32)
    wanted = bits(found[0])
    assert all(same_bits(tensor, wanted[name]) for name, tensor in bits(found[1]).items())


def test_orthogonal_in_float64_adds_nothing_to_float64s_precision():
    model = nn.Sequential(nn.Linear(9, 7, dtype=torch.float64))
    adapted = apply_lora(model, LoRAConfig(rank=4, init="orthogonal", target_modules=["0"]))[0]
    assert adapted.lora_B.abs().max() > 0.01 and (adapted.lora_B @ adapted.lora_A).abs().max() < 1e-15


def test_the_seed_decides():
    torch.manual_seed(1)
    first = layer("linear").lora_A
    torch.manual_seed(1)
    assert torch.equal(layer("linear").lora_A, first)
    assert not torch.equal(layer("linear").lora_A, first)


# Inits with B·A ≠ 0 at the start.

BUILDS = {
    "linear": lambda: nn.Linear(12, 10),
    "embedding": lambda: nn.Embedding(11, 10),
    "conv": lambda: nn.Conv2d(3, 8, 3),
    "nf4": lambda: packed_linear("nf4"),
}


def started(kind, init, **fields):
    model = nn.Module()
    torch.manual_seed(2)
    model.layer = BUILDS[kind]()
    base = copy.deepcopy(model)
    return apply_lora(model, LoRAConfig(rank=3, alpha=6, target_modules=["layer"], init=init, **fields)), base


@pytest.mark.parametrize("init", START)
@pytest.mark.parametrize("kind", BUILDS)
def test_the_start_is_a_part_of_the_weight_and_the_base_stays(kind, init):
    model, base = started(kind, init)
    adapted = model.layer
    assert same_bits(adapted.weight.data, base.layer.weight.data)
    assert not adapted.lora_A0.requires_grad and not adapted.lora_B0.requires_grad
    assert same_bits(adapted.lora_A, adapted.lora_A0) and same_bits(adapted.lora_B, adapted.lora_B0)
    assert not adapted.exact_delta().any() and adapted.adds_nothing()
    W = adapted.to_matrix(adapted.base_weight().detach()).flatten(0, -2).double()
    A, B = adapted.lora_A.detach().flatten(1).double(), adapted.lora_B.detach().flatten(1).double()
    if init == "olora":
        Q, R = torch.linalg.qr(W)
        torch.testing.assert_close(B @ A, Q[:, :3] @ R[:3], rtol=1e-5, atol=1e-5)
    else:
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        if init == "pissa":
            torch.testing.assert_close(adapted.scaling * B @ A, U[:, :3] * S[:3] @ V[:3], rtol=0, atol=1e-5)
        assert (W - adapted.scaling * B @ A).norm() < 1.2 * S[3:].norm()  # as little as a rank of 3 leaves
    with torch.no_grad():
        adapted.lora_B.add_(0.1)
    assert not adapted.adds_nothing()


@pytest.mark.parametrize("variant", ["plain", "dora", "lora_fa"])
@pytest.mark.parametrize("init", [*START, *DATA])
def test_the_whole_life_of_an_adapter(init, variant, tmp_path):
    config = LoRAConfig(**{**CONFIG.to_dict(), "init": init, "variant": variant})
    model = apply_lora(make_net(), config).eval()
    if init in DATA:
        torch.manual_seed(0)
        initialize_from_data(model, [torch.randn(20, 8) for _ in range(2)], step=lambda net, x: net(x).square().mean())
    torch.testing.assert_close(model(X), make_net().eval()(X), rtol=0, atol=0 if variant != "dora" else 1e-6)
    state = base_bits(model)
    model.fc1.lora_B.data += 0.1
    model.fc2.lora_B.data -= 0.2
    expected = model(X)
    assert (expected - make_net().eval()(X)).abs().max() > 1e-2
    for again in (copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))):
        assert torch.equal(again(model)(X), expected)
    save_adapter(model, tmp_path / "adapter")
    read = load_adapter(make_net(), tmp_path / "adapter").eval()
    assert {layer.rank for _, layer in lora_layers(read)} == {(1 + has_start(init)) * CONFIG.rank} and read.fc1.scaling == model.fc1.scaling
    torch.testing.assert_close(read(X), expected, rtol=0, atol=1e-5 if variant == "dora" else 0)
    merge_lora(model)
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)
    unmerge_lora(model)
    assert torch.equal(model(X), expected)
    unload_lora(model)
    assert base_bits(model) == state == base_bits(make_net())


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_gradients_are_those_of_the_residual_and_the_principal_part(scaling):
    """The paper trains W − s·B₀·A₀ frozen plus s·B·A."""
    model, _ = started("linear", "pissa", scaling=scaling)
    model.double()
    layer, x = model.layer, torch.randn(4, 12, dtype=torch.float64)
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    with torch.no_grad():
        for p in (A, layer.lora_A, B, layer.lora_B):
            p.mul_(1.5)
    residual = layer.weight - layer.scaling * layer.lora_B0 @ layer.lora_A0
    expected = x @ (residual + layer.scaling * B @ A).t() + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(layer(x).sin().sum(), [layer.lora_A, layer.lora_B])
    for mine, wanted in zip(found, torch.autograd.grad(expected.sin().sum(), [A, B]), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-10)


def test_resuming_is_exact(tmp_path):
    config = LoRAConfig(**{**CONFIG.to_dict(), "init": "pissa"})

    def run(epochs, ckpt=None):
        module = LitNet()
        lit = trainer(tmp_path, LoRACallback(config, merge_on_fit_end=False), max_epochs=epochs)
        lit.fit(module, ckpt_path=ckpt)
        return lit, module

    lit, _ = run(1)
    lit.save_checkpoint(tmp_path / "one.ckpt")
    resumed, straight = bits(run(2, tmp_path / "one.ckpt")[1]), bits(run(2)[1])
    assert "net.fc1.lora_A0" in straight and all(torch.equal(tensor, straight[name]) for name, tensor in resumed.items())
    from_checkpoint = load_adapter(make_net(), tmp_path / "one.ckpt")
    assert from_checkpoint.fc1.lora_config == config


def test_a_start_on_the_meta_device_is_taken_from_the_weights_that_come():
    wanted, base = started("linear", "pissa")
    with torch.device("meta"):
        model = nn.Module()
        model.layer = BUILDS["linear"]()
        apply_lora(model, wanted.layer.lora_config)
    model.to_empty(device="cpu")
    model.layer.reset_parameters()
    model.load_state_dict(base.state_dict(), strict=False)
    assert same_bits(model.layer.lora_A, wanted.layer.lora_A) and same_bits(model.layer.lora_A0, wanted.layer.lora_A0)
    fill(model)
    trained = model.layer.lora_A.detach().clone()
    model.load_state_dict(base.state_dict(), strict=False)
    assert same_bits(model.layer.lora_A, trained)


@pytest.mark.parametrize(
    ("build", "fields", "message"),
    [
        (
            lambda: nn.Conv2d(4, 4, 3, groups=2),
            {"init": "pissa", "rank": 2},
            "init='pissa' pairs each row of A .* split into groups; exclude it",
        ),
        (lambda: nn.Embedding(9, 4, padding_idx=1), {"init": "olora"}, "init='olora' would train the row of padding_idx=1 too; exclude it"),
        (lambda: nn.Linear(3, 9), {"init": "pissa", "rank": 4}, r"init='pissa' with rank=4 is above min\(in, out\)=3; choose a lower rank"),
        (lambda: nn.Linear(9, 9), {"init": "orthogonal", "rank": 3}, "init='orthogonal' needs an even rank, here rank=3"),
        (lambda: nn.Conv2d(4, 4, 3, groups=2), {"init": "orthogonal"}, "init='orthogonal' .* split into groups"),
        (lambda: nn.Embedding(9, 4, padding_idx=1), {"init": "orthogonal"}, "init='orthogonal' would train the row of padding_idx=1 too"),
        (lambda: nn.Linear(9, 9), {"init": "pissa", "variant": "vera"}, "init='pissa' and variant='vera'"),
        (lambda: nn.Linear(9, 9), {"init": "pissa", "variant": "adalora"}, "init='pissa' and variant='adalora'"),
        (
            lambda: nn.Linear(9, 9),
            {"init": "pisa"},
            "init='pisa' is not known; there are corda, eva, gaussian, kaiming, loftq, lora_ga, mica, olora",
        ),
    ],
)
def test_what_cannot_start_so_is_refused_and_left_alone(build, fields, message):
    model = nn.Module()
    model.layer = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        apply_lora(model, LoRAConfig(**{"rank": 2, "target_modules": ["layer"], **fields}))
    assert snapshot(model) == before
