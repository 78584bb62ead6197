"""Which modules a config means on a model, and every way it can be wrong, found before anything is changed."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from lightning_lora import LoRAConfig, apply_lora, find_targets
from lightning_lora.model.heads import fresh_heads
from tests.conftest import TinyModel, snapshot

SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**kwargs):
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, **SIZES, **kwargs))


def bert(cls=BertForSequenceClassification):
    return cls(BertConfig(vocab_size=16, **SIZES))


def names(model, **fields):
    return [target.fqn for target in find_targets(model, LoRAConfig(**fields)).targets]


Q, V, MLP = ([f"layers.{i}.{name}" for i in (0, 1)] for name in ("attn.q_proj", "attn.v_proj", "mlp"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [Q[0], V[0], Q[1], V[1]]),
        ({"target_modules": ["q_proj"]}, Q),
        ({"target_modules": ["attn.q_proj"]}, Q),
        ({"target_modules": ["layers.1.attn.q_proj"]}, Q[1:]),
        ({"target_modules": [r".*\.0\..*_proj", "lm_head"]}, [Q[0], V[0], "lm_head"]),
        ({"target_modules": [r".*_proj", "q_proj"]}, [Q[0], V[0], Q[1], V[1]]),  # two entries, once each
        ({"target_modules": r"layers\.\d\.mlp"}, MLP),
        ({"target_modules": "all-linear"}, [Q[0], V[0], MLP[0], Q[1], V[1], MLP[1], "lm_head"]),
        ({"exclude_modules": ["v_proj"]}, Q),
        ({"exclude_modules": r".*\.1\..*"}, [Q[0], V[0]]),
        ({"layers": [1]}, [Q[1], V[1]]),
        ({"layers": [0, 1], "target_modules": ["mlp"]}, MLP),
        ({"target_modules": ["embed", "q_proj"]}, ["embed", *Q]),
    ],
)
def test_which_modules(make, fields, expected):
    model = make(TinyModel)
    before = snapshot(model)
    assert names(model, **fields) == expected
    assert snapshot(model) == before


def test_layers_leave_out_what_sits_in_no_block(make):
    assert names(make(TinyModel), target_modules=["q_proj", "lm_head"], layers=[0]) == [Q[0]]


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_leaves_the_output_head_of_a_language_model(tied):
    found = names(llama(tie_word_embeddings=tied), target_modules="all-linear")
    assert len(found) == 2 * 7
    assert "lm_head" not in found
    assert names(llama(), target_modules=["lm_head"]) == ["lm_head"]  # by name it can be had


def test_all_linear_finds_the_head_of_a_model_inside_another():
    model = nn.ModuleDict({"inner": llama()})
    assert "inner.lm_head" not in names(model, target_modules="all-linear")


def test_all_linear_leaves_a_classification_head():
    model = bert()
    report = find_targets(model, LoRAConfig(target_modules="all-linear"))
    assert "classifier" not in [t.fqn for t in report.targets]
    assert "bert.pooler.dense" in [t.fqn for t in report.targets]
    assert report.saved == ("classifier",)


@pytest.mark.parametrize(
    ("cls", "heads"),
    [
        (BertForSequenceClassification, ["classifier"]),
        (BertForTokenClassification, ["classifier"]),
        (BertForQuestionAnswering, ["qa_outputs"]),
    ],
)
def test_fresh_heads_of_transformers_models(cls, heads):
    assert fresh_heads(bert(cls)) == heads
    wrapped = nn.ModuleDict({"net": bert(cls)})
    assert fresh_heads(wrapped) == [f"net.{head}" for head in heads]


def test_no_fresh_head_elsewhere(make):
    assert fresh_heads(llama()) == []
    assert fresh_heads(make(TinyModel)) == []
    assert fresh_heads(bert().bert) == []


@pytest.mark.parametrize(("saved", "expected"), [("auto", ("classifier",)), ([], ()), (["pooler"], ("bert.pooler",))])
def test_modules_to_save(saved, expected):
    model = bert()
    config = LoRAConfig(target_modules=["query"], modules_to_save=saved)
    assert find_targets(model, config).saved == expected
    apply_lora(model, config=config)
    trained = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trained == {{"classifier": "classifier", "bert.pooler": "bert.pooler.dense"}[name] for name in expected}


def test_rank_and_alpha_patterns_the_first_that_matches_wins(make):
    config = LoRAConfig(
        rank=8,
        alpha=16,
        rank_pattern={"layers.0.attn.q_proj": 2, "q_proj": 4, r".*\.v_proj": 1},
        alpha_pattern={r".*_proj": 5, "q_proj": 7},
        target_modules=["q_proj", "v_proj", "mlp"],
    )
    found = {t.fqn: (t.rank, t.alpha) for t in find_targets(make(TinyModel), config).targets}
    assert found == {Q[0]: (2, 5.0), V[0]: (1, 5.0), MLP[0]: (8, 16.0), Q[1]: (4, 5.0), V[1]: (1, 5.0), MLP[1]: (8, 16.0)}
    layers = apply_lora(make(TinyModel), config=config).layers
    assert layers[0].attn.q_proj.lora_A.shape == (2, 8)
    assert layers[1].attn.q_proj.scaling == 5 / 4


def shared_model():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["c"] = model["a"]
    return model


@pytest.mark.parametrize("targets", [["a", "c"], ["a"], ["c"], "all-linear"])
def test_a_module_under_two_names_is_adapted_once_under_either(targets):
    model = shared_model()
    found = find_targets(model, LoRAConfig(target_modules=targets, rank=2))
    assert len([t for t in found.targets if t.module is model["a"]]) == 1
    apply_lora(model, config=LoRAConfig(target_modules=targets, rank=2))
    assert model["a"] is model["c"]
    assert len([n for n, _ in model.named_parameters() if n.endswith("lora_A")]) == len(found.targets)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"target_modules": ["q_porj"]}, ["target_modules: 'q_porj' matches no module", "Nearest names: q_proj", "allow_unmatched=True"]),
        ({"target_modules": ["q_proj", "k_proj"]}, ["'k_proj' matches no module", "q_proj"]),
        ({"target_modules": "q_proj"}, ["'q_proj' matches no module", "a regex over the whole name", "give a list: ['q_proj']"]),
        ({"target_modules": "zzz"}, ["'zzz' matches no module", "Nearest names: embed, q_proj"]),
        ({"exclude_modules": ["vproj"]}, ["exclude_modules: 'vproj' matches no module", "v_proj"]),
        ({"rank_pattern": {"mlp": 4}}, ["rank_pattern: 'mlp' matches 'layers.0.mlp', which is not adapted: name it in target_modules too"]),
        ({"alpha_pattern": {"mpl": 4}}, ["alpha_pattern: 'mpl' matches no module. Nearest names: mlp"]),
        ({"alpha_pattern": {"q_prj": 4}}, ["alpha_pattern: 'q_prj' matches no module", "q_proj"]),
        ({"modules_to_save": ["lm_heat"]}, ["modules_to_save: 'lm_heat' matches no module", "lm_head"]),
        ({"layers": [1, 7, 9]}, ["layers=[7, 9]: no targeted module is in a block", "indices are 0–1"]),
        ({"target_modules": ["norm"]}, ["'layers.0.norm' is a torch.nn.modules.normalization.LayerNorm", "supported are", "Linear"]),
        ({"target_modules": ["attn"]}, ["'layers.0.attn' is a tests.conftest.Attention, which LoRA cannot adapt"]),
        ({"modules_to_save": ["q_proj"]}, ["'layers.0.attn.q_proj' is in both target_modules and modules_to_save"]),
        ({"modules_to_save": ["attn"]}, ["is in both target_modules and modules_to_save"]),
        ({"exclude_modules": ["q_proj", "v_proj"]}, ["exclude_modules excludes every module that target_modules matches; exclude less"]),
        ({"init": "orthogonal", "rank": 3}, ["'layers.0.attn.q_proj' (", "init='orthogonal' needs an even rank"]),
        ({"init": "gaussian", "variant": "adalora"}, ["'layers.0.attn.q_proj' (", "AdaLoRA defines its own start"]),
        ({"init": "kaming"}, ["init='kaming' is not known; there are corda, eva, gaussian, kaiming"]),
        ({"variant": "dorra"}, ["variant='dorra' is not known; there are adalora, dora"]),
    ],
)
def test_refusals_name_field_value_and_fix(make, fields, parts):
    model = make(TinyModel)
    before = snapshot(model)
    for call in (find_targets, apply_lora):
        with pytest.raises(ValueError) as error:
            call(model, LoRAConfig(**fields))
        assert all(part in str(error.value) for part in parts), str(error.value)
        assert ".." not in str(error.value) and str(error.value).count("is not known") <= 1
    assert snapshot(model) == before


@pytest.mark.parametrize("targets", [["a", "b", "c"], "all-linear"])
@pytest.mark.parametrize(("name", "other"), [("a", "c"), ("c", "a")])
def test_a_module_under_two_names_is_left_alone_if_one_is_excluded(targets, name, other):
    model = shared_model()
    found = find_targets(model, LoRAConfig(target_modules=targets, exclude_modules=[name], rank=2))
    assert [t.fqn for t in found.targets] == ["b"] and other not in str(found.left_out)


def test_all_problems_come_at_once_but_not_without_end():
    model = nn.ModuleDict({f"norm{i}": nn.LayerNorm(2) for i in range(12)})
    with pytest.raises(ValueError, match=r"^'norm0' is a .*Exclude it. The same of 'norm1', 'norm2', 'norm3' and 8 more\.$"):
        find_targets(model, LoRAConfig(target_modules=[r"norm\d+"]))
    model["fc"] = nn.Linear(2, 2)
    with pytest.raises(ValueError) as error:
        find_targets(model, LoRAConfig(target_modules=["fc", *(f"nowhere{i}" for i in range(12))]))
    lines = str(error.value).splitlines()
    assert len(lines) == 9
    assert lines[-1] == "… and 4 more."


def test_allow_unmatched_accepts_misses_beside_hits_only(make):
    assert names(make(TinyModel), target_modules=["q_proj", "nope"], layers=[0, 9], allow_unmatched=True) == [Q[0]]
    assert names(make(TinyModel), modules_to_save=["nope"], allow_unmatched=True) == [Q[0], V[0], Q[1], V[1]]
    with pytest.raises(ValueError, match="'nope' matches no module"):
        find_targets(make(TinyModel), LoRAConfig(target_modules=["nope"], allow_unmatched=True))


def test_a_module_without_parameters_cannot_be_saved():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ValueError, match=r"modules_to_save: '1' \(ReLU\) has no parameters to train"):
        find_targets(model, LoRAConfig(target_modules=["0"], rank=2, modules_to_save=["1"]))


def test_saving_one_of_two_tied_modules_is_refused(make):
    with pytest.raises(ValueError, match=r"modules_to_save: lm_head.weight is tied to embed.weight"):
        find_targets(make(TinyModel, tied=True), LoRAConfig(modules_to_save=["lm_head"]))
    model = make(TinyModel)
    model.lm_head.weight.data = model.embed.weight.data  # tied through memory
    with pytest.raises(ValueError, match=r"modules_to_save: lm_head.weight is tied to embed.weight"):
        find_targets(model, LoRAConfig(modules_to_save=["lm_head"]))
    both = find_targets(make(TinyModel, tied=True), LoRAConfig(modules_to_save=["lm_head", "embed"]))
    assert both.saved == ("lm_head", "embed")


def test_a_rank_above_the_layers_is_a_warning_with_its_name(make):
    with pytest.warns(UserWarning, match=r"rank=9 of 'layers.0.mlp' is above min\(in, out\)=8"):
        find_targets(make(TinyModel), LoRAConfig(target_modules=["layers.0.mlp"], rank=9))


def test_attention_that_reads_weights_without_calling_the_layer():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)})
    with pytest.raises(ValueError, match=r"'attn.out_proj' .* reads its weight without calling it"):
        find_targets(model, LoRAConfig(target_modules=["out_proj"]))


class Ties(nn.Module):
    """Reads the weight of one of its linears."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.called(nn.functional.linear(x, self.read.weight))


