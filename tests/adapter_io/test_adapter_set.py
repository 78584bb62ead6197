"""Named adapters on one base: each computes what it computes alone, rows of a batch too, and PEFT's the same."""

import copy

import peft
import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    disabled_lora,
    get_lora_parameters,
    load_adapter,
    load_adapters,
    lora_layers,
    merge_lora,
    save_adapter,
    unload_lora,
    unmerge_lora,
)
from tests.adapter_io.folders import Conv
from tests.parity.models import DEPRECATED_BY_PEFT, base, randomise

pytestmark = pytest.mark.filterwarnings(DEPRECATED_BY_PEFT, "ignore:Setting `save_embedding_layers`")
CONFIGS = {
    "legal": {"target_modules": ["q_proj", "v_proj"], "rank": 4, "alpha": 12},
    "polite": {"target_modules": ["v_proj", "down_proj", "embed_tokens"], "rank": 2, "scaling": "rslora"},
    "short": {"target_modules": "all-linear", "rank": 3, "init": "pissa", "rank_pattern": {"q_proj": 5}},
}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
IDS = torch.arange(18).view(3, 6) * 5 % 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = apply_lora(base("llama"), LoRAConfig(**config))
        torch.manual_seed(seed)
        randomise(model)
        made[name] = save_adapter(model, tmp_path_factory.mktemp(name) / "adapter")
    return made


@pytest.fixture(scope="module")
def alone(folders):
    """Name → the outputs for IDS of the base with that adapter alone."""
    outputs = {name: output(load_adapter(base("llama"), folder)) for name, folder in folders.items()}
    outputs[None] = output(base("llama"))
    assert all((outputs[a] - outputs[b]).abs().max() > 1e-2 for a in outputs for b in outputs if a != b)
    return outputs


def output(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.fixture
def model():
    return base("llama")


def test_each_computes_what_it_computes_alone(model, folders, alone):
    adapters = load_adapters(model, folders)
    assert adapters.names == list(CONFIGS) and adapters.active == "legal" and not any(p.requires_grad for p in get_lora_parameters(model))
    torch.testing.assert_close(output(model), alone["legal"], **CLOSE)
    for name in ("short", "polite", None, "legal"):
        adapters.use(name)
        torch.testing.assert_close(output(model), alone[name], **CLOSE)
    with adapters.using("polite"):
        torch.testing.assert_close(output(model), alone["polite"], **CLOSE)
        with disabled_lora(model):
            torch.testing.assert_close(output(model), alone[None], rtol=0, atol=0)
    assert adapters.active == "legal"
    torch.testing.assert_close(output(model), alone["legal"], **CLOSE)


@pytest.mark.parametrize("names", [["legal", "polite", None], ["short", "legal", "short"], [None, None, None]])
def test_rows_of_one_batch(names, model, folders, alone):
    adapters = load_adapters(model, folders)
    with adapters.rows(names):
        found = output(model)
        with disabled_lora(model):
            torch.testing.assert_close(output(model), alone[None], rtol=0, atol=0)
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], alone[name][row], **CLOSE)
    torch.testing.assert_close(output(model), alone["legal"], **CLOSE)


def test_rows_within_rows_end_with_their_block(model, folders, alone):
    adapters = load_adapters(model, folders)
    with adapters.rows(["legal", "polite", None]):
        with adapters.rows(["polite"] * 3):
            torch.testing.assert_close(output(model), alone["polite"], **CLOSE)
        torch.testing.assert_close(output(model)[1], alone["polite"][1], **CLOSE)
        torch.testing.assert_close(output(model)[0], alone["legal"][0], **CLOSE)


def test_generation_with_an_adapter_for_each_row(model, folders):
    def answers(model, ids):
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    names = ["legal", "polite", None]
    models = [load_adapter(base("llama"), folders[name]) if name else base("llama") for name in names]
    wanted = [answers(each, IDS[row : row + 1]) for row, each in enumerate(models)]
    adapters = load_adapters(model, folders)
    with adapters.rows(names):
        assert torch.equal(answers(model, IDS), torch.cat(wanted))


def test_equal_to_peft(model, folders):
    theirs = peft.PeftModel.from_pretrained(base("llama"), folders["legal"], adapter_name="legal")
    theirs.load_adapter(folders["polite"], adapter_name="polite")
    theirs.eval()
    adapters = load_adapters(model, {name: folders[name] for name in ("legal", "polite")})
    for name in ("polite", "legal"):
        theirs.set_adapter(name)
        with adapters.using(name):
            torch.testing.assert_close(output(model), output(theirs), **CLOSE)


def test_a_switch_compiles_nothing(model, folders):
    adapters = load_adapters(model, folders)
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(model.eval(), backend=backend)
    with torch.no_grad():
        first = compiled(IDS).logits
        count = len(seen)
        assert count
        for name in ("polite", "short", "legal"):
            adapters.use(name)
            out = compiled(IDS).logits
        torch.testing.assert_close(out, first, **CLOSE)
    assert len(seen) == count


