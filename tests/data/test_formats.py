import pytest

from lightning_lora.data.formats import FORMATS, check_format, to_record, unread
from lightning_lora.data.records import Conversation, Labelled, Pair, PlainText

USER, ANSWER = {"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}
WRONG = {"role": "assistant", "content": "red"}
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = Conversation([USER, ANSWER])
FUNCTION = {"name": "look", "arguments": {"up": True}}
CALL = {"type": "function", "function": FUNCTION}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
CALLED = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "blue"}, ANSWER]


def shared(value):
    return {"from": "human", "value": "sky?"}, {"from": "gpt", "value": value}


ROWS = {
    "messages": ({"messages": [USER, ANSWER]}, TALK),
    "messages with a system message": ({"messages": [SYSTEM, USER, ANSWER]}, Conversation([SYSTEM, USER, ANSWER])),
    "messages of a table, with empty columns": ({"messages": [{**USER, "name": None}, ANSWER], "tools": None, "text": None}, TALK),
    "messages as JSON text": ({"messages": '[{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}]'}, TALK),
    "content in parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "sky?"}]}, ANSWER]}, TALK),
    "tools": ({"messages": CALLED, "tools": TOOLS}, Conversation(CALLED, TOOLS)),
    "tools as OpenAI has them": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": {"name": "look", "arguments": '{"up": true}'}}]},
                *CALLED[2:],
            ],
            "tools": '[{"type": "function", "function": {"name": "look", "parameters": {}}}]',
        },
        Conversation(CALLED, TOOLS),
    ),
    "no tools were called": ({"messages": [USER, {**ANSWER, "tool_calls": []}], "tools": []}, TALK),
    "ShareGPT": ({"conversations": [*shared("blue")]}, TALK),
    "ShareGPT with a system prompt": ({"conversations": [*shared("blue")], "system": "Be brief."}, Conversation([SYSTEM, USER, ANSWER])),
    "ShareGPT with a system turn": (
        {"conversations": [{"from": "system", "value": "Be brief."}, *shared("blue")]},
        Conversation([SYSTEM, USER, ANSWER]),
    ),
    "ShareGPT with tools": (
        {
            "conversations": [
                shared("")[0],
                {"from": "function_call", "value": '{"name": "look", "arguments": {"up": true}}'},
                {"from": "observation", "value": "blue"},
                shared("blue")[1],
            ],
            "tools": '[{"type": "function", "function": {"name": "look", "parameters": {}}}]',
        },
        Conversation(CALLED, TOOLS),
    ),
    "ShareGPT's key with the keys of messages": ({"conversations": [USER, ANSWER]}, TALK),
    "ShareGPT's other names": ({"conversations": [{"from": "Human", "value": "sky?"}, {"from": "ChatGPT", "value": "blue"}]}, TALK),
    "ShareGPT with an answer that is not learnt": (
        {"conversations": [shared("")[0], {**shared("red")[1], "weight": 0}, *shared("blue")]},
        Conversation([USER, {**WRONG, "weight": 0}, USER, ANSWER]),
    ),
    "axolotl's flag of a message": (
        {"messages": [USER, {**WRONG, "train": False}, USER, {**ANSWER, "train": True}]},
        Conversation([USER, {**WRONG, "weight": 0}, USER, ANSWER]),
    ),
    "a call without arguments": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "look", "arguments": ""}]}, ANSWER]},
        Conversation(
            [USER, {"role": "assistant", "content": "", "tool_calls": [{**CALL, "function": {"name": "look", "arguments": {}}}]}, ANSWER]
        ),
    ),
    "Alpaca": ({"instruction": "sky?", "input": "", "output": "blue"}, TALK),
    "Alpaca without input": ({"instruction": "sky?", "output": "blue"}, TALK),
    "Alpaca with input": (
        {"instruction": "Which colour?", "input": "sky?", "output": "blue"},
        Conversation([{"role": "user", "content": "Which colour?\nsky?"}, ANSWER]),
    ),
    "Alpaca with history": (
        {"instruction": "sky?", "output": "blue", "system": "Be brief.", "history": [["sky?", "red"]]},
        Conversation([SYSTEM, USER, WRONG, USER, ANSWER]),
    ),
    "prompt and response": ({"prompt": "sky?", "response": "blue"}, TALK),
    "prompt and response with choices": ({"prompt": "sky?", "response": "blue", "choices": ["red", "blue"]}, None),
    "prompt and completion": ({"prompt": "sky?", "completion": "blue"}, TALK),
    "prompt and completion as messages": ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, Conversation([SYSTEM, USER, ANSWER])),
    "OpenOrca's system message": (
        {"prompt": "sky?", "response": "blue", "system_prompt": "Be brief."},
        Conversation([SYSTEM, USER, ANSWER]),
    ),
    "prompt with a talk before": (  # of which nothing is learnt, as in TRL
        {"prompt": [USER, WRONG, USER], "completion": [ANSWER], "system": "Be brief."},
        Conversation([SYSTEM, USER, WRONG, USER, ANSWER], given=3),
    ),
    "prompt as JSON text": ({"prompt": '[{"role": "user", "content": "sky?"}]', "response": "blue"}, TALK),
    "text": ({"text": "The sky is blue."}, PlainText("The sky is blue.")),
    "text and label": ({"text": "The sky", "label": "blue"}, Labelled("The sky", "blue")),
    "text and a number": ({"text": "The sky", "label": 0}, Labelled("The sky", 0)),
    "pair": ({"prompt": "sky?", "chosen": "blue", "rejected": "red"}, Pair([USER], [ANSWER], [WRONG])),
    "pair of messages": ({"prompt": [USER], "chosen": [ANSWER], "rejected": [WRONG]}, Pair([USER], [ANSWER], [WRONG])),
    "pair that repeats the prompt": (
        {"prompt": "sky?", "chosen": [USER, ANSWER], "rejected": [USER, WRONG]},
        Pair([USER], [ANSWER], [WRONG]),
    ),
    "pair that repeats the prompt with a system message": (
        {"prompt": "sky? ", "chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, WRONG]},
        Pair([SYSTEM, USER], [ANSWER], [WRONG]),
    ),
    "pair of later answers": (
        {"prompt": "sky?", "chosen": [USER, WRONG, USER, ANSWER], "rejected": [USER, WRONG, USER, WRONG]},
        Pair([USER, WRONG, USER], [ANSWER], [WRONG]),
    ),
    "pair with a system column": (
        {"prompt": "sky?", "chosen": "blue", "rejected": "red", "system": "Be brief."},
        Pair([SYSTEM, USER], [ANSWER], [WRONG]),
    ),
    "pair as JSON text": (
        {"prompt": "sky?", "chosen": '[{"role": "assistant", "content": "blue"}]', "rejected": "red"},
        Pair([USER], [ANSWER], [WRONG]),
    ),
    "pair of messages without a prompt": ({"chosen": [USER, ANSWER], "rejected": [USER, WRONG]}, Pair([USER], [ANSWER], [WRONG])),
    "pair of texts without a prompt": (
        {"chosen": "Human: sky? Assistant: blue", "rejected": "Human: sky? Assistant: black"},
        Pair("Human: sky? Assistant: ", "blue", "black"),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_format(name):
    row, record = ROWS[name]
    assert to_record(row) == (record or Conversation([USER, ANSWER], choices=["red", "blue"]))


PROMPTS = {
    "messages": {"messages": [USER]},
    "messages with the answer": {"messages": [USER, ANSWER]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "sky?"}]},
    "Alpaca": {"instruction": "sky?"},
    "prompt": {"prompt": "sky?"},
    "prompt with the answer": {"prompt": "sky?", "completion": "blue"},
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_needs_no_answer(name):
    assert to_record(PROMPTS[name], needs_answer=False) == Conversation([USER])


def test_labels_are_not_needed_in_prediction():
    assert to_record({"text": "sky"}, "labelled", needs_answer=False) == Labelled("sky")


def test_columns_are_renamed_in_either_direction():
    row = {"question": "sky?", "reply": "blue", "id": 3}
    for columns in ({"question": "prompt", "reply": "response"}, {"prompt": "question", "response": "reply"}):
        assert to_record(row, columns=columns) == TALK
    with pytest.raises(ValueError, match=r"data.columns has answer: response, and the row has neither of them among its keys \['id'"):
        to_record(row, columns={"answer": "response"})
    with pytest.raises(ValueError, match=r"data.columns has question: id, and the row has both of them"):
        to_record(row, columns={"question": "id"})


def test_a_format_can_be_named():
    row = {"prompt": "sky?", "response": "blue", "text": "The sky"}
    assert to_record(row) == TALK and to_record(row, "text") == PlainText("The sky")
    with pytest.raises(ValueError, match=r"no 'instruction' and no 'output' among the keys .*, for the format 'alpaca': {\"instruction\""):
        to_record(row, "alpaca")
    check_format("auto")
    with pytest.raises(ValueError, match=r"data.format='alpaka' is not known; the formats are auto, preference, messages"):
        check_format("alpaka")


BAD = [
    ([1], "expected a JSON object, got list"),
    ({}, r"the keys \[\] are of no known format"),
    ({"question": "a"}, r"of no known format \(preference: chosen, rejected; .*\); rename them with data.columns"),
    ({"messages": "[{]"}, r"'messages' are not JSON"),
    ({"messages": {"role": "user"}}, "'messages' must be a list of objects with 'role' and 'content'"),
    ({"messages": [{"role": "usr", "content": "sky?"}, ANSWER]}, "the role 'usr' is none of .*; did you mean 'user'"),
    ({"messages": [USER, {"role": "Assistant", "content": "blue"}]}, "the role 'Assistant' is none of .*; did you mean 'assistant'"),
    ({"messages": [USER, {"role": "gpt", "content": "blue"}, USER, ANSWER]}, "the role 'gpt' is none of .*; did you mean 'assistant'"),
    ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "'weight' of a message must be 0 or 1 .*, got 0.5"),
    ({"messages": [USER, {**ANSWER, "train": "no"}]}, "'train' of a message must be 0 or 1 .*, got 'no'"),
    ({"messages": [USER, {"role": "assistant", "content": ""}, USER, ANSWER]}, "the answer is ''; it must be a text that is not empty"),
    ({"messages": [USER, {**ANSWER, "function_call": {"name": "a"}}]}, "'function_call' is the older form of a call"),
    ({"messages": [USER, ANSWER], "functions": [{"name": "a"}]}, "'functions' is the older form of 'tools'"),
    ({"messages": [USER, ANSWER], "images": ["sky.png"]}, "the row has 'images', and only texts are read"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}, ANSWER]}, "the 'text' in .* must be text, got None"),
    ({"messages": [SYSTEM, USER, ANSWER], "system": "Be long."}, "the row has 'system', and its messages begin with another system"),
    ({"messages": '[{"role": "user", "content": "\\ud83d"}]'}, r"it has half a character \(\\ud83d\)"),
    ({"messages": [USER]}, "the last message must be the assistant's answer, not of 'user'"),
    ({"messages": [ANSWER]}, "the prompt is empty"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
        "'user' must be text, got parts other than text",
    ),
    ({"messages": [USER, {"role": "assistant"}]}, "the message of 'assistant' has no 'content' and no 'tool_calls'"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"x": 1}]}]}, "a tool call must be like"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "a", "arguments": "{"}]}]}, "a tool call's arguments are not JSON"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": 3}]}, "'tool_calls' must be a list"),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "a", "arguments": "3"}]}]},
        "must be an object, .*, got 3",
    ),
    ({"messages": [USER, ANSWER], "tools": "look"}, "'tools' are not JSON"),
    ({"messages": [USER, ANSWER], "tools": ["look"]}, "'tools' must be a list of objects"),
    ({"conversations": [{"from": "human"}]}, "'conversations' must be a list of objects with 'from' and 'value'"),
    ({"conversations": [*shared("a"), {"from": "function_call", "value": "look"}]}, "a function_call's value are not JSON"),
    ({"conversations": [{"from": "Emma", "value": "sky?"}, shared("blue")[1]]}, "the speaker 'Emma' is none of human, gpt"),
    ({"instruction": "a", "output": 3}, "the answer must be text, got 3; write it as a JSON text"),
    ({"instruction": "a", "output": "b", "history": ["c"]}, "'history' must be a list of pairs of texts"),
    ({"prompt": "a", "response": " \n"}, r"the answer is ' \\n'; it must be a text that is not empty"),
    ({"prompt": " ", "response": "a"}, "the prompt is empty"),
    ({"prompt": "a", "response": "b", "choices": ["c"]}, "'choices' must be a list of texts that holds the answer 'b'"),
    ({"prompt": "a", "response": "b", "choices": ["b", "b"]}, "'choices' holds only the answer 'b', so every model would be right"),
    ({"prompt": "a", "response": None}, r"no 'response' among the keys \['prompt'\] \(null: response\), for the format"),
    ({"prompt": None, "response": "a"}, r"the keys \['response'\] \(null: prompt\) are of no known format"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "only texts are read, so leave the other parts out"),
    ({"prompt": [USER, ANSWER], "completion": "a"}, "the prompt ends with the assistant's message"),
    ({"prompt": "[{'role': 'user', 'content': 'a'}]", "response": "b"}, "'the prompt' are not JSON"),
    ({"text": "a", "response": "b"}, "the row has 'text' and 'response': name the prompt with data.columns"),
    ({"text": 3}, "'text' must be text, got 3"),
    ({"text": "a", "label": ["b"]}, r"'label' must be a text or a number, got \['b'\]"),
    ({"chosen": "a", "rejected": "b"}, "have no prompt: add 'prompt'"),
    (
        {"prompt": [USER], "chosen": [SYSTEM, USER, ANSWER], "rejected": "b"},
        "'chosen' must have the assistant's messages",
    ),
    ({"prompt": "a", "chosen": [ANSWER, USER], "rejected": "b"}, "'chosen' must .* ends with one of 'user'"),
    ({"chosen": "ab", "rejected": "ac", "system": "Be brief."}, "a system message needs a prompt"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "image": "sky.png"}, "the row has 'image', and only texts are read"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "must both have an answer, and not the same one"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_refused_in_one_line(row, message):
    with pytest.raises(ValueError, match=message) as error:
        to_record(row)
    assert "\n" not in str(error.value)


def test_keys_that_nothing_reads_are_known():
    row = {"instruction": "sky?", "context": "It is noon.", "reply": "blue", "input": None, "id": 3}
    assert unread(row, columns={"reply": "output"}) == ["context", "id"]
    assert unread({"text": "sky", "label": 1}, "text") == ["label"] and unread(ROWS["tools"][0]) == []


def test_every_example_is_a_row_of_its_format():
    """Error messages show them."""
    assert all(
        format.example.startswith("{") and set(format.keys + format.answers) <= set(format.example.split('"'))
        for format in FORMATS.values()
    )
