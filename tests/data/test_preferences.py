"""Pairs as TRL writes them: texts and messages, with and without a prompt. Labels are compared with texts written by hand."""

import pytest

from lightning_lora.data import PreferenceDataModule
from lightning_lora.data.preferences import PairExample
from tests import tiny_lm

ASKED = "<s> user which colour is the sky </s> <s> assistant"
USER = {"role": "user", "content": "which colour is the sky"}


def answer(text):
    return {"role": "assistant", "content": text}


def load(tmp_path, rows, split="train", chat=True, **options):
    data = PreferenceDataModule(**{split: tiny_lm.write(tmp_path / "pairs.jsonl", rows)}, **options)
    data._tokenizer = tiny_lm.tokenizer(chat)
    data.setup({"train": "fit", "predict": "predict"}[split])
    return data


def shown(ids, labels):
    """The whole text, and what is learnt of it."""
    tokenizer = tiny_lm.tokenizer()
    return tokenizer.decode(ids), tokenizer.decode([label for label in labels if label != -100])


CONVERSATIONS = {
    "texts": {"prompt": USER["content"], "chosen": "blue", "rejected": "red"},
    "messages": {"prompt": [USER], "chosen": [answer("blue")], "rejected": [answer("red")]},
    "whole conversations": {"chosen": [USER, answer("blue")], "rejected": [USER, answer("red")]},
    "prompt repeated": {"prompt": [USER], "chosen": [USER, answer("blue")], "rejected": [USER, answer("red")]},
}


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_each_answer_is_learnt_with_its_end(form, tmp_path):
    (pair,) = load(tmp_path, [CONVERSATIONS[form]]).examples["train"]
    assert shown(pair.chosen, pair.chosen_labels) == (f"{ASKED} blue </s>", "blue </s>")
    assert shown(pair.rejected, pair.rejected_labels) == (f"{ASKED} red </s>", "red </s>")


def test_answers_in_the_prompt_are_not_learnt(tmp_path):
    before = [USER, answer("green"), USER]
    (pair,) = load(tmp_path, [{"prompt": before, "chosen": [answer("blue")], "rejected": [answer("red")]}]).examples["train"]
    text, learnt = shown(pair.chosen, pair.chosen_labels)
    assert text == f"{ASKED} green </s> {ASKED} blue </s>" and learnt == "blue </s>"


def test_texts_that_begin_alike_have_their_prompt_in_common(tmp_path):
    row = {"chosen": "the sky is blue", "rejected": "the sky is red apple"}
    (pair,) = load(tmp_path, [row], chat=False).examples["train"]
    assert shown(pair.chosen, pair.chosen_labels) == ("the sky is blue </s>", "blue </s>")
    assert shown(pair.rejected, pair.rejected_labels) == ("the sky is red apple </s>", "red apple </s>")


def test_a_batch_has_the_better_answers_first(tmp_path):
    data = load(
        tmp_path, [CONVERSATIONS["messages"], {**CONVERSATIONS["messages"], "rejected": [answer("green apple")]}], pad_to_multiple_of=4
    )
    batch = data.collate(list(data.examples["train"]), "train")
    learnt = [shown([], row)[1] for row in batch["labels"].tolist()]
    assert learnt == ["blue </s>", "blue </s>", "red </s>", "green apple </s>"]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (4, 16)


@pytest.mark.parametrize("row", [CONVERSATIONS["messages"], {"messages": [USER]}, {"prompt": USER["content"]}])
def test_prediction_needs_the_prompt_only(row, tmp_path):
    data = load(tmp_path, [row], split="predict")
    batch = data.collate(list(data.examples["predict"]), "predict")
    assert batch["prompts"] == [USER["content"]] and shown(batch["input_ids"][0].tolist(), [])[0] == ASKED


def test_long_pairs_are_cut_and_counted(tmp_path):
    long = {**CONVERSATIONS["messages"], "chosen": [answer("blue " * 30 + "sky")]}
    with pytest.warns(UserWarning, match="1 of 2 rows are cut to max_length=16"):
        data = load(tmp_path, [CONVERSATIONS["messages"], long], max_length=16)
    assert max(map(len, data.examples["train"])) == 16
    with pytest.raises(ValueError, match="2 of 2 rows lose their answer to max_length=4"):
        load(tmp_path, [CONVERSATIONS["messages"], long], max_length=4)


def test_pairs_whose_difference_is_cut_are_lost(tmp_path):
    alike = {**CONVERSATIONS["messages"], **{name: [answer("blue " * 30 + end)] for name, end in (("chosen", "sky"), ("rejected", "red"))}}
    with pytest.raises(ValueError, match=r"1 of 2 rows lose their answer to max_length=16: .*pairs.jsonl:2"):
        load(tmp_path, [CONVERSATIONS["messages"], alike], max_length=16)
    with pytest.warns(UserWarning, match="1 of 2 rows are dropped"):
        assert len(load(tmp_path, [CONVERSATIONS["messages"], alike], max_length=16, long_rows="drop").examples["train"]) == 1


ALIKE = {
    "one answer": {"prompt": "a", "chosen": "blue", "rejected": "blue"},
    "one conversation": {"chosen": [USER, answer("blue")], "rejected": [USER, answer("blue")]},
    "an empty message": {"prompt": "a", "chosen": "blue", "rejected": [answer(" ")]},
    "the template strips": {"prompt": "a", "chosen": "blue", "rejected": " blue "},
}


@pytest.mark.parametrize("pair", ALIKE)
def test_pairs_that_prefer_nothing_are_left_out_and_said(pair, tmp_path):
    with pytest.warns(UserWarning, match=r"1 of 2 rows are left out .* first .*pairs.jsonl:2: 'chosen' and 'rejected' (must|are the same)"):
        assert len(load(tmp_path, [CONVERSATIONS["messages"], ALIKE[pair]]).examples["train"]) == 1


def test_predictions_lack_no_row(tmp_path):
    with pytest.raises(ValueError, match=r"pairs.jsonl:2: 'chosen' and 'rejected' must both"):
        load(tmp_path, [CONVERSATIONS["messages"], ALIKE["one conversation"]], "predict")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "blue", "rejected": None}, r"\(null: rejected\)"),
        ({"chosen": "blue", "rejected": "red"}, "have no prompt: add 'prompt'"),
        ({"prompt": "a", "response": "b"}, "the row has no 'chosen' and 'rejected'"),
        ({"text": "a"}, "PreferenceDataModule takes a pair of chosen and rejected"),
    ],
)
def test_a_bad_row_is_named(row, message, tmp_path):
    with pytest.raises(ValueError, match=rf"pairs.jsonl:2: .*{message}"):
        load(tmp_path, [CONVERSATIONS["messages"], row])


def test_a_pair_is_as_long_as_its_longer_answer():
    assert len(PairExample([1, 2], [1, 2], [1, 2, 3], [1, 2, 3])) == 3
