"""``initialize_from_data``: what counts, what it leaves alone, which kinds and variants work, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    get_lora_parameters,
    initialize_from_data,
    lora_layers,
    merge_lora,
    quantize_base,
    unload_lora,
)
from lightning_lora.inits import statistics
from lightning_lora.layers.awaiting import awaits_data
from lightning_lora.model import data_start
from lightning_lora.registry import kind_of
from tests.conftest import snapshot
from tests.family import CASES
from tests.inits.data import DATA, Net, applied, batches, loss, net, product, started
from tests.parity.models import base as model_of
from tests.parity.models import batch


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_large_layers_are_decomposed_at_random(init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the exact decomposition, the same each time, whatever the random numbers of the caller."""
    exact = started(init, rank=2, init_options={"rho": 1} if init == "eva" else {})
    monkeypatch.setattr(statistics, "EXACT", 0)
    once, again = (started(init, rank=2, init_options={"rho": 1} if init == "eva" else {}) for _ in range(2) if torch.rand(1) >= 0)
    for name, layer in lora_layers(exact):
        mine = once.get_submodule(name)
        assert ((mine.lora_A @ layer.lora_A.T).detach().norm() / layer.lora_A.norm() ** 2 * 2**0.5 - 1).abs() < 0.05
        assert torch.equal(mine.lora_A, again.get_submodule(name).lora_A) and not torch.equal(mine.lora_A, layer.lora_A)


@pytest.mark.parametrize("init", DATA)
def test_groups_of_layers_give_the_same(init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = started(init)
    monkeypatch.setattr(data_start, "HELD", 1)  # each layer alone
    calls = []
    mine = initialize_from_data(applied(init), batches(), step=lambda model, x: calls.append(1) or loss(model, x))
    assert len(calls) == 9
    assert all(torch.equal(a, b) for a, b in zip(get_lora_parameters(mine), get_lora_parameters(wanted), strict=True))


@pytest.mark.parametrize("init", DATA)
def test_the_model_is_otherwise_as_it_was(init: str) -> None:
    """Outputs, buffers, modes, gradients, hooks and random numbers."""
    model = applied(init).train()
    model.norm.eval()
    model.norm.weight.requires_grad_(True).grad = torch.ones(20, dtype=torch.float64)
    before, random = {k: v.clone() for k, v in model.state_dict().items() if "lora_" not in k}, torch.get_rng_state()
    initialize_from_data(model, iter(batches()), step=loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "lora_" not in name)
    assert torch.equal(random, torch.get_rng_state()) and model.training and model.a.training and not model.norm.training
    assert torch.equal(model.norm.weight.grad, torch.ones(20, dtype=torch.float64))
    assert all(p.grad is None for p in get_lora_parameters(model))
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model.eval()(batches()[0]), net().eval()(batches()[0]))


def test_a_buffer_that_a_pass_replaces_comes_back() -> None:
    model = applied("eva").train()
    kept = model.norm.running_mean

    def step(model: Any, x: Any) -> Any:
        model.norm.running_mean = model.norm.running_mean + 1
        return loss(model, x)

    initialize_from_data(model, batches(), step=step)
    assert model.norm.running_mean is kept and torch.equal(kept, net().norm.running_mean)


