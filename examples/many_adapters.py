"""Several adapters on one base: switch them, give each row of a batch its own.

    python examples/many_adapters.py --out /tmp/many

Two adapters learn to count by 2 and by 3 on a model that counts by 1 (`counting.py`). Then one base in memory serves all three.
Seconds on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import counting
import torch

from lightning_lora import LoRAConfig, apply_lora, load_adapters, lora_param_groups, save_adapter


def train(step: int, count: int, rank: int, folder: Path) -> Path:
    """Teach a step to a fresh base; return the adapter's folder."""
    torch.manual_seed(step)
    model = apply_lora(counting.pretrained(), LoRAConfig(rank=rank, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW(lora_param_groups(model, lr=1e-2))
    for ids in counting.batches(step, count=16 * count):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return save_adapter(model, folder, overwrite=True)


def main(argv: list[str] | None = None) -> dict[str, list]:
    """Train two adapters, then use them; return the next numbers that each gives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=120, help="of 16 rows for each adapter (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/many_adapters"), help="folder of the adapters (%(default)s)")
    options = parser.parse_args(argv)

    folders = {"twos": train(2, options.batches, 4, options.out / "twos"), "threes": train(3, options.batches, 8, options.out / "threes")}
    model = counting.pretrained()  # one base
    adapters = load_adapters(model, folders)  # of other ranks; the first is active

    @torch.no_grad()
    def next_numbers(step: int) -> list[int]:
        ids = (5 + step * torch.arange(5)).repeat(3, 1)  # three rows alike
        return model(input_ids=ids).logits[:, -1].argmax(-1).tolist()

    seen = {}
    for name, step in (("twos", 2), ("threes", 3), (None, 1)):
        adapters.use(name)  # copies the factors; None is the base alone
        seen[str(name)] = next_numbers(step)
        print(f"{name}: after {', '.join(str(5 + step * i) for i in range(5))} comes {seen[str(name)][0]}")
    with adapters.rows(["twos", "threes", None]):  # one adapter for each row
        ids = torch.stack([5 + step * torch.arange(5) for step in (2, 3, 1)])
        with torch.no_grad():
            seen["rows"] = model(input_ids=ids).logits[:, -1].argmax(-1).tolist()
    print(f"a row each, in one batch: {seen['rows']}")

    adapters.remove("threes")  # while the model serves; `add` puts a folder in, or a newer one in its place
    adapters.add("twos", folders["twos"])
    print(adapters)
    return seen


if __name__ == "__main__":
    main()
