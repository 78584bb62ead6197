import pytest

from lightning_lora.data.chat import Chat
from lightning_lora.data.records import Conversation
from lightning_lora.data.templates import TEMPLATES, TOKENS, set_template
from tests.data import families

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two and two?"}
MESSAGES = [SYSTEM, USER, {"role": "assistant", "content": "Four."}]
# Template, tokenizer that fits it: what is read, and what is learnt.
TEXTS = {
    ("plain", "phi3"): ("Be brief.\n\nTwo and two?\n\n### Response:\n", "Four.<|endoftext|>"),
    ("alpaca", "qwen3"): ("Be brief.\n\n### Instruction:\nTwo and two?\n\n### Response:\n", "Four.<|endoftext|>"),
    ("vicuna", "qwen3"): ("Be brief. USER: Two and two? ASSISTANT:", " Four.<|endoftext|>"),
    ("zephyr", "qwen3"): ("<|system|>\nBe brief.<|endoftext|>\n<|user|>\nTwo and two?<|endoftext|>\n<|assistant|>\n", "Four.<|endoftext|>"),
    ("chatml", "qwen3"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n",
        "Four.<|im_end|>",
    ),
    ("llama3", "llama3_1"): (
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Two and two?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Four.<|eot_id|>",
    ),
    ("gemma", "gemma3"): (
        "<start_of_turn>user\nBe brief.\n\nTwo and two?<end_of_turn>\n<start_of_turn>model\n",
        "Four.<end_of_turn>",
    ),
    ("mistral", "mistral_v0_3"): ("[INST] Be brief.\n\nTwo and two?[/INST]", " Four.</s>"),
    ("phi3", "phi3"): ("<|system|>\nBe brief.<|end|>\n<|user|>\nTwo and two?<|end|>\n<|assistant|>\n", "Four.<|end|>"),
}


@pytest.mark.parametrize(("template", "family"), TEXTS)
def test_what_a_named_template_writes(template, family):
    """A tokenizer that begins every text with a token of its own gets it here too: none of these does."""
    tokenizer = families.tokenizer(family)
    set_template(tokenizer, template)
    prompt, answer = TEXTS[template, family]
    assert tokenizer.apply_chat_template(MESSAGES[:2], tokenize=False, add_generation_prompt=True) == prompt
    (example,) = Chat(tokenizer).examples(Conversation(MESSAGES))
    spelled = tokenizer.convert_ids_to_tokens
    assert example.ids == tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    assert spelled(example.prompt) == spelled(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    (two,) = Chat(tokenizer).examples(Conversation([*MESSAGES, USER, MESSAGES[2]]))
    assert two.ids[: len(example.ids)] == example.ids and two.answer == example.answer * 2


def test_every_template_is_tested():
    assert {template for template, _ in TEXTS} == TEMPLATES.keys()


def test_a_tokenizer_that_begins_texts_with_a_token_gets_it_in_the_template():
    from tokenizers.processors import TemplateProcessing

    tokenizer = families.tokenizer("gemma3")
    begin = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begin
    set_template(tokenizer, "alpaca")
    (example,) = Chat(tokenizer).examples(Conversation(MESSAGES))
    assert tokenizer.decode(example.ids).startswith("<bos>Be brief.") and example.ids.count(tokenizer.bos_token_id) == 1


def test_a_template_that_does_not_fit_changes_nothing():
    tokenizer = families.tokenizer("qwen3")
    before = tokenizer.chat_template
    with pytest.raises(ValueError, match=r"data.template='llama3' writes <\|start_header_id\|>, .* does not have; plain"):
        set_template(tokenizer, "llama3")
    with pytest.raises(ValueError, match=r"data.template='chatMl' is not known; the names are plain, alpaca"):
        set_template(tokenizer, "chatMl")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no end token"):
        set_template(tokenizer, "vicuna")
    assert tokenizer.chat_template == before
    assert TOKENS.keys() <= TEMPLATES.keys()


def test_a_template_itself_and_a_file_of_one(tmp_path):
    tokenizer = families.tokenizer("qwen3")
    jinja = "{% for m in messages %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% endfor %}"
    set_template(tokenizer, jinja)
    assert tokenizer.chat_template == jinja
    (tmp_path / "own.jinja").write_text(jinja + "{# from a file #}")
    set_template(tokenizer, str(tmp_path / "own.jinja"))
    assert tokenizer.chat_template == jinja + "{# from a file #}"
    with pytest.raises(ValueError, match=r"data.template='none.jinja': no such file"):
        set_template(tokenizer, "none.jinja")
    with pytest.raises(ValueError, match=r"data.template is no Jinja template: unexpected '}'"):
        set_template(tokenizer, "{{ messages }")
