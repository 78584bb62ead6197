"""What people and other tools put into adapter folders: read as PEFT reads it or, where PEFT loses something, as it was trained."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, apply_lora, load_adapter, lora_layers, save_adapter

from .attends import Attends
from .models import DEPRECATED_BY_PEFT, SIZES, base, close, logits, randomise, read_by_peft, theirs, trained

pytestmark = pytest.mark.filterwarnings(DEPRECATED_BY_PEFT, "ignore:Setting `save_embedding_layers`")
QV = ["q_proj", "v_proj"]


def change_json(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rename(folder, *pairs):
    file = folder / "adapter_model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        for old, new in pairs:
            name = name.replace(old, new)
        renamed[name] = tensor
    save_file(renamed, file, {"format": "pt"})


def make(name, peft, folder):
    other = theirs(base(name), **peft)
    randomise(other)
    other.save_pretrained(folder)
    return other


DEFAULT = (
    ("lora_A.", "lora_A.default."),
    ("lora_B.", "lora_B.default."),
    ("embedding_A", "embedding_A.default"),
    ("embedding_B", "embedding_B.default"),
)
MINE = (("lora_A.", "lora_A.mine."), ("lora_B.", "lora_B.mine."), ("magnitude_vector", "magnitude_vector.mine.weight"))
SEQ_CLS = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
TRAINED = {
    "all-linear": ("llama", {"target_modules": "all-linear"}, {"target_modules": "all-linear"}, ()),
    "targets-unsaid": ("llama", {"target_modules": ["q_proj", "o_proj"]}, {"target_modules": None}, ()),
    "default": ("llama", {"target_modules": [*QV, "embed_tokens"]}, {}, DEFAULT),
    "dora-named": ("llama", {"target_modules": QV, "use_dora": True}, {}, MINE),
    "saved-named": (
        "llama",
        {"target_modules": QV, "modules_to_save": ["lm_head"]},
        {},
        (*MINE, ("lm_head.weight", "lm_head.modules_to_save.mine.weight")),
    ),
    "compiled": ("llama", {"target_modules": QV}, {}, [("base_model.model.", "base_model.model._orig_mod.")]),
    "ddp": ("llama", {"target_modules": QV}, {}, [("base_model.model.", "module.base_model.model.")]),
    "saved-without-weights": ("llama", {"target_modules": QV, "modules_to_save": ["act_fn", "model.norm"]}, {}, ()),
    "head": ("bert", SEQ_CLS, {}, ()),
    "head-of-old": ("bert", SEQ_CLS, {"modules_to_save": None}, ()),
    "head-of-old-wrapped": ("bert", SEQ_CLS, {"modules_to_save": None}, [("classifier.", "classifier.modules_to_save.")]),
    "head-unsaid": ("bert", SEQ_CLS, {"modules_to_save": None, "task_type": None}, ()),
    "head-token": ("bert", {**SEQ_CLS, "task_type": "TOKEN_CLS"}, {"modules_to_save": None}, ()),
    "by-weight": ("llama", {"target_modules": [], "target_parameters": ["mlp.gate_proj.weight"]}, {}, ()),
    "by-weight-too": (
        "llama",
        {"target_modules": QV, "target_parameters": ["mlp.up_proj.weight"], "alpha_pattern": {"0.mlp.up_proj.weight": 3}},
        {},
        (),
    ),
    "rank-alternatives": ("llama", {"target_modules": QV, "rank_pattern": {"q_proj|k_proj": 2}}, {}, ()),
    "eva": ("llama", {"target_modules": QV}, {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, ()),
    "orthogonal": ("llama", {"target_modules": QV, "init_lora_weights": "orthogonal"}, {}, ()),
    "mica": ("llama", {"target_modules": QV, "init_lora_weights": "mica"}, {}, ()),
}
FALSE_ALARM = pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")


@pytest.mark.parametrize(("name", "peft", "fields", "names"), TRAINED.values(), ids=TRAINED.keys())
@FALSE_ALARM
def test_it_computes_what_was_trained(name, peft, fields, names, tmp_path):
    other = make(name, peft, tmp_path)
    change_json(tmp_path, **fields)
    rename(tmp_path, *names)
    ours = load_adapter(base(name), tmp_path).eval()
    close(logits(ours, name), logits(other, name))
    assert (logits(ours, name) - logits(base(name), name)).abs().max() > 1e-3
    in_full, in_full_there = ({key for key in trained(model) if "lora_" not in key} for model in (ours, other))
    assert in_full == in_full_there
    save_adapter(ours, tmp_path / "again")
    close(logits(read_by_peft(base(name), tmp_path / "again"), name), logits(other, name))


REFUSED = {
    "experts": (
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        (),
        "'mlp.experts.gate_up_proj' names no layer's weight and no experts' of this model",
    ),
    "norm-by-weight": (
        {"target_parameters": ["input_layernorm.weight"]},
        (),
        "'model.layers.0.input_layernorm.weight' is no linear layer's weight and no embedding's",
    ),
    "tokens": ({"trainable_token_indices": [1]}, (), r"trainable_token_indices=\[1\], and the tensors beside it have no rows for them"),
    "no-layers": ({"target_modules": ["c_attn"]}, (), r"target_modules=\['c_attn'\] names no module of this model"),
    "two-adapters": ({}, [("0.self_attn.q_proj.lora_A", "1.self_attn.q_proj.lora_A.b")], r"holds several adapters \(b\); save one of them"),
    "no-prefix": ({}, [("base_model.model.", "")], "does not start with 'base_model.model.'; this is no PEFT adapter"),
}


@pytest.mark.parametrize(("fields", "names", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_the_reason_is_true_and_in_one_line(fields, names, message, tmp_path):
    make("llama", {"target_modules": QV}, tmp_path)
    change_json(tmp_path, **fields)
    rename(tmp_path, *names)
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(base("llama"), tmp_path)
    assert len(str(error.value).splitlines()) == 1


# A vocabulary that was resized before training: the new rows are random, so the file brings the embeddings.


def resized(rows=70, seed=2):
    model = base("llama")
    torch.manual_seed(seed)
    model.resize_token_embeddings(rows)
    return model


@pytest.fixture
def vocabulary(tmp_path):
    other = get_peft_model(resized(seed=1), LoraConfig(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"])).eval()
    randomise(other)
    other.save_pretrained(tmp_path)
    return other, tmp_path


NEW = torch.tensor([[3, 66, 69, 5]])


def test_a_resized_vocabulary_comes_with_the_file(vocabulary, tmp_path):
    other, folder = vocabulary
    expected = other(input_ids=NEW).logits
    ours = load_adapter(resized(), folder)
    close(ours(input_ids=NEW).logits, expected)
    assert not ours.model.embed_tokens.weight.requires_grad
    again = save_adapter(ours, tmp_path / "again")  # and goes on with it
    close(load_adapter(resized(seed=5), again)(input_ids=NEW).logits, expected)
    close(PeftModel.from_pretrained(resized(seed=5), again).eval()(input_ids=NEW).logits, expected)
    fresh = apply_lora(resized(), LoRAConfig(rank=2))
    assert "embed_tokens" not in "".join(load_file(save_adapter(fresh, tmp_path / "fresh") / "adapter_model.safetensors"))


def test_a_model_that_is_not_resized_yet(vocabulary):
    model = base("llama")
    with pytest.raises(ValueError, match=r"lm_head.weight' has shape \(70, 32\), .* \(64, 32\): call resize_token_embeddings\(70\) first"):
        load_adapter(model, vocabulary[1])
    assert model.lm_head.weight.shape[0] == 64


def test_embeddings_of_another_base_are_no_resized_vocabulary(vocabulary):
    other, folder = vocabulary
    torch.manual_seed(9)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=70, **SIZES)).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"lm_head.weight' differs from this model's in 100% of its rows, so the base is another"):
        load_adapter(model, folder)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    load_adapter(model, folder, check_base=False)
    assert torch.equal(model.lm_head.weight, other.base_model.model.lm_head.weight)


@pytest.mark.parametrize("trained", [False, True], ids=["dead", "not-zero"])
def test_an_adapter_that_can_never_act(trained, tmp_path):
    """PEFT puts one on a layer that is not called. Training leaves it at zero, and so it is left out; else the reason is told."""
    torch.manual_seed(0)
    model, x = Attends().eval(), torch.randn(2, 3, 8)
    other = theirs(copy.deepcopy(model), target_modules=["out_proj", "fc"], r=2)
    randomise(other)
    if not trained:
        nn.init.zeros_(other.base_model.model.attention.out_proj.lora_B.default.weight)
    other.save_pretrained(tmp_path)
    if trained:
        with pytest.raises(ValueError, match=r"attention\.out_proj'.*reads its weight without calling it"):
            load_adapter(model, tmp_path)
    else:
        close(load_adapter(model, tmp_path)(x), other(x))
        assert [name for name, _ in lora_layers(model)] == ["fc"]


class Distil(nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.ModuleDict({"q": nn.Linear(4, 4)}), nn.ModuleDict({"q": nn.Linear(4, 4)})
        self.teacher.requires_grad_(False)

    def forward(self, x):
        return self.student["q"](x) + self.teacher["q"](x)


def test_a_file_for_a_part_that_is_frozen_as_a_whole_too(tmp_path):
    """Patterns that hit both are refused when LoRA is applied; a file that has both layers leaves no doubt."""
    torch.manual_seed(0)
    model = Distil()
    other = theirs(copy.deepcopy(model), target_modules=["q"], r=2)
    randomise(other)
    other.save_pretrained(tmp_path)
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="is frozen as a whole"):
        apply_lora(copy.deepcopy(model), LoRAConfig(rank=2, target_modules=["q"]))
    close(load_adapter(model, tmp_path)(x), other(x))
