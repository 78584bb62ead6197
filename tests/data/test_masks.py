"""Tokens and labels of published chat templates, against texts written by hand. What is learnt stands between ‹ and ›."""

from __future__ import annotations

import json
import re
from datetime import date

import pytest
from tokenizers import pre_tokenizers

from lightning_lora.data.chat import Chat, TrainOn
from lightning_lora.data.records import Conversation
from tests.data import families

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Seven."},
]
ID = "abcdefghi"
CALL = {"id": ID, "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tell it.", "parameters": {"type": "object", "properties": {}}}}
CALLED = [
    {"role": "user", "content": "Weather in Rome?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": ID, "name": "weather", "content": "Sunny"},
    {"role": "assistant", "content": "It is sunny."},
]
CHATML = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n"
MORE = "\n<|im_start|>user\nAnd three?<|im_end|>\n<|im_start|>assistant\n"
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n".format
DATE = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
TODAY = date.today().isoformat()
HARMONY = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    f"Current date: {TODAY}\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)
BRIEF = (
    "<|end|><|start|>developer<|message|># Instructions\n\nBe brief.\n\n"
    "<|end|><|start|>user<|message|>Two and two?<|end|><|start|>assistant"
)

TALKS = {
    "smollm2": [f"{CHATML}‹Four.<|im_end|>›{MORE}‹Seven.<|im_end|>›"],
    "qwen2_5": [f"{CHATML}‹Four.<|im_end|>›{MORE}‹Seven.<|im_end|>›"],
    # The empty reasoning is generated, and is no more there when the next answer is.
    "qwen3": [
        f"{CHATML}‹<think>\n\n</think>\n\nFour.<|im_end|>›",
        f"{CHATML}Four.<|im_end|>{MORE}‹<think>\n\n</think>\n\nSeven.<|im_end|>›",
    ],
    "llama3_1": [
        f"<|begin_of_text|>{HEAD('system')}{DATE}Be brief.<|eot_id|>{HEAD('user')}Two and two?<|eot_id|>{HEAD('assistant')}"
        f"‹Four.<|eot_id|>›{HEAD('user')}And three?<|eot_id|>{HEAD('assistant')}‹Seven.<|eot_id|>›"
    ],
    "gemma3": [
        "<bos><start_of_turn>user\nBe brief.\n\nTwo and two?<end_of_turn>\n<start_of_turn>model\n‹Four.<end_of_turn>›"
        "\n<start_of_turn>user\nAnd three?<end_of_turn>\n<start_of_turn>model\n‹Seven.<end_of_turn>›"
    ],
    # The system message stands in the question that is answered.
    "mistral_v0_3": [
        "<s>[INST] Be brief.\n\nTwo and two?[/INST]‹ Four.</s>›",
        "<s>[INST] Two and two?[/INST] Four.</s>[INST] Be brief.\n\nAnd three?[/INST]‹ Seven.</s>›",
    ],
    "phi3": [
        "<|system|>\nBe brief.<|end|>\n<|user|>\nTwo and two?<|end|>\n<|assistant|>\n‹Four.<|end|>›"
        "\n<|user|>\nAnd three?<|end|>\n<|assistant|>\n‹Seven.<|end|>›"
    ],
    # The last answer ends with another token than earlier ones.
    "gptoss": [
        f"{HARMONY}{BRIEF}‹<|channel|>final<|message|>Four.<|return|>›",
        f"{HARMONY}{BRIEF}<|channel|>final<|message|>Four.<|end|><|start|>user<|message|>And three?<|end|><|start|>assistant"
        "‹<|channel|>final<|message|>Seven.<|return|>›",
    ],
}
QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within "
    f"<tools></tools> XML tags:\n<tools>\n{json.dumps(TOOL)}\n</tools>\n\nFor each function call, return a json object with function name "
    'and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call><|im_end|>\n<|im_start|>user\nWeather in Rome?<|im_end|>\n<|im_start|>assistant\n"
)
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
QWEN_RESULT = "\n<|im_start|>user\n<tool_response>\nSunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n"
WITH_TOOLS = {
    "qwen2_5": [f"<|im_start|>system\n{QWEN}{QWEN_TOOLS}‹{QWEN_CALL}›{QWEN_RESULT}‹It is sunny.<|im_end|>›"],
    "qwen3": [
        f"<|im_start|>system\n{QWEN_TOOLS}‹<think>\n\n</think>\n\n{QWEN_CALL}›",
        f"<|im_start|>system\n{QWEN_TOOLS}{QWEN_CALL}{QWEN_RESULT}‹<think>\n\n</think>\n\nIt is sunny.<|im_end|>›",
    ],
    "llama3_1": [
        f"<|begin_of_text|>{HEAD('system')}Environment: ipython\n{DATE}<|eot_id|>{HEAD('user')}"
        "Given the following functions, please respond with a JSON for a function call "
        "with its proper arguments that best answers the given prompt.\n\n"
        "Respond in the format "
        '{"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n'
        f"{json.dumps(TOOL, indent=4)}\n\nWeather in Rome?<|eot_id|>{HEAD('assistant')}"
        '‹{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>›'
        f'{HEAD("ipython")}"Sunny"<|eot_id|>{HEAD("assistant")}‹It is sunny.<|eot_id|>›'
    ],
    "mistral_v0_3": [
        '<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "weather", "description": "Tell it.", '
        '"parameters": {"type": "object", "properties": {}}}}][/AVAILABLE_TOOLS][INST] Weather in Rome?[/INST]'
        f'‹[TOOL_CALLS] [{{"name": "weather", "arguments": {{"city": "Rome"}}, "id": "{ID}"}}]</s>›'
        f'[TOOL_RESULTS] {{"content": Sunny, "call_id": "{ID}"}}[/TOOL_RESULTS]‹ It is sunny.</s>›'
    ],
    "gptoss": [
        f"{HARMONY}\nCalls to these tools must go to the commentary channel: 'functions'.<|end|><|start|>developer<|message|># Tools\n\n"
        "## functions\n\nnamespace functions {\n\n// Tell it.\ntype weather = () => any;\n\n} // namespace functions<|end|>"
        "<|start|>user<|message|>Weather in Rome?<|end|><|start|>assistant"
        '‹ to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>›'
        '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"Sunny"<|end|>'
        "<|start|>assistant‹<|channel|>final<|message|>It is sunny.<|return|>›"
    ],
}


