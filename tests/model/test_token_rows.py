"""``trainable_token_indices`` on whole models: which modules it means, what trains, mistakes, files, merges."""

import copy

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    disabled_lora,
    export_merged,
    find_targets,
    load_adapter,
    load_adapters,
    lora_param_groups,
    merge_lora,
    save_adapter,
    unload_lora,
    unmerge_lora,
)
from lightning_lora.model.apply import already_applied
from tests import tiny_lm
from tests.parity.models import llama

IDS = torch.tensor([[5, 3, 9, 1]])


def config(rows, **fields):
    return LoRAConfig(rank=2, target_modules=fields.pop("target_modules", ["q_proj"]), trainable_token_indices=rows, **fields)


def filled(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([3, -1], r"trainable_token_indices: -1 is no row number"),
        ([3, 3], r"trainable_token_indices: row 3 is there twice"),
        ([True], r"trainable_token_indices: True is no row number"),
        ([1.5], r"1.5 is no row number"),
        ("all", r"trainable_token_indices='all': give a list of row numbers"),
        ({"embed": []}, r"trainable_token_indices\['embed'\]=\[\]: give a list"),
        ({"embed": [2, 2]}, r"trainable_token_indices\['embed'\]: row 2 is there twice"),
        ({"": [2]}, r"trainable_token_indices: '' is not a module name"),
    ],
)
def test_mistakes_that_the_config_shows(rows, reason):
    with pytest.raises(ValueError, match=reason):
        config(rows)


def test_the_config_is_plain_and_compares():
    assert config([]).trainable_token_indices is config({}).trainable_token_indices is config(None).trainable_token_indices is None
    one = config([3, 5])
    assert LoRAConfig(**one.to_dict()) == one
    assert one.to_dict()["trainable_token_indices"] == [3, 5]
    assert one.differences(config([5, 3])) == ["trainable_token_indices: (3, 5) != (5, 3)"]
    named = config({"embed_tokens": (3, 5)})
    assert LoRAConfig(**named.to_dict()) == named


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places, self.q_proj = nn.Embedding(10, 4), nn.Embedding(6, 4), nn.Linear(4, 4)
        self.limited, self.often = nn.Embedding(5, 4, max_norm=1.0), nn.Embedding(5, 4, scale_grad_by_freq=True)
        self.conv = nn.Conv1d(4, 4, 1)
        self.read = Reads()


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, x):
        return x @ self.table.weight.t()


@pytest.mark.parametrize(
    ("rows", "fields", "reason"),
    [
        ([3], {}, r"a list is for the input embedding, and this model has 'words', 'places', .*; give a mapping"),
        ({"wrods": [3]}, {}, r"trainable_token_indices: 'wrods' matches no module. Nearest names: words"),
        ({"words": [3, 10]}, {}, r"'words'.*trainable_token_indices names row 10, and it has 10 here: call resize_token_embeddings\(11\)"),
        ({"words": [3], "wor.*": [4]}, {}, r"two entries give rows of 'words', \[3\] and \[4\]"),
        (
            {"words": [3]},
            {"target_modules": ["q_proj", "words"]},
            r"'words' has rows that train by trainable_token_indices, and an adapter",
        ),
        ({"words": [3]}, {"modules_to_save": ["words"]}, r"'words' is trained in full by modules_to_save, its rows too"),
        ({"limited": [3]}, {}, r"'limited'.*max_norm=1.0 changes the frozen weight"),
        ({"often": [3]}, {}, r"'often'.*scale_grad_by_freq=True is not supported"),
        ({"conv": [3]}, {}, r"'conv'.*is for embeddings and linear layers"),
        ({"table": [3]}, {}, r"'read.table' .*Reads.forward reads its weight without calling it"),
        (None, {"kind_pattern": {"q_proj": "token_rows"}}, r"'q_proj'.*trainable_token_indices names the rows of this kind"),
    ],
)
def test_mistakes_that_a_model_shows(rows, fields, reason):
    model = Two()
    before = {name: (type(module), copy.copy(module.__dict__)) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=reason):
        apply_lora(model, config(rows, **fields))
    assert {name: type(module) for name, module in model.named_modules()} == {name: cls for name, (cls, _) in before.items()}
    assert all(p.requires_grad for p in model.parameters())


