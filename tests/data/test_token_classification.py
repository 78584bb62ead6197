"""Words and their labels on tokens, with tokenizers of three kinds."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightning_lora.data import TokenClassificationDataModule
from lightning_lora.data.token_classification import first_tokens
from lightning_lora.tasks import TokenClassificationTask
from tests import tiny_lm
from tests.tasks import tiny
from tests.tasks.tiny import trainer

WORDS = ["Emma", "reads", "in", "New", "York", "!"]
LETTERS = sorted(set("".join(WORDS)))


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's: special tokens around, and pieces within words."""
    vocab = ["[UNK]", "[CLS]", "[SEP]", "Em", "##ma", "reads", "in", "New", "Yo", "##r", "##k", "!"]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocab)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[UNK]")


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's and RoBERTa's: the space before a word is in its first token."""
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["Ġ", *LETTERS, "ĠN"])}, [("Ġ", "N")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="!")


def sentence_piece() -> PreTrainedTokenizerFast:
    """As Llama's and T5's."""
    backend = Tokenizer(models.Unigram([("▁", -1.0), *((letter, -2.0) for letter in LETTERS), ("▁Em", -1.0), ("ma", -1.0)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="!")


@pytest.mark.parametrize("make", [word_piece, byte_level, sentence_piece])
def test_the_first_token_of_a_word_is_the_first_with_a_letter_of_it(make):
    tokenizer = make()
    ids, first = first_tokens(tokenizer, WORDS)
    assert ids == tokenizer(" ".join(WORDS))["input_ids"]
    pieces = [tokenizer.tokenize(" " * (i > 0) + word) for i, word in enumerate(WORDS)]
    starts = [sum(map(len, pieces[:i])) + (pieces[i][0] in "Ġ▁") for i in range(len(WORDS))]  # a space alone is no part of the word
    begins = make is word_piece  # its first token is special
    assert first == [begins + start for start in starts] and len(ids) > len(WORDS)


def test_other_tokens_and_padding_do_not_count(tmp_path):
    folder = tiny.save(tmp_path / "bert", "bert")
    word_piece().save_pretrained(folder)
    rows = [{"tokens": WORDS, "tags": ["B-PER", "O", "O", "B-LOC", "I-LOC", "O"]}, {"tokens": ["Emma"], "tags": ["B-PER"]}]
    file = tiny_lm.write(tmp_path / "rows.jsonl", rows)
    data = TokenClassificationDataModule(val=file, batch_size=2)
    task = TokenClassificationTask(folder)
    trainer().validate(task, data, verbose=False)
    batch = next(iter(data.val_dataloader()))
    per, loc, inside, o = (task.labels.index(name) for name in ("B-PER", "B-LOC", "I-LOC", "O"))
    short = [-100, per, -100, -100] + [-100] * 7
    assert batch["labels"].tolist() == [short, [-100, per, -100, o, o, loc, inside, -100, -100, o, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 4 + [0] * 7, [1] * 11]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": "Emma reads", "tags": ["O"]}, r"'tokens' must be a list of words, none of them empty, got 'Emma reads'"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, r"'tokens' must be a list of words, none of them empty"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, r"'tags' must be a list with one tag per token: 2 tokens, tags: 1"),
        ({"tokens": ["a"], "tags": [None]}, r"the label is None; it must be a text or a whole number"),
        ({"tokens": ["a"]}, r"no 'tags' among the keys"),
    ],
)
def test_a_bad_row_is_named(row, message, tmp_path):
    folder = tiny.save(tmp_path / "bert", "bert")
    file = tiny_lm.write(tmp_path / "rows.jsonl", [{"tokens": ["a", "b"], "tags": ["O", "X"]}, row])
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: {message}"):
        trainer().validate(TokenClassificationTask(folder), TokenClassificationDataModule(val=file), verbose=False)


def test_a_word_without_a_token_of_its_own_is_named():
    tokenizer = byte_level()
    with pytest.raises(ValueError, match=r"the word 'ß' has no token of its own"):
        first_tokens(tokenizer, ["New", "ß"])


def test_long_rows_are_cut_with_their_labels(tmp_path):
    folder = tiny.save(tmp_path / "bert", "bert")
    word_piece().save_pretrained(folder)
    file = tiny_lm.write(tmp_path / "rows.jsonl", [{"tokens": WORDS * 3, "tags": ["O"] * 18}, {"tokens": ["in"], "tags": ["X"]}])
    data = TokenClassificationDataModule(val=file, max_length=8)
    with pytest.warns(UserWarning, match="1 of 2 rows are cut to max_length=8"):
        trainer().validate(TokenClassificationTask(folder), data, verbose=False)
    (long,) = [example for example in data.examples["val"] if len(example) == 8]
    assert long.ids[-1] == 2 and long.labels == [-100, 0, -100, 0, 0, 0, 0, -100]
    with pytest.raises(ValueError, match=r"1 of 2 rows lose their answer to max_length=8"):
        task = TokenClassificationTask(folder, labels=["O", "X"])
        trainer().predict(task, TokenClassificationDataModule(predict=file, max_length=8))
