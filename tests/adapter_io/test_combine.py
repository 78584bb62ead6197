"""Adapters combined and compressed on disk: equal to the sums by hand in float64, and to PEFT's add_weighted_adapter."""

import peft
import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, combine_adapters, compress_adapter, load_adapter, lora_layers, save_adapter
from lightning_lora.adapter_io.combine import METHODS
from lightning_lora.adapter_io.file_arithmetic import read_pairs
from tests.adapter_io.folders import Conv
from tests.parity.models import DEPRECATED_BY_PEFT, base, logits, randomise

pytestmark = pytest.mark.filterwarnings(DEPRECATED_BY_PEFT, "ignore:Setting `save_embedding_layers`")
QV = ["q_proj", "v_proj"]
FIRST = {"target_modules": QV, "rank": 4, "alpha": 12}
SECOND = {"target_modules": QV, "rank": 4, "alpha": 5, "scaling": "rslora"}
OTHER_LAYERS = {"target_modules": ["v_proj", "down_proj", "embed_tokens"], "rank": 2}
PRUNED = [name for name in METHODS if "prune" in name or "ties" in name or "dare" in name]


def saved(config, folder, seed, name="llama"):
    model = apply_lora(base(name), LoRAConfig(**config))
    torch.manual_seed(seed)
    randomise(model)
    return save_adapter(model, folder)


@pytest.fixture
def two(tmp_path):
    return saved(FIRST, tmp_path / "one", 1), saved(SECOND, tmp_path / "two", 2)


def updates(folder):
    """Layer → ΔW as the model that loads the folder would merge it."""
    return {name: layer.merge_delta().detach().double() for name, layer in lora_layers(load_adapter(base("llama"), folder))}


def assert_sum(folder, *parts, tolerance=1e-6):
    wanted = {}
    for weight, part in parts:
        for name, update in updates(part).items():
            wanted[name] = wanted.get(name, 0) + weight * update
    found = updates(folder)
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        torch.testing.assert_close(found[name], update, rtol=tolerance, atol=tolerance * update.abs().max().item())


@pytest.mark.parametrize(("method", "options"), [("cat", {}), ("svd", {"rank": 8}), ("svd", {"energy": 1.0})])
@pytest.mark.parametrize("second", [SECOND, OTHER_LAYERS], ids=["same layers", "other layers"])
def test_the_exact_methods_give_the_weighted_sum(method, options, second, tmp_path):
    one, two = saved(FIRST, tmp_path / "one", 1), saved(second, tmp_path / "two", 2)
    out = combine_adapters({one: 0.75, two: -1.5}, tmp_path / "out", method=method, **options)
    assert_sum(out, (0.75, one), (-1.5, two))


def test_the_truncation_is_the_best_one(two, tmp_path):
    one, two = two
    out = combine_adapters({one: 1, two: 1}, tmp_path / "out", rank=3)
    whole = updates(combine_adapters({one: 1, two: 1}, tmp_path / "whole", method="cat"))
    for name, update in updates(out).items():
        S = torch.linalg.svdvals(whole[name])
        assert torch.linalg.matrix_rank(update, rtol=1e-5) == 3
        torch.testing.assert_close((update - whole[name]).norm(), S[3:].norm(), rtol=1e-5, atol=0)


def peft_combined(folders, weights, method, **options):
    model = peft.PeftModel.from_pretrained(base("llama"), folders[0], adapter_name="one")
    model.load_adapter(folders[1], adapter_name="two")
    model.add_weighted_adapter(["one", "two"], weights, "both", combination_type=method, **options)
    model.set_adapter("both")
    return model.eval()


@pytest.mark.parametrize(
    ("method", "majority"), [*((name, "total") for name in METHODS if "dare" not in name), ("ties", "frequency"), ("ties_svd", "frequency")]
)
def test_equal_to_peft(method, majority, two, tmp_path):
    pruned = {"density": 0.4} if method in PRUNED else {}
    theirs = peft_combined(two, [0.75, -0.5], method, majority_sign_method=majority, **pruned)
    out = combine_adapters(dict(zip(two, [0.75, -0.5], strict=True)), tmp_path / "out", method=method, majority=majority, **pruned)
    wanted = logits(theirs, "llama")
    assert (wanted - logits(base("llama"), "llama")).abs().max() > 1e-2
    torch.testing.assert_close(logits(load_adapter(base("llama"), out).eval(), "llama"), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(base("llama"), out).eval(), "llama"), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [name for name in METHODS if "dare" in name])
def test_dare_drops_by_its_seed_and_keeps_the_mean(method, two, tmp_path):
    def combined(seed, density):
        return updates(combine_adapters(dict.fromkeys(two, 1.0), tmp_path / f"{seed}-{density}", method=method, density=density, seed=seed))

    first, again, other = combined(3, 0.5), updates(tmp_path / "3-0.5"), combined(4, 0.5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    rule = method.replace("dare_", "")
    options = {"density": 1.0} if "ties" in rule else {}
    whole = updates(combine_adapters(dict.fromkeys(two, 1.0), tmp_path / "all", method=rule.replace("linear_svd", "svd"), **options))
    for name, update in combined(5, 1.0).items():  # nothing dropped: the rule itself
        torch.testing.assert_close(update, whole[name], rtol=1e-5, atol=1e-6)


def test_the_same_layers_keep_their_names_and_the_base(two, tmp_path):
    out = read_pairs(combine_adapters(dict.fromkeys(two, 1.0), tmp_path / "out", method="cat"))
    first = read_pairs(two[0])
    assert out.adapter.config.target_modules == first.adapter.config.target_modules and out.adapter.config.rank == 8
    assert out.adapter.base == first.adapter.base and out.adapter.fields["target_modules"] == QV


def test_adapters_that_peft_wrote(tmp_path):
    folders = []
    for seed, alpha in ((1, 4), (2, 16)):
        torch.manual_seed(seed)
        model = peft.get_peft_model(base("llama"), peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=QV))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
    out = combine_adapters({folders[0]: 0.5, folders[1]: 2.0}, tmp_path / "out", method="svd", rank=6)
    assert_sum(out, (0.5, folders[0]), (2.0, folders[1]))
    wanted = logits(peft_combined(folders, [0.5, 2.0], "cat"), "llama")
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(base("llama"), out).eval(), "llama"), wanted, rtol=1e-4, atol=1e-5)


