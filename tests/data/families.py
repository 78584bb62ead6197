"""Tiny tokenizers of the kinds that chat models have, with their published chat templates and special tokens.

The templates are those of HuggingFaceTB/SmolLM2-135M-Instruct, Qwen/Qwen2.5, Qwen/Qwen3, meta-llama/Llama-3.1, google/gemma-2 and
gemma-3, mistralai/Mistral-7B-Instruct-v0.3, microsoft/Phi-3-mini, deepseek-ai/DeepSeek-R1-Distill and openai/gpt-oss, as those ship them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "templates"
# What the merges are learnt from: words, and what stands between turns, so that tokens could span a turn's begin.
CORPUS = [
    "assistant\n\nFour. user\nTwo and two? And three? Seven.",
    "\n\n\n\n \n\n",
    "It is sunny in Rome. weather city name arguments",
] * 4
# Where Qwen and Llama 3 split texts into words.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHATML = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
# Name: kind of tokenizer, special tokens, begin token, end token. The end token is the published one, which ends a turn only in some.
FAMILIES: dict[str, tuple[str, list[str], str | None, str]] = {
    "smollm2": ("bytes", CHATML, "<|im_start|>", "<|im_end|>"),
    "qwen2_5": ("bytes", CHATML, None, "<|endoftext|>"),
    "qwen3": ("bytes", CHATML, None, "<|endoftext|>"),
    "llama3_1": (
        "bytes",
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"],
        "<|begin_of_text|>",
        "<|end_of_text|>",
    ),
    "gemma": ("pieces", ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
    "gemma3": ("pieces", ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
    "mistral_v0_3": (
        "prepended",
        ["<s>", "</s>", *(f"[{end}{name}]" for name in ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS") for end in ("", "/")), "[TOOL_CALLS]"],
        "<s>",
        "</s>",
    ),
    "phi3": ("stripped", ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], "<s>", "<|endoftext|>"),
    "deepseek_r1_distill": (
        "bytes",
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
    ),
    "gptoss": (
        "bytes",
        [f"<|{name}|>" for name in ("startoftext", "endoftext", "return", "start", "end", "message", "channel", "call", "constrain")],
        "<|startoftext|>",
        "<|return|>",
    ),
}
# Added tokens that are text, not special: decoding shows them.
TEXTUAL = {"qwen2_5": ["<tool_call>", "</tool_call>"], "qwen3": ["<think>", "</think>", "<tool_call>", "</tool_call>"]}


@cache
def _backend(kind: str) -> str:
    """Return a trained tokenizer as JSON."""
    made = Tokenizer(models.BPE(byte_fallback=kind != "bytes"))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else [f"<0x{i:02X}>" for i in range(256)]
    if kind == "bytes":
        words = pre_tokenizers.Split(Regex(WORDS), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        made.decoder = decoders.ByteLevel()
    else:
        spaces = normalizers.Replace(" ", "▁")
        made.normalizer = spaces if kind == "pieces" else normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = alphabet if kind != "bytes" else []
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet if kind == "bytes" else [], special_tokens=special, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made.to_str()


def tokenizer(family: str) -> Any:
    """Return the tokenizer of a family, with its chat template."""
    kind, special, bos, eos = FAMILIES[family]
    backend = Tokenizer.from_str(_backend(kind))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False, rstrip=kind == "stripped") for token in special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in TEXTUAL.get(family, [])])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    made.chat_template = (FOLDER / f"{family}.jinja").read_text()
    return made
