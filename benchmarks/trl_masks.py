"""What TRL's `SFTTrainer` learns of a conversation and how it packs, beside this package: TRL's own code, a tiny model.

TRL is no requirement of this project. Install it where it disturbs nothing, and name the place:

    pip install --no-deps --target TRL trl
    PYTHONPATH=.:TRL python benchmarks/trl_masks.py

The first table takes the published chat templates of ``tests/data/families.py``, with ``assistant_only_loss``. TRL replaces them by its own
with marks around what is generated. *Only TRL* are tokens that TRL learns and we do not, *only ours* the other way round; both as text.
The second packs texts by best-fit decreasing and compares the loss that the model has on all packed rows.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from lightning_lora.data.batching import Example
from lightning_lora.data.chat import Chat
from lightning_lora.data.packing import PackedRows
from lightning_lora.data.records import Conversation
from lightning_lora.data.store import Examples
from lightning_lora.ops.cross_entropy import IGNORE
from tests.data.families import FAMILIES, tokenizer
from tests.data.test_masks import CALLED, SYSTEM, TOOL, TURNS

TALKS: dict[str, tuple[list[Any], list[Any] | None]] = {
    "one answer": (TURNS[:2], None),
    "two answers": (TURNS, None),
    "system": ([SYSTEM, *TURNS], None),
    "tools": (CALLED, [TOOL]),
}


def trainer(rows: list[dict[str, Any]], words: Any, **options: Any) -> SFTTrainer:
    """TRL's trainer on rows, which it has prepared; a tiny Llama on the CPU."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes))
    settings = SFTConfig(tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=1, **options)
    return SFTTrainer(model, args=settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=words)


def spans(words: Any, ids: Sequence[int], chosen: Sequence[bool]) -> list[str]:
    """The runs of chosen tokens as text."""
    found, open_run = [], False
    for token, is_chosen in zip(ids, chosen, strict=True):
        if is_chosen:
            found = found if open_run else [*found, ""]
            found[-1] += words.decode([token])
        open_run = is_chosen
    return found


def compared(family: str, messages: list[Any], tools: list[Any] | None) -> str:
    """One cell of the first table."""
    words, row = tokenizer(family), {"messages": messages} | ({"tools": tools} if tools else {})
    try:
        ours = Chat(tokenizer(family)).examples(Conversation(messages, tools))
    except ValueError as error:
        return f"ours refuses it: {str(error).partition(';')[0][:80]}"
    try:
        theirs = trainer([row], words, assistant_only_loss=True, max_length=4096).train_dataset[0]
    except Exception as error:  # whatever it says is what is reported
        return f"TRL refuses it: {str(error)[:70]}"
    ids, labels = list(theirs["input_ids"]), list(theirs["labels"])
    if len(ours) > 1:
        return f"{len(ours)} rows here, one in TRL: learnt in it {spans(words, ids, [label != IGNORE for label in labels])}"
    mine: Example = ours[0]
    common = min(len(ids), len(mine.ids))
    if ids[:common] != mine.ids[:common]:
        return "other tokens"
    padded = [*mine.labels, *[IGNORE] * (len(ids) - len(mine.ids))]
    padded, labels = padded[: len(ids)], labels
    theirs_alone = [a != IGNORE and b == IGNORE for a, b in zip(labels, padded, strict=True)]
    ours_alone = [a == IGNORE and b != IGNORE for a, b in zip(labels, padded, strict=True)]
    return f"the same tokens; only TRL {spans(words, ids, theirs_alone)}, only ours {spans(words, ids, ours_alone)}"


def packed(family: str, count: int, length: int) -> None:
    """Print rows and loss of both packings."""
    choose = random.Random(0)
    texts = [
        " ".join(choose.choices(["assistant", "user", "Rome", "sunny", "And", "weather"], k=choose.randint(2, 12))) for _ in range(count)
    ]
    words = tokenizer(family)
    theirs = trainer(
        [{"text": text} for text in texts], words, packing=True, packing_strategy="bfd", max_length=length, shuffle_dataset=False
    )
    model, losses, tokens = theirs.model.eval(), 0.0, 0
    with torch.no_grad():
        for batch in theirs.get_train_dataloader():
            learnt = int((batch["labels"][:, 1:] != IGNORE).sum())
            losses, tokens = losses + float(model(**batch).loss) * learnt, tokens + learnt
        encoded = [[*words(text)["input_ids"], words.eos_token_id] for text in texts]
        rows = PackedRows(Examples.pack(Example, [Example(ids, list(ids)) for ids in encoded]), length, rows=1)
        mine, own = 0.0, 0
        for index in range(len(rows)):
            batch = rows.collate([rows[index]], words.pad_token_id)
            learnt = int((batch["labels"] != IGNORE).sum())
            mine, own = mine + float(model(**batch).loss) * learnt, own + learnt
    print(
        f"{count} texts, rows of {length} tokens: TRL {len(theirs.train_dataset)} rows, {tokens} tokens learnt, loss {losses / tokens:.7f}"
    )
    print(f"{'':>{len(str(count))}}                            ours {len(rows)} rows, {own} tokens learnt, loss {mine / own:.7f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--length", type=int, default=64)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    for family in arguments.families:
        for name, talk in TALKS.items():
            print(f"{family:<20} {name:<12} {compared(family, *talk)}", flush=True)
    packed("qwen2_5", arguments.texts, arguments.length)


if __name__ == "__main__":
    main()
