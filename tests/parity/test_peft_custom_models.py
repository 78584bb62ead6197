"""Every LoRA configuration in the table of PEFT's own custom-model tests: equal to PEFT, or refused by name, none wrong."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import apply_lora, load_adapter, merge_lora, save_adapter, unmerge_lora
from tests.parity.custom_models import CASES, MODELS, PEFT_CANNOT_MERGE, conv

from .models import close, our_config, randomise, read_by_peft, theirs, trained, twins

pytestmark = pytest.mark.filterwarnings("ignore:rank=")  # the toys are smaller than rank 8: our own warning
BIAS = pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape")  # PEFT's lora_B.bias, to PEFT's surprise
FIELDS = set(LoraConfig.__dataclass_fields__)
GROUPS = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")


def marks(model: str, peft: dict) -> list[pytest.MarkDecorator]:
    return [GROUPS] * ("Groups" in model) + [BIAS] * ("lora_bias" in peft)


def rows(keep):
    return [pytest.param(*row, id=name, marks=marks(*row[:2])) for name, *row in CASES if keep(row[-1])]


def build(model: str) -> nn.Module:
    torch.manual_seed(0)
    built = MODELS[model]().eval()
    for module in built.modules():
        if isinstance(module, Conv1D):
            nn.init.normal_(module.weight)  # its own start is so small that nothing before it is seen
    return built


def inputs() -> Tensor:
    return torch.arange(2160).view(216, 10) % 97


def tolerance(peft: dict) -> float:
    """A few units in the last place of outputs up to 4; DoRA's norms are summed in another order."""
    return 2e-6 if "use_dora" in peft else 1e-6


equal = pytest.mark.parametrize(("model", "peft", "outcome"), rows(lambda outcome: outcome == "equal"))


@equal
def test_forward_and_gradients(model, peft, outcome):
    ours, other = twins(build(model), **peft)
    ours.eval(), other.eval()
    out, expected = ours(inputs()), other(inputs())
    close(out, expected, tolerance(peft))
    assert (out - build(model)(inputs())).abs().max() > 1e-3
    for y in (out, expected):
        nn.functional.nll_loss(y, torch.arange(len(y)) % 2).backward()
    gradients, twin = trained(ours), trained(other)
    assert any(p.grad.abs().max() > 1e-4 for p in twin.values())
    for key in twin:
        close(gradients[key].grad, twin[key].grad, what=key)


DROPS = {
    "linear": (nn.Linear(6, 8), torch.ones(1, 6)),
    "conv1d": (Conv1D(8, 6), torch.ones(1, 6)),
    "conv2d": (nn.Conv2d(2, 8, 2), torch.ones(1, 2, 2, 2)),
    "embedding": (nn.Embedding(5, 8), torch.ones(1, dtype=torch.long)),
}


