"""Adapter folders exchanged with PEFT 0.21 both ways give equal logits (what is refused: test_folders_refused.py)."""

import copy

import pytest
import torch
from torch import nn

from lightning_lora import apply_lora, load_adapter, merge_lora, save_adapter
from tests.parity.snapshots import same_snapshot, snapshot

from .models import DEPRECATED_BY_PEFT, base, batch, close, logits, our_config, randomise, read_by_peft, theirs, trained, twins

pytestmark = pytest.mark.filterwarnings(DEPRECATED_BY_PEFT)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CONV1D = {"fan_in_fan_out": True}
TIED = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
SAVES_EMBEDDINGS = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")

BOTH = {
    "llama": ("llama", {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"], "lora_alpha": 16}),
    "llama-rank-pattern": ("llama", {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 4, r".*\.1\.self_attn\.v_proj": 2}}),
    "llama-alpha-pattern": (
        "llama",
        {"target_modules": ATTENTION, "alpha_pattern": {"^model.layers.0.self_attn.o_proj$": 3, "q_proj": 32}},
    ),
    "llama-first-wins": ("llama", {"target_modules": ATTENTION, "rank_pattern": {"1.self_attn.q_proj": 2, "self_attn.q_proj": 4}}),
    "llama-rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {"v_proj": 2}}),
    "llama-dora": ("llama", {"target_modules": [*ATTENTION, "embed_tokens"], "use_dora": True, "rank_pattern": {"v_proj": 2}}),
    "vit-dora-conv": ("vit", {"target_modules": ["projection", "q_proj"], "use_dora": True, "use_rslora": True}),
    "llama-layers": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "llama-exclude": ("llama", {"target_modules": ATTENTION, "exclude_modules": ["layers.0.self_attn.q_proj", "o_proj"]}),
    "llama-exclude-regex": ("llama", {"target_modules": ATTENTION, "exclude_modules": r".*\.1\.self_attn\.(q|k)_proj"}),
    "llama-regex": ("llama", {"target_modules": r"model\.layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.down_proj)"}),
    "llama-all-linear": ("llama", {"target_modules": "all-linear"}),
    "llama-full-names": ("llama", {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]}),
    "llama-embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama-head": ("llama", {"target_modules": ["lm_head", "v_proj"]}),
    "llama-saved-embedding": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "model.norm"]}),
    "llama-bias-only": ("llama-bias", {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    "llama-bias-all": ("llama-bias", {"target_modules": ["q_proj"], "bias": "all"}),
    "llama-gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1}),
    "llama-tied-embedding": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama-tied-head": ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}),
    "llama-tied-both": ("llama-tied", {"target_modules": ["lm_head", "embed_tokens"]}),
    "bert-classifier": ("bert", {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    "bert-bias-only": ("bert", {"target_modules": ["query", "dense"], "bias": "lora_only", "modules_to_save": ["classifier"]}),
    "bert-bias-all": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "bert-bias-all-classifier": ("bert", {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}),
    "bert-embeddings": (
        "bert",
        {"target_modules": ["word_embeddings", "token_type_embeddings", "key"], "r": 2},
    ),
    "bert-all-linear": ("bert", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "bert-task-type": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], **CONV1D}),
    "gpt2-all-linear": ("gpt2", {"target_modules": "all-linear", **CONV1D}),
    "gpt2-layer": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "layers_to_transform": 0, **CONV1D}),
    "gpt2-positions": ("gpt2", {"target_modules": ["wpe", "c_attn"], "bias": "lora_only", **CONV1D}),
    "t5": ("t5", {"target_modules": ["q", "v", "wi", "wo"], "exclude_modules": ["EncDecAttention.v"]}),
    "t5-regex": ("t5", {"target_modules": r".*decoder.*(SelfAttention|EncDecAttention)\.(q|v)"}),
    "t5-layers": ("t5", {"target_modules": ["q", "relative_attention_bias"], "layers_to_transform": [0], "r": 4}),
    "vit": ("vit", {"target_modules": ["projection", *ATTENTION, "fc1"], "modules_to_save": ["classifier"]}),
    "vit-layers": (
        "vit",
        {"target_modules": ["q_proj", "fc2"], "layers_to_transform": [0], "modules_to_save": ["layernorm", "classifier"]},
    ),
    "resnet": ("resnet", {"target_modules": ["convolution"], "modules_to_save": ["classifier"]}),
    "resnet-layers": (
        "resnet",
        {"target_modules": ["convolution"], "layers_to_transform": [1], "rank_pattern": {"shortcut.convolution": 2}},
    ),
    "resnet-saved-norm": ("resnet", {"target_modules": ["0.convolution"], "modules_to_save": ["normalization"], "bias": "all"}),
    "resnet-head": ("resnet", {"target_modules": ["classifier.1", "1.convolution"], "r": 2}),
}
# What only PEFT can express: its own matching rules, and modules that it infers. Read from its files, not written by us.
ONLY_PEFT = {
    "llama-inferred-targets": ("llama", {}),
    "llama-layers-pattern": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "bert-saved-inside-targets": ("bert", {"target_modules": ["query", "dense"], "modules_to_save": ["pooler", "classifier"]}),
    "llama-upper-case": ("llama", {"target_modules": "ALL-LINEAR"}),
    "llama-float-alpha": ("llama", {"target_modules": ["q_proj"], "lora_alpha": 0.5, "init_lora_weights": False}),
    "gpt2-inferred-targets": ("gpt2", CONV1D),
    "llama-whole-name-ignores-layers": (
        "llama",
        {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]},
    ),
    "llama-saved-without-a-dot": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "bert-saved-ends": ("bert", {"target_modules": ["query"], "modules_to_save": ["output.dense"]}),
    "resnet-nested-layers": ("resnet", {"target_modules": ["convolution"], "layers_to_transform": [0], "layers_pattern": ["layer"]}),
}


