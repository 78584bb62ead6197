from types import SimpleNamespace

import pytest

from lightning_lora.data.chat import Chat, encode_prompt, stop_tokens
from lightning_lora.data.records import Conversation
from tests import tiny_lm
from tests.data import families

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


def test_generation_stops_at_the_end_of_a_turn_too():
    """As of base models whose texts end with another token than their chat template's turns."""
    tokenizer, model = families.tokenizer("qwen3"), SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    end, turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert tokenizer.eos_token_id == end and stop_tokens(model, tokenizer) == sorted([end, turn])
    model.generation_config.eos_token_id = [7, end]
    assert stop_tokens(model, tokenizer) == sorted([7, end, turn])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"  # ends no turn
    assert stop_tokens(model, tokenizer) == [7, end]
    tokenizer.chat_template = tokenizer.eos_token = model.generation_config.eos_token_id = None
    assert stop_tokens(model, tokenizer) == []


def test_an_answer_that_nothing_ends_is_refused():
    tokenizer = tiny_lm.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    with pytest.raises(ValueError, match="ends an answer with no token of its own"):
        answers(tokenizer)


def test_an_end_that_the_tokenizer_does_not_call_special():
    """One token after the answer is its end, if nothing else follows."""
    tokenizer = tiny_lm.tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "name")
    assert answers(tokenizer) == ["blue name"]


def test_an_answer_that_holds_the_end_token_is_learnt_to_its_last():
    assert answers(tiny_lm.tokenizer(), [CHAT[0], {"role": "assistant", "content": "red </s> blue"}]) == ["red </s> blue </s>"]


def test_messages_that_are_all_left_out_are_refused():
    with pytest.raises(ValueError, match="every answer has weight 0"):
        answers(tiny_lm.tokenizer(), [CHAT[0], {**CHAT[1], "weight": 0}])


SYSTEM = {"role": "system", "content": "hi"}


@pytest.mark.parametrize(
    ("family", "role"),
    [("qwen2_5", "developer"), ("qwen3", "developer"), ("phi3", "tool"), ("gptoss", "system"), ("deepseek_r1_distill", "developer")],
)
def test_a_message_that_the_template_leaves_out_is_refused(family, role):
    """Its text is part of other words, so that finding it says nothing."""
    messages = [*CHAT, {"role": role, "content": "hi"}, *CHAT]
    chat = Chat(families.tokenizer(family))
    for refused in (lambda: chat.examples(Conversation(messages)), lambda: chat.prompt(messages[:-1])):
        with pytest.raises(ValueError, match=f"template leaves out or changes the message of '{role}' .'hi'"):
            refused()


def test_a_system_message_may_stand_in_another_answers_prompt():
    """Mistral's template writes it into the last question, and behind the result of a tool there is none."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", "function": {"name": "look", "arguments": {}}}]}
    result = {"role": "tool", "content": "blue", "tool_call_id": "abcdefghi"}
    assert len(answers(families.tokenizer("mistral_v0_3"), [SYSTEM, CHAT[0], call, result, CHAT[1]])) == 2


def test_reasoning_that_the_template_leaves_out_is_refused():
    told = [CHAT[0], {**CHAT[1], "reasoning_content": "It is noon."}]
    assert answers(families.tokenizer("qwen3"), told) == ["<think>\nIt is noon.\n</think>\n\nblue<|im_end|>"]
    with pytest.raises(ValueError, match="does not write the answer's 'reasoning_content'"):
        answers(families.tokenizer("qwen2_5"), told)


def test_answers_that_are_given_are_not_learnt():
    tokenizer = tiny_lm.tokenizer()
    (example,) = Chat(tokenizer).examples(Conversation([*CHAT, CHAT[0], {**CHAT[1], "content": "red"}], given=3))
    assert tokenizer.decode(example.answer) == "red </s>"
    left_out = {**CHAT[1], "weight": 0}
    with pytest.raises(ValueError, match="every answer has weight 0"):
        answers(tokenizer, [*CHAT, CHAT[0], left_out], "last")
    with pytest.raises(ValueError, match=r"data.train_on=all learns every token, and a message has weight 0"):
        answers(tokenizer, [CHAT[0], left_out, *CHAT], "all")


def test_an_answer_to_nothing_is_refused():
    tokenizer = tiny_lm.tokenizer()
    with pytest.raises(ValueError, match="the first message is the assistant's, an answer to nothing"):
        answers(tokenizer, [CHAT[1], *CHAT])
    assert answers(tokenizer, [{**CHAT[1], "weight": 0}, *CHAT]) == ["blue </s>"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("enable_thinkin", "which the tokenizer's chat template does not read; did you mean 'enable_thinking'"),
        ("continue_final_message", "which the tokenizer's chat template does not read; leave it out"),
        ("add_generation_prompt", "which comes from the rows"),
    ],
)
def test_an_option_without_effect_is_refused(name, message):
    with pytest.raises(ValueError, match=f"data.chat_template_kwargs sets '{name}', {message}"):
        Chat(families.tokenizer("qwen3"), {"enable_thinking": True, name: False})


def test_the_labels_are_those_of_the_templates_own_blocks():
    """``{% generation %}`` is transformers' way to say what is learnt."""
    tokenizer = families.tokenizer("qwen2_5")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = [SYSTEM, *CHAT, *CHAT]
    (example,) = Chat(tokenizer).examples(Conversation(messages))
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    length = len(example)  # without the line end behind the last answer
    assert example.ids == theirs["input_ids"][:length] and [label != -100 for label in example.labels] == list(
        map(bool, theirs["assistant_masks"][:length])
    )


def test_an_answer_that_two_tokens_end():
    """As Cohere's; the last one stops generation."""
    tokenizer = families.tokenizer("llama3_1")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|eot_id|>", "<|eom_id|><|eot_id|>")
    chat = Chat(tokenizer)
    (example,) = chat.examples(Conversation(CHAT))
    assert tokenizer.decode(example.answer) == "blue<|eom_id|><|eot_id|>"
    assert tokenizer.convert_ids_to_tokens(chat.ends) == ["<|eot_id|>"]