@pytest.mark.parametrize("kind", DROPS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_dropout_has_pefts_distribution(kind):
    """Same mean and spread over many masks: the masks themselves are each library's own. Embeddings have no dropout in either."""
    layer, x = DROPS[kind]
    ours, other = (model.train() for model in twins(nn.Sequential(layer), target_modules=["0"], lora_dropout=0.4, lora_alpha=400))
    torch.manual_seed(1)
    many = x.expand(20_000, *x.shape[1:])
    with torch.no_grad():
        got, expected, plain = (y.flatten(1) for y in (ours(many), other(many), other.eval()(x)))
    close(got.mean(0), plain[0], atol=0.03)
    close(got.std(0), expected.std(0), atol=0.03)
    assert (expected.std(0) > 0.3).any() == (kind != "embedding")


@equal
def test_merged(model, peft, outcome):
    ours, other = twins(build(model), **peft)
    before = ours.eval()(inputs()).detach()
    weights = {key: value.clone() for key, value in ours.state_dict().items()}
    merge_lora(ours)
    close(ours(inputs()), before, atol=2 * tolerance(peft))
    if model not in PEFT_CANNOT_MERGE:
        merged, expected = ours.state_dict(), other.merge_and_unload().state_dict()
        for key in expected:
            close(merged[key], expected[key], what=key)
    unmerge_lora(ours)
    torch.testing.assert_close(dict(ours.state_dict()), weights, rtol=0, atol=0)


@equal
def test_folders_both_ways(model, peft, outcome, tmp_path):
    ours, other = twins(build(model), **peft)
    save_adapter(ours, tmp_path / "ours")
    other.save_pretrained(tmp_path / "theirs")
    expected = other.eval()(inputs())
    read = read_by_peft(build(model), tmp_path / "ours")
    close(read(inputs()), expected)
    loaded = load_adapter(build(model), tmp_path / "theirs")
    close(loaded.eval()(inputs()), expected, tolerance(peft))
    assert trained(loaded).keys() == trained(ours).keys()
    assert trained(read).keys() == trained(ours).keys()


@pytest.mark.parametrize(("model", "peft", "outcome"), rows(lambda outcome: outcome.startswith("grouped")))
def test_grouped_convolutions(model, peft, outcome, tmp_path):
    ours = apply_lora(build(model), config=our_config(**peft)).eval()
    randomise(ours)
    expected = ours(inputs()).detach()
    assert (expected - build(model)(inputs())).abs().max() > 1e-3
    dora = outcome == "grouped DoRA"
    with pytest.warns(UserWarning, match="PEFT 0.21 takes other norms") if dora else nullcontext():
        save_adapter(ours, tmp_path / "ours")
    read = read_by_peft(build(model), tmp_path / "ours")(inputs())
    if dora:
        assert (read - expected).abs().max() > 1e-4  # if this fails, PEFT was mended: the warning can go
    else:
        close(read, expected)
    close(load_adapter(build(model), tmp_path / "ours").eval()(inputs()), expected, atol=0.0)
    close(merge_lora(ours)(inputs()), expected)

    other = theirs(build(model), **peft)
    randomise(other)
    other.save_pretrained(tmp_path / "theirs")
    base = build(model)
    with pytest.raises(ValueError, match=r"conv[12]d.*groups"):
        load_adapter(base, tmp_path / "theirs")
    untouched(base, build(model))


@pytest.mark.parametrize("features", [32, 288], ids=["dilation", "circular"])
def test_convolutions_that_peft_gets_wrong(features):
    """0.21.2 drops dilation (it crashes) and padding_mode (its merged output differs); the update is ours to get right."""
    kwargs = {"dilation": 2} if features == 32 else {"padding": 1, "padding_mode": "circular"}
    torch.manual_seed(0)
    ours = apply_lora(conv((1, 6, 6), "conv2d", nn.Conv2d(1, 8, 3, **kwargs), features), config=our_config(target_modules=["conv2d"]))
    randomise(ours)
    expected = ours.eval()(inputs()).detach()
    close(merge_lora(ours)(inputs()), expected, atol=2e-6)


def untouched(model: nn.Module, original: nn.Module) -> None:
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    torch.testing.assert_close(dict(model.state_dict()), dict(original.state_dict()), rtol=0, atol=0)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("model", "peft", "outcome"), rows(lambda outcome: outcome.startswith("no module")))
def test_modules_refused_by_name_and_type(model, peft, outcome):
    name, kind = outcome.removeprefix("no module: ").split()
    base = build(model)
    with pytest.raises(ValueError, match=rf"(?s)\b{name}\b.*\b{kind}\b"):
        apply_lora(base, config=our_config(**peft))
    untouched(base, build(model))


@pytest.mark.parametrize(("model", "peft", "outcome"), rows(lambda outcome: outcome in FIELDS))
def test_folders_refused_by_field(model, peft, outcome, tmp_path):
    other = theirs(build(model), **peft)
    randomise(other)
    other.save_pretrained(tmp_path)
    base = build(model)
    with pytest.raises(ValueError, match=outcome):
        load_adapter(base, tmp_path)
    untouched(base, build(model))


@pytest.mark.parametrize(("model", "peft", "outcome"), rows(lambda outcome: outcome == "read"))
def test_folders_of_layers_named_by_their_weight(model, peft, outcome, tmp_path):
    other = theirs(build(model), **peft)
    randomise(other)
    other.save_pretrained(tmp_path)
    close(load_adapter(build(model), tmp_path).eval()(inputs()), other(inputs()))


def test_every_row_is_run():
    assert len({case[0] for case in CASES}) == len(CASES)
    assert all(case[3] in {"equal", "read", "grouped", "grouped DoRA"} | FIELDS or case[3].startswith("no module: ") for case in CASES)