def test_a_weight_that_something_else_has_too_is_refused():
    model = Two()
    model.copy = nn.Module()
    model.copy.other = model.words.weight
    with pytest.raises(ValueError, match=r"the weight of 'words' is also 'copy.other', where its rows cannot follow"):
        apply_lora(model, config({"words": [3]}))


def test_only_the_rows_train_and_have_a_state():
    model = apply_lora(llama(tie_word_embeddings=True), config([3, 5]))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name in names if "lora_A" not in name and "lora_B" not in name] == ["model.embed_tokens.lora_rows"]
    groups = lora_param_groups(model, lr=0.1, lora_plus_ratio=4.0)
    assert {group["name"]: group["lr"] for group in groups} == {"lora_A": 0.1, "lora_B": 0.4, "other": 0.1}
    optimizer, base = torch.optim.AdamW(groups), copy.deepcopy(model.state_dict())
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert {tuple(state["exp_avg"].shape) for state in optimizer.state.values()} == {(2, 32), (32, 2)}
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, base[name])]
    assert sorted(changed) == sorted(name for name in names if "lora_A" not in name)  # A's first gradient is zero, because B is


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_all_modules_of_one_weight_follow(kind):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "decoder_start_token_id": 0, "vocab_size": 40}
    if kind == "t5":
        model = T5ForConditionalGeneration(T5Config(d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0, **sizes))
        targets = ["q"]
    else:
        heads = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("attention_heads", "ffn_dim")}
        layers = {"encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16}
        model = BartForConditionalGeneration(BartConfig(**sizes, **heads, **layers))
        targets = ["q_proj"]
    model.double().eval()
    wanted = copy.deepcopy(model)
    with torch.no_grad():
        wanted.get_input_embeddings().weight[[3, 5]] += 1
    apply_lora(model, config([3, 5], target_modules=targets))
    with torch.no_grad():
        model.get_input_embeddings().lora_rows += 1
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    torch.testing.assert_close(model(**inputs).logits, wanted(**inputs).logits, rtol=0, atol=1e-10)
    merge_lora(model)
    torch.testing.assert_close(model(**inputs).logits, wanted(**inputs).logits, rtol=0, atol=1e-10)
    assert sum("lora_rows" in name for name, _ in model.named_parameters()) == 1


def test_the_report_says_which_modules_and_applying_again_changes_nothing():
    model = llama(tie_word_embeddings=True)
    report = find_targets(model, config([3, 5, 7]))
    assert "token rows: model.embed_tokens, 3 rows, 96 parameters; the same rows in lm_head" in str(report)
    assert report.parameters == 96 + 2 * 2 * 2 * 32
    apply_lora(model, config([3, 5, 7]))
    assert already_applied(model, config([3, 5, 7]))
    assert already_applied(model, config({"embed_tokens": [3, 5, 7]}))  # it means the same here
    with pytest.raises(ValueError, match="has another LoRA config"):
        apply_lora(model, config([3, 5]))
    unload_lora(model)
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.embed_tokens) is nn.Embedding
    assert not any("lora_" in name for module in model.modules() for name in (*module.__dict__, *module._parameters))


def test_the_base_alone():
    model, base = filled(apply_lora(llama(tie_word_embeddings=True), config([3, 5]))), llama(tie_word_embeddings=True)
    base.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name})
    with disabled_lora(model):
        assert torch.equal(model(IDS).logits, base(IDS).logits)
    assert not torch.equal(model(IDS).logits, base(IDS).logits)