def test_adding_replacing_and_removing(model, folders, alone):
    adapters = load_adapters(model, {"short": folders["short"], "one": folders["legal"]})
    adapters.use("one")
    with pytest.raises(ValueError, match=r"'polite' has rank 2 on 'model.embed_tokens', where this model has no adapter"):
        adapters.add("polite", folders["polite"])
    assert adapters.names == ["short", "one"]
    adapters.add("one", folders["short"])
    torch.testing.assert_close(output(model), alone["short"], **CLOSE)
    adapters.remove("one")
    assert adapters.active is None and adapters.names == ["short"]
    torch.testing.assert_close(output(model), alone[None], **CLOSE)
    small = load_adapters(base("llama"), {"polite": folders["polite"]})
    with pytest.raises(ValueError, match=r"room for rank 2|no adapter"):
        small.add("legal", folders["legal"])


def test_the_active_one_is_what_is_saved_and_merged(model, folders, alone, tmp_path):
    adapters = load_adapters(model, folders)
    adapters.use("polite")
    saved = save_adapter(model, tmp_path / "active")
    torch.testing.assert_close(output(load_adapter(base("llama"), saved)), alone["polite"], **CLOSE)
    merge_lora(model)
    torch.testing.assert_close(output(model), alone["polite"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="is merged; call unmerge_lora"):
        adapters.use("legal")
    unmerge_lora(model)
    adapters.use("legal")
    torch.testing.assert_close(output(model), alone["legal"], **CLOSE)


def test_what_is_refused_changes_nothing(model, folders, tmp_path):
    state = copy.deepcopy(model.state_dict())

    def refused(match, model, adapters):
        with pytest.raises(ValueError, match=match):
            load_adapters(model, adapters)

    for name, config in {"dora": {"variant": "dora"}, "vera": {"variant": "vera"}, "head": {"modules_to_save": ["lm_head"]}}.items():
        other = apply_lora(base("llama"), LoRAConfig(**config))
        save_adapter(other, tmp_path / name)
        refused("is more than a low-rank pair", model, {"legal": folders["legal"], name: tmp_path / name})
    for none in ({}, ["legal"]):
        refused("give a dict with at least one name and folder", model, none)
    refused("no such adapter folder", model, {"x": tmp_path / "missing"})
    refused("has LoRA already", apply_lora(base("llama"), LoRAConfig()), folders)
    assert not any(lora_layers(model)) and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    adapters = load_adapters(model, folders)
    with pytest.raises(ValueError, match="'x' is no adapter of this model; there are legal, polite, short"):
        adapters.use("x")
    with pytest.raises(ValueError, match="'x' is no adapter"), adapters.rows(["x"]):
        pass
    with adapters.rows(["legal"]), pytest.raises(ValueError, match=r"got 3 rows, and rows\(\[...\]\) named 1"):
        output(model)
    with pytest.raises(ValueError, match=r"rows\('legal'\): give a list with a name for each row"), adapters.rows("legal"):
        pass
    unload_lora(model)
    torch.testing.assert_close(output(model), output(base("llama")), rtol=0, atol=0)
    with pytest.raises(ValueError, match="LoRA was taken out of this model"):
        adapters.use("legal")  # nothing is there that could be switched


def test_no_folder_of_zeros_while_the_base_is_alone(model, folders, tmp_path):
    adapters = load_adapters(model, folders)
    adapters.use(None)
    with pytest.raises(ValueError, match=r"none of the model's adapters is active, .* call adapters\.use\(name\) first"):
        save_adapter(model, tmp_path / "zeros")
    assert not (tmp_path / "zeros").exists()
    unload_lora(model)
    save_adapter(apply_lora(model, LoRAConfig(rank=2)), tmp_path / "fresh")  # what begins at zero is saved


def test_convolutions(tmp_path):
    x, made, wanted = torch.randn(2, 3, 5, 5), {}, {}
    for name, rank in (("a", 2), ("b", 3)):
        model = apply_lora(Conv(), LoRAConfig(target_modules=["conv"], rank=rank))
        for parameter in get_lora_parameters(model):
            nn.init.normal_(parameter)
        made[name], wanted[name] = save_adapter(model, tmp_path / name), model(x).detach()
    model = Conv()
    adapters = load_adapters(model, made)
    with torch.no_grad(), adapters.rows(["a", "b"]):
        found = model(x)
    torch.testing.assert_close(found, torch.stack([wanted["a"][0], wanted["b"][1]]), rtol=1e-4, atol=1e-5)


def test_factors_of_a_float64_model_keep_their_digits(tmp_path):
    """The scaling was multiplied into B in float32."""
    model = apply_lora(base("llama").double(), LoRAConfig(**CONFIGS["legal"]))
    randomise(model)
    adapters = load_adapters(served := base("llama").double(), {"legal": save_adapter(model, tmp_path / "adapter")})
    adapters.use("legal")
    torch.testing.assert_close(output(served), output(model), rtol=0, atol=1e-13)