def reference(tokenizer, marked: str) -> tuple[list[int], list[int]]:
    """Tokenize the text as a whole, and learn the tokens that begin between the marks."""
    pieces = re.split("[‹›]", marked)
    ends = [len("".join(pieces[: i + 1])) for i in range(len(pieces))]
    encoded = tokenizer("".join(pieces), add_special_tokens=False, return_offsets_mapping=True)
    learnt = [next(i for i, end in enumerate(ends) if start < end) % 2 == 1 for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], [id if is_learnt else -100 for id, is_learnt in zip(encoded["input_ids"], learnt, strict=True)]


def check(family: str, conversation: Conversation, marked: list[str], train_on: TrainOn = "assistant", **options) -> None:
    tokenizer = families.tokenizer(family)
    examples = Chat(tokenizer, options).examples(conversation, train_on)
    assert [tokenizer.decode(e.ids) for e in examples] == [tokenizer.decode(reference(tokenizer, text)[0]) for text in marked]
    assert [(e.ids, e.labels) for e in examples] == [reference(tokenizer, text) for text in marked]


def unmarked(text: str) -> str:
    return text.replace("‹", "").replace("›", "")


def only_last(marked: list[str]) -> list[str]:
    """Leave the marks around the last answer alone; it stands in the last text."""
    before, _, answer = marked[-1].rpartition("‹")
    return [f"{unmarked(before)}‹{answer}"]


@pytest.mark.parametrize("family", TALKS)
def test_every_answer_of_a_talk(family):
    check(family, Conversation([SYSTEM, *TURNS]), TALKS[family])


@pytest.mark.parametrize("family", WITH_TOOLS)
def test_calls_of_tools(family):
    check(family, Conversation(CALLED, [TOOL]), WITH_TOOLS[family])