@pytest.mark.parametrize("how", ["list", "names", "head"])
def test_files_hold_the_rows_alone_and_train_further(how, tmp_path):
    rows = {"list": [3, 5], "names": {"embed_tokens": [3], "lm_head": [7, 5]}, "head": {"lm_head": [1]}}[how]
    plain = llama().double().eval()
    model = filled(apply_lora(copy.deepcopy(plain), config(rows)))
    save_adapter(model, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 8000  # the embedding alone has 64 · 32 · 8 bytes
    loaded = load_adapter(copy.deepcopy(plain), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}
    again = load_adapter(apply_lora(copy.deepcopy(plain), config(rows)), tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match=r"does not fit the LoRA this model has.*'(model.embed_tokens|lm_head)'"):
        load_adapter(apply_lora(copy.deepcopy(plain), config([9, 5] if how != "head" else [1])), tmp_path)


@pytest.mark.filterwarnings("ignore:The new embeddings will be initialized")
def test_new_rows_are_no_part_of_the_base(tmp_path):
    """Each process draws them anew. Rows that do not train still tell another base."""

    def resized(seed, rows=66):
        model = tiny_lm.llama()
        torch.manual_seed(seed)
        model.resize_token_embeddings(rows)
        return model

    with torch.no_grad():
        model = filled(apply_lora(resized(1), config({"embed_tokens": [21, 22], "lm_head": [21, 22]})))
        for rows in (model.model.embed_tokens, model.lm_head):
            rows.weight[23:] = 0
    save_adapter(model, tmp_path)
    other = resized(2)
    with torch.no_grad():
        for part in (other.model.embed_tokens, other.lm_head):
            part.weight[23:] = 0
    ids = torch.tensor([[21, 4, 22]])
    assert torch.equal(load_adapter(copy.deepcopy(other), tmp_path)(ids).logits, model(ids).logits)
    merged = merge_lora(copy.deepcopy(model))
    save_adapter(merged, tmp_path / "of merged")
    assert torch.equal(load_adapter(copy.deepcopy(other), tmp_path / "of merged")(ids).logits, model(ids).logits)
    other.model.embed_tokens.weight.data[:20] += 1
    with pytest.raises(ValueError, match="was trained on another base"):
        load_adapter(other, tmp_path)
    with pytest.raises(ValueError, match=r"names row 22, and it has 21 here: call resize_token_embeddings\(23\) first"):
        load_adapter(tiny_lm.llama(), tmp_path, check_base=False)


@pytest.mark.filterwarnings("ignore:The new")
def test_added_tokens_of_a_pretrained_model(tmp_path):
    """A new output layer, as resizing makes it, trains in full by default, and in its new rows alone where the config names these."""
    tiny_lm.llama().save_pretrained(tmp_path)
    model = type(tiny_lm.llama()).from_pretrained(tmp_path)
    model.resize_token_embeddings(23)
    assert find_targets(model, config([21, 22])).saved == ("lm_head",)
    report = find_targets(model, config({"embed_tokens": [21, 22], "lm_head": [21, 22]}))
    assert report.saved == ()
    assert [target.fqn for target in report.rows] == ["model.embed_tokens", "lm_head"]


@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_model_has_the_rows(tied, tmp_path):
    model = filled(apply_lora(llama(tie_word_embeddings=tied), config([3, 5]))).eval()
    wanted = model(IDS).logits
    export_merged(model, tmp_path)
    exported = type(model).from_pretrained(tmp_path)
    assert (exported.lm_head.weight is exported.model.embed_tokens.weight) == tied
    torch.testing.assert_close(exported.eval()(IDS).logits, wanted)


def test_different_rows_of_one_weight_merge_untied_only():
    plain = llama(tie_word_embeddings=True).double().eval()
    model = filled(apply_lora(copy.deepcopy(plain), config({"embed_tokens": [3, 5], "lm_head": [7]})))
    wanted = model(IDS).logits
    with pytest.raises(ValueError, match=r"embed_tokens.weight is tied to lm_head.weight"):
        merge_lora(model)
    merge_lora(model, untie=True)
    torch.testing.assert_close(model(IDS).logits, wanted, rtol=0, atol=1e-10)
    unmerge_lora(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    torch.testing.assert_close(model(IDS).logits, wanted, rtol=0, atol=1e-10)


def test_a_set_of_adapters_is_for_pairs(tmp_path):
    save_adapter(apply_lora(llama(), config([3, 5])), tmp_path)
    model = llama()
    model.load_state_dict(apply_lora(llama(), config([3])).state_dict(), strict=False)
    with pytest.raises(ValueError, match=r"'model.embed_tokens.lora_rows' is more than a low-rank pair .*token rows"):
        load_adapters(llama(), {"one": tmp_path}, check_base=False)


@pytest.mark.parametrize("variant", ["dora", "adalora", "vera", "lora_xs", "lora_fa"])
def test_beside_every_variant_and_start(variant, tmp_path):
    """The rows have no formula: a variant's and an init's own parts are on the other layers."""
    plain = llama(tie_word_embeddings=True).double().eval()
    model = filled(apply_lora(copy.deepcopy(plain), config([3, 5], variant=variant)))
    wanted = model(IDS).logits
    save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(copy.deepcopy(plain), tmp_path)(IDS).logits, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(merge_lora(model)(IDS).logits, wanted, rtol=0, atol=1e-10)