def test_compress_keeps_the_share_asked_for(two, tmp_path):
    whole = updates(two[0])
    for energy in (0.5, 0.9, 1.0):
        out = updates(compress_adapter(two[0], tmp_path / str(energy), energy=energy))
        for name, update in whole.items():
            S = torch.linalg.svdvals(update)[:4]
            rank = int((S.square().cumsum(0) < energy * S.square().sum() * (1 - 1e-9)).sum()) + 1
            assert torch.linalg.matrix_rank(out[name], rtol=1e-5) == rank
            torch.testing.assert_close((update - out[name]).norm(), S[rank:].norm(), rtol=1e-4, atol=1e-6)


def test_compress_to_a_rank(two, tmp_path):
    out = read_pairs(compress_adapter(two[1], tmp_path / "out", rank=1))
    assert {layer.rank for layer in out.layers.values()} == {1} and out.adapter.config.rank == 1
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(base("llama"), tmp_path / "out").eval(), "llama"),
        logits(load_adapter(base("llama"), tmp_path / "out").eval(), "llama"),
    )


def test_convolutions(tmp_path):
    folders = []
    for seed in (1, 2):
        model = apply_lora(Conv(), LoRAConfig(target_modules=["conv"], rank=2))
        torch.manual_seed(seed)
        for parameter in model.conv.lora_parameters().values():
            nn.init.normal_(parameter)
        folders.append(save_adapter(model, tmp_path / str(seed)))
    out = combine_adapters({folders[0]: 1.0, folders[1]: -2.0}, tmp_path / "out", method="svd", rank=4)
    found, *parts = (load_adapter(Conv(), folder).conv.merge_delta().detach() for folder in (out, *folders))
    torch.testing.assert_close(found, parts[0] - 2 * parts[1])


def refused(match, call, *args, **options):
    with pytest.raises(ValueError, match=match):
        call(*args, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "mean"}, "method='mean': choose one of cat, svd"),
        ({"method": "ties"}, "density=None: ties needs one"),
        ({"method": "cat", "density": 0.5}, "density=0.5: cat drops nothing"),
        ({"method": "ties", "density": 1.5}, "density=1.5: give a share"),
        ({"method": "ties", "density": 0.5, "majority": "sign"}, "majority='sign': choose one of total, frequency"),
        ({"method": "cat", "rank": 3}, "rank=3: cat chooses the rank itself"),
        ({"rank": 0}, "rank=0: the rank is a whole number"),
        ({"rank": True}, "rank=True"),
        ({"energy": 0.0}, r"energy=0.0: give a share"),
        ({"rank": 2, "energy": 0.5}, "give one of them"),
    ],
)
def test_options_that_are_refused(options, match, two, tmp_path):
    refused(match, combine_adapters, dict.fromkeys(two, 1.0), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight", [0, float("nan"), float("inf"), "1", True])
def test_weights_that_are_refused(weight, two, tmp_path):
    refused(r"adapters\['.*two'\]=", combine_adapters, {two[0]: 1.0, two[1]: weight}, tmp_path / "out")


def test_adapters_that_cannot_be_added(two, tmp_path):
    out = tmp_path / "out"
    for few in ({two[0]: 1.0}, list(two)):
        refused("give a dict of two or more folders", combine_adapters, few, out)
    refused("DoRA layer", combine_adapters, {two[0]: 1.0, saved(FIRST | {"variant": "dora"}, tmp_path / "dora", 1): 1.0}, out)
    refused(
        "share factors", combine_adapters, {two[0]: 1.0, saved({"target_modules": QV, "variant": "vera"}, tmp_path / "vera", 1): 1}, out
    )
    refused("has \\[4, 2\\]", combine_adapters, {two[0]: 1.0, saved(FIRST | {"rank": 2}, tmp_path / "2", 1): 1.0}, out, method="linear")
    head = saved(FIRST | {"modules_to_save": ["lm_head"]}, tmp_path / "head", 1)
    refused("was trained in full", combine_adapters, {two[0]: 1.0, head: 1.0}, out)
    rows = saved(FIRST | {"trainable_token_indices": [3]}, tmp_path / "rows", 1)
    refused("trainable_tokens_delta' was trained in full", combine_adapters, {two[0]: 1.0, rows: 1.0}, out)
    biased = saved(FIRST | {"variant": "lora_bias"}, tmp_path / "biased", 1)
    for call, given in ((combine_adapters, {two[0]: 1.0, biased: 1.0}), (compress_adapter, biased)):
        refused("lora_B.bias' is a bias on B .*, if the layer has a bias there; if it has none.*by itself", call, given, out, rank=1)
    refused("is not empty", combine_adapters, dict.fromkeys(two, 1.0), two[0])
    assert not out.exists()


def test_adapters_of_two_bases(two, tmp_path):
    model = base("llama")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    other = save_adapter(apply_lora(model, LoRAConfig(**FIRST)), tmp_path / "other")
    refused("another base than .*one: fingerprint", combine_adapters, {two[0]: 1.0, other: 1.0}, tmp_path / "out")