@pytest.mark.parametrize("family", TALKS)
def test_the_last_answer_or_all_tokens(family):
    talk = Conversation([SYSTEM, *TURNS])
    check(family, talk, only_last(TALKS[family]), "last")
    check(family, talk, [f"‹{unmarked(TALKS[family][-1])}›"], "all")
    forgotten = Conversation([SYSTEM, TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]])
    check(family, forgotten, only_last(TALKS[family]))


@pytest.mark.parametrize("family", WITH_TOOLS)
def test_the_last_answer_or_all_tokens_beside_calls_of_tools(family):
    called = Conversation(CALLED, [TOOL])
    check(family, called, only_last(WITH_TOOLS[family]), "last")
    check(family, called, [f"‹{unmarked(WITH_TOOLS[family][-1])}›"], "all")


@pytest.mark.parametrize("family", ["smollm2", "gemma3", "phi3"])
def test_tools_that_a_template_does_not_write_are_refused(family):
    with pytest.raises(ValueError, match="does not write the row's tools"):
        Chat(families.tokenizer(family)).examples(Conversation(TURNS, [TOOL]))


def test_reasoning_is_learnt_where_it_was_generated():
    """Qwen 3 drops it from earlier answers, so each answer is learnt in a row that ends with it."""
    first, second = ({**turn, "content": f"<think>\nHm.\n</think>\n\n{turn['content']}"} for turn in TURNS[1::2])
    check(
        "qwen3",
        Conversation([SYSTEM, TURNS[0], first, TURNS[2], second]),
        [
            f"{CHATML}‹<think>\nHm.\n</think>\n\nFour.<|im_end|>›",
            f"{CHATML}Four.<|im_end|>{MORE}‹<think>\nHm.\n</think>\n\nSeven.<|im_end|>›",
        ],
    )
    off = f"{MORE}<think>\n\n</think>\n\n‹Seven.<|im_end|>›"  # the prompt has the empty reasoning, so it is not learnt
    check(
        "qwen3",
        Conversation([SYSTEM, *TURNS]),
        [f"{CHATML}<think>\n\n</think>\n\n‹Four.<|im_end|>›", f"{CHATML}Four.<|im_end|>{off}"],
        enable_thinking=False,
    )


def test_a_template_whose_prompt_the_answer_does_not_follow_is_refused():
    """DeepSeek R1's begins the reasoning in the prompt, and writes answers without."""
    with pytest.raises(ValueError, match=r"does not put the assistant's answer after its generation prompt \(which ends in '.*<think>"):
        Chat(families.tokenizer("deepseek_r1_distill")).examples(Conversation(TURNS))


def test_a_system_message_that_a_template_refuses_is_named():
    with pytest.raises(ValueError, match=r"refuses the messages \(system, user\): System role not supported"):
        Chat(families.tokenizer("gemma")).examples(Conversation([SYSTEM, *TURNS]))


ENDS = {"smollm2": "<|im_end|>", "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>", "llama3_1": "<|eot_id|>", "gemma": "<end_of_turn>"}
ENDS |= {"gemma3": "<end_of_turn>", "mistral_v0_3": "</s>", "phi3": "<|end|>", "gptoss": "<|return|> <|call|>"}


@pytest.mark.parametrize("family", ENDS)
def test_the_tokens_that_end_an_answer(family):
    tokenizer = families.tokenizer(family)
    assert " ".join(tokenizer.convert_ids_to_tokens(Chat(tokenizer).ends)) == ENDS[family]


def test_the_prompt_is_tokenized_as_generation_reads_it():
    """GPT-2's tokenizer writes two line ends before a word otherwise than at the end of a text, where generation begins."""
    tokenizer = families.tokenizer("llama3_1")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (example,) = Chat(tokenizer).examples(Conversation(TURNS[:2]))
    assert example.ids[: len(example.prompt)] == tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True)["input_ids"]
    assert example.ids != tokenizer.apply_chat_template(TURNS[:2])["input_ids"]
    assert tokenizer.decode(example.answer) == "Four.<|eot_id|>"
