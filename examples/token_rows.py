"""Add chat markers to a tokenizer and train only their rows of the vocabulary, beside the adapters.

    python examples/token_rows.py --out /tmp/rows

A base model has no markers for the turns of a chat. Two are added; their rows train and are saved, every other row of the vocabulary
stays as it is, bit for bit. Model and tokenizer are made here: put your own in their place. Seconds on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import counting
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_lora import LoRAConfig, apply_lora, load_adapter, lora_param_groups, save_adapter

MARKERS = ["<|user|>", "<|assistant|>"]


def made_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each number that the model counts with."""
    backend = Tokenizer(models.WordLevel({str(i): i for i in range(counting.NUMBERS)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def extended() -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """The base with rows for the markers: do the same before loading the adapter."""
    model, tokenizer = counting.pretrained(), made_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model, tokenizer


def chats(tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> torch.Tensor:
    """Ids of ``<|user|> 7 <|assistant|> 10 13 16``: the answer counts on from the question by 3."""
    starts = torch.randint(counting.NUMBERS, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [f"{MARKERS[0]} {n} {MARKERS[1]} " + " ".join(str((n + 3 * i) % counting.NUMBERS) for i in (1, 2, 3)) for n in starts]
    return torch.tensor(tokenizer(texts)["input_ids"])


@torch.no_grad()
def accuracy(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Share of the answers' numbers that the model gets right."""
    guessed = model.eval()(input_ids=ids).logits[:, 2:-1].argmax(-1)
    return float((guessed == ids[:, 3:]).float().mean())


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train the rows with the adapters, save, load; return what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=200, help="of 16 chats (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/token_rows"), help="folder of the adapter (%(default)s)")
    options = parser.parse_args(argv)

    model, tokenizer = extended()
    before_training = model.get_input_embeddings().weight.detach().clone()
    new = tokenizer.convert_tokens_to_ids(MARKERS)
    torch.manual_seed(0)
    # This model's head is not tied to its embedding, and has new rows too. For a tied head a list of ids is enough.
    rows = {"embed_tokens": new, "lm_head": new}
    apply_lora(model, LoRAConfig(rank=4, target_modules="all-linear", trainable_token_indices=rows))
    test = chats(tokenizer, 64, seed=1)
    before = accuracy(model, test)

    optimizer = torch.optim.AdamW(lora_param_groups(model, lr=1e-2))  # adapters and rows
    model.train()
    for ids in chats(tokenizer, 16 * options.batches, seed=0).split(16):
        labels = ids.clone()
        labels[:, :3] = -100  # learn the answers only
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = accuracy(model, test)

    folder = save_adapter(model, options.out / "adapter", overwrite=True)
    tokenizer.save_pretrained(folder)  # its markers belong to the adapter
    loaded = load_adapter(extended()[0], folder)
    same = bool(torch.equal(loaded.get_input_embeddings().weight[: new[0]], before_training[: new[0]]))
    print(f"answers: {before:.0%} -> {after:.0%}, loaded {accuracy(loaded, test):.0%}; the other rows are the base's: {same}")
    return {"before": before, "after": after, "loaded": accuracy(loaded, test), "same": same}


if __name__ == "__main__":
    main()
