"""Adapter folders exchanged with PEFT 0.21 both ways give equal logits; what PEFT's format holds and we do not do is refused by field."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import apply_lora, load_adapter, merge_lora, save_adapter

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


def snapshot(model: nn.Module) -> dict[str, object]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    return {"state": state, "flags": flags, "types": {key: type(module) for key, module in model.named_modules()}}


def same_snapshot(before: dict, after: dict) -> None:
    assert before["flags"] == after["flags"]
    assert before["types"] == after["types"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)


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


def test_the_pickle_format_is_refused(tmp_path):
    theirs(base("llama"), target_modules=["q_proj"]).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match=r"adapter_model\.bin"):
        load_adapter(base("llama"), tmp_path)


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


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "another rank"])
def test_tensors_that_are_not_the_configs_are_refused(change, tmp_path):
    """The matching rules are PEFT's, but what counts is that the tensors and the config agree to the last one."""
    theirs(base("llama"), target_modules=["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors[name.replace("q_proj", "k_proj")] = tensors[name].clone()
    elif change == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    else:
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    model = base("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.[qk]_proj"):
        load_adapter(model, tmp_path)
    same_snapshot(before, snapshot(model))


@pytest.mark.parametrize(("name", "peft"), rows({key: BOTH[key] for key in ("llama-layers", "bert-bias-all-classifier", "gpt2", "resnet")}))
def test_round_trip(name, peft, tmp_path):
    """PEFT → ours → PEFT: nothing is lost on the way."""
    other = theirs(base(name), **peft)
    randomise(other)
    other.save_pretrained(tmp_path / "first")
    save_adapter(load_adapter(base(name), tmp_path / "first"), tmp_path / "second")
    again = read_by_peft(base(name), tmp_path / "second")
    close(logits(again, name), logits(other, name), atol=0.0)


REFUSED = [
    ("lora_bias", True),
    *(("init_lora_weights", init) for init in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga")),
    ("loftq_config", {"loftq_bits": 4, "loftq_iter": 1}),
    ("target_parameters", ["mlp.experts.gate_up_proj"]),
    ("trainable_token_indices", [1, 2]),
    ("trainable_token_indices", {"embed_tokens": [1]}),
    ("layer_replication", [[0, 1], [0, 2]]),
    ("alora_invocation_tokens", [5, 6]),
    ("megatron_config", {"num_layers": 2}),
    ("use_qalora", True),
    ("velora_config", {"num_groups": 2}),
    ("monteclora_config", {"num_samples": 2}),
    ("use_bdlora", {"nblocks": 2}),
    ("arrow_config", {"top_k": 1}),
    ("kasa_config", {"beta": 1e-4}),
    ("ensure_weight_tying", True),
    ("peft_type", "LOHA"),
    ("peft_type", "ADALORA"),
]


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=[f"{field}={json.dumps(value)[:20]}" for field, value in REFUSED])
def test_what_we_do_not_do_is_refused_by_field(field, value, tmp_path):
    theirs(base("llama"), target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    model = base("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=field):
        load_adapter(model, tmp_path)
    same_snapshot(before, snapshot(model))


INERT = {
    "inference_mode": False,
    "revision": "main",
    "base_model_name_or_path": "x/y",
    "peft_version": "0.17.0",
    "task_type": "CAUSAL_LM",
    "qalora_group_size": 8,
    "fan_in_fan_out": True,  # a layer knows how it stores its weight
    "eva_config": {"rho": 2.0},  # these three act only under their own init
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"direction": "ArB2r"},
}


@pytest.mark.parametrize("field", INERT)
def test_inert_fields_are_accepted(field, tmp_path):
    other = theirs(base("llama"), target_modules=["q_proj"])
    randomise(other)
    other.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: INERT[field]}))
    close(logits(load_adapter(base("llama"), tmp_path), "llama"), logits(other, "llama"))


def test_absent_fields_mean_pefts_defaults(tmp_path):
    """Folders of older versions lack most fields; PEFT's alpha is 8, not our 16."""
    other = theirs(base("llama"), target_modules=["q_proj"])
    randomise(other)
    other.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    close(logits(load_adapter(base("llama"), tmp_path), "llama"), logits(other, "llama"))


def test_an_unknown_field_is_not_passed_over_in_silence(tmp_path):
    theirs(base("llama"), target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"a_field_of_tomorrow": 3}))
    with pytest.warns(UserWarning, match="a_field_of_tomorrow"):
        load_adapter(base("llama"), tmp_path)