def rows(table):
    return [pytest.param(*row, id=key, marks=marks(*row)) for key, row in table.items()]


def marks(name: str, peft: dict) -> list[pytest.MarkDecorator]:
    ends = bool({"embed_tokens", "lm_head"}.intersection(peft.get("target_modules", ())))
    return [SAVES_EMBEDDINGS] * ends + [TIED] * ("tied" in name)


def move_saved_statistics(model: nn.Module, name: str, peft: dict) -> None:
    """A training forward: the running statistics of a norm that is saved in full belong to the adapter."""
    if "normalization" in peft.get("modules_to_save", ()):
        model.train()(**batch(name, seed=7))
        model.eval()


@pytest.mark.parametrize(("name", "peft"), rows(BOTH))
def test_peft_reads_ours(name, peft, tmp_path):
    ours, _ = twins(base(name), **peft)
    move_saved_statistics(ours, name, peft)
    save_adapter(ours, tmp_path / "adapter")
    loaded = read_by_peft(base(name), tmp_path / "adapter")
    weights = trained(loaded)
    assert weights.keys() == trained(ours).keys()  # biases and saved modules train on there
    for key, parameter in trained(ours).items():
        close(weights[key], parameter, atol=0.0, what=key)
    close(logits(loaded, name), logits(ours, name))
    assert (logits(loaded, name) - logits(base(name), name)).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "peft"), rows(BOTH | ONLY_PEFT))
def test_we_read_pefts(name, peft, tmp_path):
    other = theirs(base(name), **peft)
    randomise(other)
    move_saved_statistics(other, name, peft)
    other.save_pretrained(tmp_path)
    model = base(name)
    ours = load_adapter(model, tmp_path)
    assert ours is model
    assert trained(ours).keys() == trained(other).keys()
    for key, parameter in trained(other).items():
        close(trained(ours)[key], parameter, atol=0.0, what=key)
    close(logits(ours.eval(), name), logits(other, name))


@TIED
@pytest.mark.parametrize(
    ("saved", "refusal"),
    [
        (["embed_tokens"], r"embed_tokens.*tied|tied.*embed_tokens"),  # PEFT trains a copy and leaves the head on the old weight
        (["embed_tokens", "lm_head"], r"embed_tokens.*lm_head|lm_head.*embed_tokens"),  # two copies, which drift apart
    ],
    ids=["one", "both"],
)
def test_saved_modules_on_a_tied_weight_that_peft_trained(tmp_path, saved, refusal):
    """One weight cannot hold what PEFT trained apart: refused, never the head moved along."""
    other = theirs(base("llama-tied"), target_modules=["q_proj"], modules_to_save=saved)
    randomise(other)
    other.save_pretrained(tmp_path)
    model = base("llama-tied")
    before = snapshot(model)
    with pytest.raises(ValueError, match=refusal):
        load_adapter(model, tmp_path)
    same_snapshot(before, snapshot(model))


