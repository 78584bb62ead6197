"""``make models``: architectures of transformers, built tiny, through all that an adapter goes through, printed by running it.

Each is injected under all-linear, trained three steps, merged, unmerged, saved, loaded here and by PEFT, exported and reloaded. The last
line counts: ``N passed, N refused, 0 failed``. A model is refused by one line when LoRA is applied. ``python -m tests.models llama phi3``
runs some.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    export_merged,
    get_lora_parameters,
    load_adapter,
    merge_lora,
    save_adapter,
    unmerge_lora,
)
from tests.sweep.archs import build, names
from tests.sweep.check import outputs

CONFIG = LoRAConfig(rank=2, alpha=16, target_modules="all-linear", modules_to_save=[])
STEPS = 3
NOT_IN_PEFT = ("PEFT 0.21 renames them", "PEFT 0.21 cannot adapt")  # as save_adapter warns


def check(name: str, folder: Path) -> str:
    """Run one architecture. Return what is to be said of it: an empty string, ``no PEFT`` where its layers have no place there.

    Raises:
        ValueError: the model is refused.
        AssertionError: a stage is wrong.
    """
    base, inputs = build(name)
    start = outputs(base, inputs)
    model = apply_lora(copy.deepcopy(base), CONFIG)
    error = float(
        (outputs(model, inputs) - start).norm() / start.norm()
    )  # not bits: products of strided inputs are summed in another order
    assert error < 1e-6, f"the start differs from the base's output by {error:.1e}"
    train(model, inputs)
    trained = outputs(model, inputs)
    effect = (trained - start).norm()
    assert effect > 1e-3 * start.norm(), f"training changed the output by {float(effect / start.norm()):.1e}"
    bits = weights(model)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        save_adapter(model, folder / "adapter")
    same(outputs(load_adapter(copy.deepcopy(base), folder / "adapter").eval(), inputs), trained, effect, "the adapter loaded here")
    in_peft = not any(words in str(warning.message) for warning in said for words in NOT_IN_PEFT)
    if in_peft:
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter").eval()
        same(outputs(theirs, inputs), trained, effect, "the adapter loaded by PEFT")
        theirs.save_pretrained(folder / "back")
        same(outputs(load_adapter(copy.deepcopy(base), folder / "back").eval(), inputs), trained, effect, "PEFT's copy loaded here")

    export_merged(model, folder / "merged")
    same(outputs(type(base).from_pretrained(folder / "merged").eval(), inputs), trained, effect, "the export")
    merge_lora(model)
    same(outputs(model, inputs), trained, effect, "the merged model")
    unmerge_lora(model)
    assert all(torch.equal(bits[key], value) for key, value in weights(model).items()), "unmerging is not exact"
    return "" if in_peft else "no PEFT"


def train(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Three steps towards outputs of zero, in evaluation mode: dropout and running statistics stay out of the comparison."""
    optimizer = torch.optim.AdamW(get_lora_parameters(model), lr=0.02)
    for _ in range(STEPS):
        optimizer.zero_grad()
        outputs(model, inputs, grad=True).square().mean().backward()
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(found: Tensor, wanted: Tensor, effect: Tensor, what: str) -> None:
    """Equal up to float32's rounding, seen against the adapters' effect."""
    assert found.shape == wanted.shape, f"{what} has other outputs"
    error = float((found - wanted).norm() / effect)
    assert error < 5e-3, f"{what} differs by {error:.1e} of the adapters' effect"


def main(chosen: list[str]) -> int:
    counts: Counter[str] = Counter()
    disable_progress_bar()
    print("| architecture | | |\n|---|---|---|")
    for name in chosen or names():
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                word, note = "passed", check(name, Path(folder))
            except ValueError as error:
                word, note = "refused", str(error).splitlines()[0]
            except Exception as error:  # a fault of any kind is the model's row; the others still run
                word, note = "failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        counts[word] += 1
        print(f"| {name} | {word} | {note} |", flush=True)
    print(f"{counts['passed']} passed, {counts['refused']} refused, {counts['failed']} failed")
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