@pytest.mark.parametrize("init", DATA)
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_training_without_data_raises(init: str, again: Any) -> None:
    model = again(applied(init).eval())  # the mode does not matter
    x = batches()[0]
    with torch.no_grad():
        model(x)
    with pytest.raises(ValueError, match=f"'c': init='{init}' computes A and B from data, and has seen none: call initialize_from_data"):
        loss(model, x).backward()
    loss(initialize_from_data(model, [x], step=loss), x).backward()
    unload_lora(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_loaded_state_is_a_start_too() -> None:
    model, other = started("lora_ga"), applied("lora_ga")
    assert awaits_data(other.a)
    other.load_state_dict(model.state_dict())
    assert not any(awaits_data(layer) for _, layer in lora_layers(other))
    loss(other, batches()[0]).backward()


def test_a_base_that_is_loaded_again_leaves_the_start() -> None:
    model = started("corda")
    A = model.a.lora_A.detach().clone()
    model.load_state_dict(net().state_dict(), strict=False)
    assert torch.equal(model.a.lora_A, A)


def test_padding_and_ignored_labels_do_not_count() -> None:
    """A batch with padding gives what the batch without it gives; labels count for EVA alone."""
    ids = batch("llama")["input_ids"][:2]
    padded = {"input_ids": torch.cat([ids, ids // 2], 1), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    padded["attention_mask"][:, 10:] = 0
    labelled = {"input_ids": padded["input_ids"], "labels": padded["input_ids"].clone()}
    labelled["labels"][:, 10:] = -100

    def first(init: str, given: dict[str, Tensor]) -> Tensor:
        config = LoRAConfig(rank=4, init=init, target_modules=["layers.0.self_attn.q_proj"], modules_to_save=[])
        model = initialize_from_data(apply_lora(model_of("llama"), config), [given])
        return product(next(lora_layers(model))[1]) if init != "eva" else next(lora_layers(model))[1].lora_A.detach()

    for init in ("eva", "corda"):
        wanted = first(init, {"input_ids": ids})
        torch.testing.assert_close(first(init, padded), wanted, rtol=0, atol=1e-5)
        assert torch.allclose(first(init, labelled), wanted, atol=1e-5) == (init == "eva")


@pytest.mark.parametrize("init", DATA)
@pytest.mark.parametrize("kind", CASES)
def test_each_kind_works_or_is_refused(init: str, kind: str) -> None:
    model = nn.Module()
    model.layer = CASES[kind].base()
    config = LoRAConfig(rank=CASES[kind].rank, init=init, target_modules=["layer"], modules_to_save=[])
    if not kind_of(type(model.layer)).reads_rows:
        before = snapshot(model)
        with pytest.raises(
            ValueError, match=rf"'layer' .*init='{init}' reads the rows that a linear multiplies|split into groups|whole layer"
        ):
            apply_lora(model, config)
        assert snapshot(model) == before
        return
    torch.manual_seed(0)
    x = [CASES[kind].x() for _ in range(12)]
    plain = model.layer(x[0]).detach()
    initialize_from_data(apply_lora(model, config), x, step=lambda model, x: model.layer(x).square().mean())
    assert model.layer.lora_A.any() and model.layer.lora_B.any() == (init != "eva")
    torch.testing.assert_close(model.layer(x[0]), plain, rtol=0, atol=0)


@pytest.mark.parametrize("init", DATA)
@pytest.mark.parametrize(("variant", "fits"), [("dora", True), ("lora_fa", True), ("adalora", False), ("lora_xs", False), ("vera", False)])
def test_each_variant_works_or_is_refused(init: str, variant: str, fits: bool) -> None:
    if not fits:
        with pytest.raises(ValueError, match=f"init='{init}' and variant='{variant}'"):
            applied(init, variant=variant, alpha=LoRAConfig().alpha)
        return
    model = started(init, variant=variant)
    torch.testing.assert_close(model.eval()(batches()[0]), net().eval()(batches()[0]), rtol=1e-10, atol=1e-10)
    loss(model, batches()[0]).backward()
    assert all(layer.lora_B.grad.any() for _, layer in lora_layers(model))


@pytest.mark.parametrize(
    ("init", "given", "step", "match"),
    [
        ("eva", [], loss, "batches is empty, and init='eva' computes A and B from data"),
        ("eva", [torch.full((30, 16), torch.nan)], loss, r"'a': init='eva' met NaN or infinity in its inputs: .* \(2 more layers\)"),
        ("corda", [torch.randn(2, 16)], loss, r"'a': init='corda' saw 2 rows \(tokens\), and rank=3 needs at least 3"),
        ("lora_ga", [torch.randn(5, 16)], loss, r"'a': init='lora_ga' saw 5 rows \(tokens\), and rank=3 needs at least 6"),
        ("eva", [torch.randn(6, 16)], loss, r"'a': init='eva' saw 6 rows \(tokens\), and rank=3 needs at least 7"),
        (
            "corda",
            batches(1),
            lambda model, x: model.a(x),
            "'b': init='corda' saw no row: no batch reached the layer, or all its tokens are padding; ",
        ),
        (
            "lora_ga",
            batches(1),
            lambda model, x: loss(model, x) * torch.inf,
            "'a': init='lora_ga' met NaN or infinity in",
        ),
        ("lora_ga", batches(1), lambda model, x: model(x), "step returned a Tensor without a loss of one number"),
        ("lora_ga", batches(1), lambda model, x: model(x).sum().detach(), "step returned a loss that depends on no adapted layer"),
        ("lora_ga", batches(1), lambda model, x: None, "'a': init='lora_ga' saw no row: .*, or step returned no loss; "),
    ],
)
def test_data_that_do_not_do_are_refused_and_change_nothing(init: str, given: list[Tensor], step: Any, match: str) -> None:
    model = applied(init)
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        initialize_from_data(model, [x.double() for x in given], step=step)
    assert snapshot(model) == before and all(awaits_data(layer) for _, layer in lora_layers(model))


def test_tokens_that_all_have_the_label_of_none_are_named() -> None:
    given = batch("llama")
    model = apply_lora(model_of("llama"), LoRAConfig(rank=2, init="eva"))
    with pytest.raises(ValueError, match=r"saw no row: .* all its tokens are padding or have the label -100; "):
        initialize_from_data(model, [given | {"labels": torch.full_like(given["input_ids"], -100)}])


@pytest.mark.parametrize("given", [None, 3, "text", torch.randn(9, 16), {"x": torch.randn(9, 16)}], ids=lambda given: type(given).__name__)
def test_one_batch_is_no_list_of_batches(given: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"batches is of type {type(given).__name__}: give an iterable of batches, such as a DataLoader or"
    ):
        initialize_from_data(applied("eva"), given)


def test_a_step_is_a_function() -> None:
    with pytest.raises(ValueError, match="step=5: give a function of model and batch that returns the loss, or None"):
        initialize_from_data(applied("eva"), batches(), step=5)  # type: ignore[arg-type]


def test_models_that_do_not_do_are_refused() -> None:
    with pytest.raises(ValueError, match="Net has no adapters that wait for data: call apply_lora"):
        initialize_from_data(net(), batches())
    with pytest.raises(ValueError, match=r"Net has no adapters that wait for data.*Adapters that have their start keep it"):
        initialize_from_data(started("eva"), batches(), step=loss)
    with torch.device("meta"):
        model = applied("eva", Net())
    with pytest.raises(ValueError, match="'a' is on the meta device, where nothing can be computed for init='eva'"):
        initialize_from_data(model, batches())
    with pytest.raises(ValueError, match="'a' is merged"):
        initialize_from_data(merge_lora(applied("eva")), batches(), step=loss)
    with pytest.raises(ValueError, match=r"'c' .*init='lora_ga' with rank=7 needs 14 singular vectors, which is above min\(in, out\)=12"):
        applied("lora_ga", rank=7)


@pytest.mark.parametrize("init", DATA)
@pytest.mark.parametrize("how", ["fp8", "nf4"])
def test_quantized_bases(init: str, how: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 128))
    quantize_base(model, how, targets=["0", "2"])
    x = [torch.randn(40, 128) for _ in range(2)]
    plain = model(x[0]).detach()
    config = LoRAConfig(rank=4, init=init, target_modules=["0", "2"], modules_to_save=[])
    initialize_from_data(apply_lora(model, config), x, step=lambda model, x: model(x).square().mean())
    torch.testing.assert_close(model(x[0]), plain, rtol=0, atol=0)
    assert model[0].lora_A.isfinite().all() and model[2].lora_A.any()


@pytest.mark.parametrize(
    ("init", "options", "match"),
    [
        ("eva", {"rho": 0.5}, r"init_options\['rho'\]=0.5: give a number ≥ 1"),
        ("eva", {"rho": float("inf")}, r"init_options\['rho'\]=inf: give a number ≥ 1"),
        ("eva", {"whiten": 1}, r"init_options\['whiten'\]=1: give True or False"),
        ("corda", {"mode": "both"}, r"init_options\['mode'\]='both': give one of ipm, kpm"),
        ("lora_ga", {"gamma": 0}, r"init_options\['gamma'\]=0: give a finite number > 0"),
        ("lora_ga", {"scale": "unit"}, r"init_options\['scale'\]='unit': give one of stable, singular_values"),
        ("kaiming", {"rho": 2}, r"init_options\['rho'\]=2 is not known to init='kaiming'; it takes none"),
    ],
)
def test_options(init: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        applied(init, init_options=options)