@TIED
def test_two_saved_modules_on_one_weight_as_we_train_them(tmp_path):
    ours = apply_lora(base("llama-tied"), config=our_config(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    randomise(ours)
    save_adapter(ours, tmp_path)
    close(logits(read_by_peft(base("llama-tied"), tmp_path), "llama"), logits(ours, "llama"))


def test_a_merged_model_saves_the_same_adapter(tmp_path):
    ours, other = twins(base("llama"), target_modules=ATTENTION)
    save_adapter(merge_lora(ours), tmp_path)
    close(logits(read_by_peft(base("llama"), tmp_path), "llama"), logits(other, "llama"))


class Nested(nn.Module):
    """Names that end in one another: `fc` and `inner.fc`, `norm` and `inner.layernorm`."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.inner = nn.ModuleDict({"fc": nn.Linear(8, 8), "layernorm": nn.LayerNorm(8)})

    def forward(self, x):
        return self.norm(self.fc(self.inner["layernorm"](self.inner["fc"](x).relu())))


ONLY_THE_OUTER = {
    "regex": {"target_modules": "fc"},
    "exclude": {"target_modules": ["fc"], "exclude_modules": ["inner.fc"]},
    "rank": {"target_modules": ["fc"], "rank_pattern": {"^fc$": 2}},
}


@pytest.mark.parametrize("config", ONLY_THE_OUTER.values(), ids=ONLY_THE_OUTER.keys())
def test_a_name_that_ends_in_another(config, tmp_path):
    torch.manual_seed(0)
    model = Nested()
    ours = apply_lora(copy.deepcopy(model), config=our_config(r=4, **config))
    randomise(ours)
    save_adapter(ours, tmp_path)
    loaded = read_by_peft(copy.deepcopy(model), tmp_path)
    assert trained(loaded).keys() == trained(ours).keys()
    x = torch.randn(5, 8)
    close(loaded(x), ours(x))


def test_a_saved_module_whose_name_ends_another(tmp_path):
    """PEFT takes `norm` for `inner.layernorm` too: a folder that it cannot read is not written."""
    ours = apply_lora(Nested(), config=our_config(r=4, target_modules=["fc"], modules_to_save=["norm"]))
    with pytest.raises(ValueError, match=r"norm.*inner\.layernorm"):
        save_adapter(ours, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


class TwoParents(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.ModuleDict({"fc": nn.Linear(8, 8)})
        self.b = nn.ModuleDict({"fc": self.a["fc"]})

    def forward(self, x):
        return self.b["fc"](self.a["fc"](x).relu())


def test_a_layer_with_two_parents(tmp_path):
    """PEFT adapts its first use alone, we the layer: its folder is refused by both names, ours warns and reads exactly here."""
    model = TwoParents()
    theirs(copy.deepcopy(model), target_modules=["fc"]).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"a\.fc.*b\.fc"):
        load_adapter(copy.deepcopy(model), tmp_path / "theirs")
    ours = apply_lora(copy.deepcopy(model), config=our_config(target_modules=["fc"]))
    randomise(ours)
    with pytest.warns(UserWarning, match=r"a\.fc.*b\.fc"):
        save_adapter(ours, tmp_path / "ours")
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    close(load_adapter(copy.deepcopy(model), tmp_path / "ours")(x), ours(x), atol=0.0)


@pytest.mark.parametrize(("name", "peft"), rows({key: BOTH[key] for key in ("llama-layers", "bert-bias-all-classifier", "gpt2", "resnet")}))
def test_round_trip(name, peft, tmp_path):
    """PEFT → ours → PEFT: nothing is lost on the way."""
    other = theirs(base(name), **peft)
    randomise(other)
    other.save_pretrained(tmp_path / "first")
    save_adapter(load_adapter(base(name), tmp_path / "first"), tmp_path / "second")
    again = read_by_peft(base(name), tmp_path / "second")
    close(logits(again, name), logits(other, name), atol=0.0)
