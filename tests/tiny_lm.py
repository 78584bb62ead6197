"""A tiny random language model with a word-level tokenizer, saved as a folder, and question files for it: no network, no download."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from lightning_lora.data import InstructionDataModule
from lightning_lora.data.batching import Example
from lightning_lora.data.store import Examples

CHATML = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)
CHOICES = ["red", "green apple", "green pear", "blue sky", "blue"]
WORDS = ["<pad>", "<unk>", "<s>", "</s>", "system", "user", "assistant", "which", "colour", "is", "the", "sky", "grass", "blood"]
WORDS += ["apple", "pear", "red", "green", "blue", "name", "a"]


def tokenizer(chat: bool = True, words: list[str] = WORDS) -> transformers.PreTrainedTokenizerFast:
    """One token a word; a chat template that ends every turn in ``</s>`` if ``chat``."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    made.chat_template = CHATML if chat else None
    return made


def llama(vocab: int = len(WORDS), cls: type = transformers.LlamaForCausalLM) -> transformers.PreTrainedModel:
    """A two-layer Llama; large initial weights, so that its predictions are far from uniform."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        initializer_range=0.3,
    )
    return cls(config)


def save(folder: Path, chat: bool = True, words: list[str] = WORDS) -> str:
    """Both as a folder that ``from_pretrained`` reads."""
    llama(len(words)).save_pretrained(folder)
    tokenizer(chat, words).save_pretrained(folder)
    return str(folder)


def rows(n: int = 12) -> list[dict]:
    """Questions with choices, of differing lengths."""
    things = ["the sky", "the grass", "blood", "a pear is the", "the sky the grass"]
    return [{"prompt": f"which colour is {things[i % 5]}", "response": CHOICES[i % 5], "choices": CHOICES} for i in range(n)]


def write(file: Path, content: list) -> str:
    """Rows, or raw lines, as a jsonl file."""
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in content))
    return str(file)


def load_examples(file: str | Path, tokenizer: Any, max_length: int, split: str) -> Examples[Example]:
    """The encoded rows of a file, outside of a run."""
    data = InstructionDataModule(**{split: str(file)}, max_length=max_length)
    data._tokenizer = tokenizer
    return data.load(split)
