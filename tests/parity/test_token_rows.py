"""PEFT's ``trainable_token_indices``: read with PEFT's outputs in float64, for tied and untied heads, and written again."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import load_adapter, save_adapter

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


@pytest.mark.parametrize("tying", [False, True])
@pytest.mark.parametrize(
    ("tied", "indices"),
    [
        (True, [3, 5]),
        (True, {"embed_tokens": [5, 3], "lm_head": [5, 3]}),
        (False, [3, 5]),
        (False, {"embed_tokens": [3], "lm_head": [7, 5]}),
    ],
)
def test_outputs_are_pefts(tied, indices, tying, tmp_path):
    plain = llama(tied)
    other = trained_rows(copy.deepcopy(plain), tmp_path / "theirs", indices, ensure_weight_tying=tying)
    expected = other(IDS).logits
    model = load_adapter(copy.deepcopy(plain), tmp_path / "theirs")
    close(model(IDS).logits, expected, 1e-6)  # PEFT's own parameters, q_proj's, are float32 in the file
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    rows = (model.model.embed_tokens.weight != plain.model.embed_tokens.weight).any(1).nonzero().flatten().tolist()
    assert rows == sorted(indices if isinstance(indices, list) else indices["embed_tokens"])
    assert not model.model.embed_tokens.weight.requires_grad
    save_adapter(model, tmp_path / "ours")
    close(load_adapter(copy.deepcopy(plain), tmp_path / "ours")(IDS).logits, expected, 1e-6)
    close(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").double().eval()(IDS).logits, expected, 1e-6)


def test_new_rows_of_a_resized_vocabulary(tmp_path):
    """The base's new rows are random; the file has them all."""
    other = trained_rows(llama(True, 66), tmp_path, [64, 65])
    ids = torch.tensor([[1, 64, 65, 3]])
    model = llama(True, 66)
    model.model.embed_tokens.weight.data[64:] = 9.0
    close(load_adapter(model, tmp_path)(ids).logits, other(ids).logits, 1e-6)
    small = llama(True)
    with pytest.raises(
        ValueError, match=r"names row 65 of 'model.embed_tokens', which has 64 here: call resize_token_embeddings\(66\) first"
    ):
        load_adapter(small, tmp_path)


def test_two_values_for_one_tied_row_are_refused(tmp_path):
    trained_rows(llama(True), tmp_path, {"embed_tokens": [3, 5], "lm_head": [5, 7]})
    with pytest.raises(ValueError, match=r"lm_head.weight and model.embed_tokens.weight are one tied parameter in this model"):
        load_adapter(llama(True), tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ([3], r"trainable_token_indices=\[3\] does not say which 2 rows of 'model.embed_tokens' the file has"),
        ([3, 3], "does not say which 2 rows"),
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
    with pytest.raises(ValueError, match=r"ensure_weight_tying=True ties what is trained on 'model.embed_tokens' to the output head"):
        load_adapter(llama(True), tmp_path)
    other = theirs(llama(True), target_modules=["q_proj"], r=2, ensure_weight_tying=True)
    randomise(other)
    other.save_pretrained(tmp_path / "plain")
    close(load_adapter(llama(True), tmp_path / "plain")(IDS).logits, other.double().eval()(IDS).logits, 1e-6)
