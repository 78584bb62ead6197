"""What a model cannot look up: positions beyond its own, tokens that only the tokenizer knows."""

import pytest
import torch
import transformers as T

from lightning_lora.data import ClassificationDataModule, InstructionDataModule
from lightning_lora.data.batching import Example
from lightning_lora.data.limits import check_limits, check_token, learned_positions
from lightning_lora.data.store import Examples
from lightning_lora.tasks import CausalLMTask, SequenceClassificationTask
from tests import tiny_lm
from tests.tasks import tiny
from tests.tasks.tiny import trainer

SIZES = {"vocab_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
GPT2 = T.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)
MODELS = {
    "bert": (lambda: T.BertModel(T.BertConfig(**SIZES, max_position_embeddings=16)), 16),
    "roberta": (lambda: T.RobertaModel(T.RobertaConfig(**SIZES, max_position_embeddings=18)), 16),  # of which two are padding's
    "gpt2": (lambda: T.GPT2LMHeadModel(GPT2), 16),
    "opt": (lambda: T.OPTForCausalLM(T.OPTConfig(vocab_size=20, hidden_size=8, ffn_dim=8, word_embed_proj_dim=8, num_hidden_layers=1,
                                                  num_attention_heads=2, max_position_embeddings=16)), 16),
    "llama": (tiny_lm.llama, None),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_longest_row_is_the_longest_that_the_model_reads(name):
    make, places = MODELS[name]
    model = make().eval()
    assert learned_positions(model) == places
    if places is not None:
        model(input_ids=torch.full((1, places), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, places + 1), 5))


def test_what_is_no_model_of_transformers_is_passed_over():
    examples = Examples.pack(Example, [Example([1] * 99, [1] * 99)])
    resnet = T.ResNetModel(T.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1]))  # its get_input_embeddings raises
    for model in (None, torch.nn.Linear(1, 1), T.ViTModel(T.ViTConfig(num_hidden_layers=0, image_size=32)), resnet):
        check_limits(model, None, examples, "data.train")


def test_long_rows_are_refused_before_the_first_step(tmp_path):
    folder = tiny.save(tmp_path / "bert", "bert")
    file = tiny_lm.write(tmp_path / "rows.jsonl", [{"text": "sky " * 70, "label": "a"}, {"text": "red", "label": "b"}])
    for split in ("train", "test"):
        run = trainer(max_epochs=1)
        data = ClassificationDataModule(**{split: file})
        with pytest.raises(ValueError, match=rf"data.{split}: the longest row has \d+ tokens, .* end at 64; set data.max_length: 64"):
            (run.fit if split == "train" else run.test)(SequenceClassificationTask(folder), data)
    with pytest.warns(UserWarning, match="1 of 2 rows are cut to max_length=64"):
        trainer().test(SequenceClassificationTask(folder), ClassificationDataModule(test=file, max_length=64), verbose=False)


def test_tokens_beyond_the_embeddings_are_named(tmp_path):
    tokenizer = tiny_lm.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    tiny_lm.llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tiny_lm.write(tmp_path / "rows.jsonl", [{"prompt": "sky <new>", "response": "blue"}])
    with pytest.raises(
        ValueError, match=r"data.val: the token '<new>' has the id 21, and the model only 21 embeddings; use the model's own"
    ):
        trainer().validate(CausalLMTask(str(tmp_path)), InstructionDataModule(val=file), verbose=False)
    with pytest.raises(ValueError, match="the prompt: the token '<new>'"):
        check_token(tiny_lm.llama(), tokenizer, 21, "the prompt")
