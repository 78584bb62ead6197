"""PEFT's ``trainable_token_indices``: read with PEFT's outputs in float64, for tied and untied heads, and written again."""

import copy
import json
from itertools import product

import pytest
import torch
from peft import PeftModel
from transformers import BertConfig, BertForMaskedLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, apply_lora, load_adapter, save_adapter

from .models import DEPRECATED_BY_PEFT, SIZES, close, randomise, theirs

pytestmark = pytest.mark.filterwarnings(
    DEPRECATED_BY_PEFT,
    "ignore:Setting `save_embedding_layers`",
    "ignore:ensure_weight_tying=True but",
    "ignore:You have requested `ensure_weight_tying`",
)
IDS = torch.tensor([[1, 3, 5, 7, 9]])


def llama(tied, vocabulary=64):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=tied, **SIZES)).double().eval()
    if vocabulary != 64:
        model.resize_token_embeddings(vocabulary)
    return model


def trained_rows(model, folder, indices, **fields):
    other = theirs(model, target_modules=["q_proj"], r=2, trainable_token_indices=indices, **fields).double().eval()
    randomise(other)
    for name, parameter in other.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.normal_()
    other.save_pretrained(folder, save_embedding_layers=False)
    return other


CHOICES = {
    "list": [5, 3],
    "alike": {"embed_tokens": [5, 3], "lm_head": [5, 3]},
    "apart": {"embed_tokens": [3], "lm_head": [7, 5]},
    "head": {"lm_head": [7, 5]},
}


@pytest.mark.parametrize(  # PEFT refuses to tie different rows
    ("which", "tied", "tying"), [each for each in product(CHOICES, [False, True], [False, True]) if each != ("apart", True, True)]
)
def test_outputs_are_pefts_both_ways(which, tied, tying, tmp_path):
    """In float64: a file of PEFT's here, what is written of it in PEFT, and the rows trained one step further on both sides."""
    indices = copy.deepcopy(CHOICES[which])
    plain = llama(tied)
    other = trained_rows(copy.deepcopy(plain), tmp_path / "theirs", indices, ensure_weight_tying=tying)
    model = load_adapter(copy.deepcopy(plain), tmp_path / "theirs")
    close(model(IDS).logits, other(IDS).logits)
    save_adapter(model, tmp_path / "ours")
    close(load_adapter(copy.deepcopy(plain), tmp_path / "ours")(IDS).logits, model(IDS).logits)
    back = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours", is_trainable=True).double().eval()
    close(back(IDS).logits, model(IDS).logits)
    assert all(
        torch.equal(a, b) for a, b in zip(base_of(model), base_of(load_adapter(copy.deepcopy(plain), tmp_path / "ours")), strict=True)
    )
    for each in (model, back):
        each(IDS, labels=IDS).loss.backward()
        torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.5).step()
    close(model(IDS).logits, back(IDS).logits)


def base_of(model):
    return [tensor for name, tensor in model.state_dict().items() if "lora_" not in name]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_of_a_resized_vocabulary(tied, whole, tmp_path):
    """The base's new rows are random; the file has them, beside the whole weights too if PEFT was told to save these."""
    trained = llama(tied, 66)
    other = trained_rows(trained, tmp_path, [64, 65])
    if whole:
        other.save_pretrained(tmp_path, save_embedding_layers=True)
    ids = torch.tensor([[1, 64, 65, 3]])
    model = llama(tied, 66)
    model.model.embed_tokens.weight.data[64:] = 9.0
    close(load_adapter(model, tmp_path)(ids).logits, other(ids).logits)
    assert (model.model.embed_tokens.weight[64:] == 9.0).all()  # the base's own rows stay
    with pytest.raises(
        ValueError, match=r"'model.embed_tokens'.*names row 65, and it has 64 here: call resize_token_embeddings\(66\) first"
    ):
        load_adapter(llama(tied), tmp_path)


def test_most_rows_of_a_tiny_vocabulary(tmp_path):
    """They are rows that trained, and do not make the base another one."""
    rows = [*range(60)]
    other = trained_rows(llama(True), tmp_path, rows)
    other.save_pretrained(tmp_path, save_embedding_layers=True)
    close(load_adapter(llama(True), tmp_path)(IDS).logits, other(IDS).logits)


def test_a_gemma_scales_its_rows(tmp_path):
    torch.manual_seed(0)
    plain = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=64, head_dim=8, num_key_value_heads=2, **SIZES)).double().eval()
    other = trained_rows(copy.deepcopy(plain), tmp_path, [5, 3])
    close(load_adapter(copy.deepcopy(plain), tmp_path)(IDS).logits, other(IDS).logits)


def test_a_head_with_a_bias_is_right_here_and_not_in_peft(tmp_path):
    """PEFT 0.21 drops the bias of a tied head: at the start already the model computes something else."""
    torch.manual_seed(0)
    plain = BertForMaskedLM(BertConfig(vocab_size=64, **SIZES)).double().eval()
    plain.cls.predictions.decoder.bias.data.normal_()
    other = theirs(copy.deepcopy(plain), target_modules=["query"], r=2, trainable_token_indices=[3]).double().eval()
    assert (other(IDS).logits - plain(IDS).logits).abs().max() > 1
    other.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"rows of 'cls.predictions.decoder', which has a bias here. PEFT 0.21 leaves that out"):
        load_adapter(copy.deepcopy(plain), tmp_path / "theirs")
    model = apply_lora(copy.deepcopy(plain), LoRAConfig(rank=2, target_modules=["query"], trainable_token_indices=[3]))
    close(model(IDS).logits, plain(IDS).logits)
    with pytest.warns(UserWarning, match="leaves out the bias of 'cls.predictions.decoder'"):
        save_adapter(model, tmp_path / "ours")
    close(load_adapter(copy.deepcopy(plain), tmp_path / "ours")(IDS).logits, plain(IDS).logits)


def test_peft_does_not_combine_an_adapter_and_rows_either():
    with pytest.raises(TypeError, match="trainable_token_indices cannot be applied"):
        theirs(llama(False), target_modules=["embed_tokens"], r=2, trainable_token_indices=[3])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ([3], r"trainable_token_indices=\[3\] does not say which 2 rows of 'model.embed_tokens' the file has"),
        ([3, 3], "row 3 is there twice"),
        ([3, -5], "-5 is no row number"),
        ({"lm_head": [3, 5]}, "does not say which 2 rows"),
        ([], "does not say which 2 rows|is not a list"),
        (["a"], "is not a list of whole numbers"),
    ],
)
def test_indices_that_do_not_fit_the_rows(change, reason, tmp_path):
    trained_rows(llama(False), tmp_path, [3, 5])
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trainable_token_indices": change}))
    with pytest.raises(ValueError, match=reason):
        load_adapter(llama(False), tmp_path)


def test_tied_adapters_are_refused_with_the_reason(tmp_path):
    other = theirs(llama(True), target_modules=["embed_tokens", "q_proj"], r=2, ensure_weight_tying=True)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"ensure_weight_tying=True ties the adapter on 'model.embed_tokens' to 'lm_head', so that both"):
        load_adapter(llama(True), tmp_path)
    other = theirs(llama(True), target_modules=["q_proj"], r=2, ensure_weight_tying=True)
    randomise(other)
    other.save_pretrained(tmp_path / "plain")
    close(load_adapter(llama(True), tmp_path / "plain")(IDS).logits, other.double().eval()(IDS).logits, 1e-6)