def test_a_linear_that_is_read_is_refused_by_name():
    model = nn.ModuleDict({"block": Ties(), "head": nn.Linear(4, 2)})
    with pytest.raises(ValueError, match=r"'block.read' .*Ties.forward reads its weight .* Exclude it"):
        find_targets(model, LoRAConfig(target_modules=["read"], rank=2))


def test_all_linear_passes_over_what_an_adapter_cannot_serve():
    model = nn.ModuleDict({"layers": nn.ModuleList(Ties() for _ in range(2)), "head": nn.Linear(4, 2)})
    with pytest.warns(UserWarning, match=r"leaves out 40% of the model, which no linear that LoRA can adapt contains: layers.\*.read"):
        report = find_targets(model, LoRAConfig(target_modules="all-linear", rank=2))
    assert [target.fqn for target in report.targets] == ["layers.0.called", "layers.1.called", "head"]
    assert len(report.passed_over) == 2
    assert report.left_out["layers.*.read (Linear)"] == 64 and report.total == 162
    line = next(line for line in str(report).splitlines() if "read" in line)
    assert line.startswith("passed over: layers.*.read (2): Ties.forward reads its weight without calling it")
    only = nn.ModuleDict({"ties": Ties()})
    only["ties"].called = nn.Identity()
    with pytest.raises(ValueError, match=r"target_modules='all-linear' finds no linear that LoRA can adapt: ties.read"):
        find_targets(only, LoRAConfig(target_modules="all-linear"))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_left_out_with_a_line_and_refused_by_name(kind):
    model = nn.ModuleDict({"recurrent": kind(8, 4), "cell": nn.LSTMCell(8, 4), "head": nn.Linear(4, 2)})
    with pytest.warns(UserWarning, match="leaves out"):
        report = find_targets(model, LoRAConfig(target_modules="all-linear", rank=2))
    assert [target.fqn for target in report.targets] == ["head"]
    assert f"left out: recurrent ({kind.__name__})" in str(report) and "left out: cell (LSTMCell)" in str(report)
    with pytest.raises(ValueError, match=rf"'recurrent' is a torch.nn.modules.rnn.{kind.__name__}, which LoRA cannot adapt: .* Exclude it"):
        find_targets(model, LoRAConfig(target_modules=["recurrent"], rank=2))


def test_meta_models_resolve_without_memory():
    with torch.device("meta"):
        model = TinyModel()
    report = find_targets(model, LoRAConfig())
    assert report.parameters == 4 * 2 * 8 * 8


def test_names_are_free_of_compilers_parts(make):
    model = make(TinyModel)
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    assert names(model) == [Q[0], V[0], Q[1], V[1]]
    assert names(model, target_modules=[r"layers\.0\.attn\.q_proj"]) == [Q[0]]
