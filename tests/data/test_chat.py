import pytest

from lightning_lora.data.chat import Chat, encode_prompt
from lightning_lora.data.records import Conversation
from tests import tiny_lm

CHAT = [{"role": "user", "content": "which colour is the sky"}, {"role": "assistant", "content": "blue"}]


def answers(tokenizer, messages=CHAT, train_on="assistant"):
    return [tokenizer.decode(example.answer) for example in Chat(tokenizer).examples(Conversation(messages), train_on)]


def test_what_a_template_writes_after_the_end_is_not_taught():
    tokenizer = tiny_lm.tokenizer()
    tokenizer.chat_template += "{% if not add_generation_prompt %}name name{% endif %}"
    assert answers(tokenizer) == ["blue </s>"]


def test_a_template_that_turns_the_order_around_is_refused():
    tokenizer = tiny_lm.tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] }} </s>{% if add_generation_prompt %} <s>{% endif %}"
    with pytest.raises(ValueError, match="does not put the assistant's answer after its generation prompt"):
        answers(tokenizer)


def test_the_prompt_is_what_generation_reads():
    tokenizer = tiny_lm.tokenizer()
    (example,) = Chat(tokenizer).examples(Conversation(CHAT))
    assert example.ids == tokenizer.apply_chat_template(CHAT, tokenize=True)["input_ids"]
    assert example.prompt == encode_prompt(tokenizer, CHAT[:1])


def test_every_answer_is_taught_or_the_last_or_every_token():
    tokenizer, messages = tiny_lm.tokenizer(), [{"role": "system", "content": "name a colour"}, *CHAT, *CHAT]
    assert answers(tokenizer, messages) == ["blue </s> blue </s>"]
    assert answers(tokenizer, messages, "last") == ["blue </s>"]
    (example,) = Chat(tokenizer).examples(Conversation(messages), "all")
    assert example.labels == example.ids
    assert answers(tokenizer, [*CHAT[:1], {**CHAT[1], "weight": 0}, *CHAT]) == ["blue </s>"]
