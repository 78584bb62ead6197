"""``make family``, its second part: every kind of layer, and every variant, with every init, by running it.

A pair that cannot be is refused when LoRA is applied, with a message that names the layer and the init. Each other pair runs ``CHECKS``.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, initialize_from_data, load_adapter, merge_lora, quantize_base, save_adapter, unmerge_lora
from lightning_lora.layers.base import LoRALayer, lora_layers
from lightning_lora.registry import INITS, VARIANTS, belongs_to_packed_base, data_of
from tests.conftest import same_bits
from tests.family import CASES, Packed

NAMES = sorted((name.replace("[n]", "4") for name in INITS), key=lambda name: (name != "kaiming", name))
KIND_PAIRS = [(kind, "plain", init) for kind in CASES for init in NAMES]
ON = {"loftq": "linear, fp8"}
VARIANT_PAIRS = [(ON.get(init, "linear-1d"), variant, init) for variant in VARIANTS for init in NAMES if variant != "plain"]


def config_of(kind: str, variant: str, init: str) -> LoRAConfig:
    case = CASES[kind]
    return LoRAConfig(rank=case.rank, variant=variant, init=init, target_modules=["layer"], modules_to_save=[], **case.fields)


def base(kind: str, config: LoRAConfig) -> nn.Module:
    """A model of one layer; a quantized one is quantized for the config's init."""
    case, model = CASES[kind], nn.Module()
    if isinstance(case, Packed) and belongs_to_packed_base(config.init):
        torch.manual_seed(6)
        model.layer = nn.Linear(128, 256)
        return quantize_base(model, case.build.args[0], lora=config)
    model.layer = case.base()
    return model


def started(kind: str, variant: str, init: str) -> tuple[nn.Module, LoRALayer]:
    config = config_of(kind, variant, init)
    model = apply_lora(base(kind, config), config)
    if data_of(init) is not None:
        torch.manual_seed(0)
        rows = [torch.randn_like(CASES[kind].x()) for _ in range(20)]
        initialize_from_data(model, rows, step=lambda model, x: model.layer(x).square().mean())
    ((_, layer),) = lora_layers(model) if any(lora_layers(model)) else (("", None),)
    return model.eval(), layer


def refusal(kind: str, variant: str, init: str) -> str | None:
    """Why LoRA cannot be applied; None if it can. A refusal names layer and init, and changes nothing."""
    config = config_of(kind, variant, init)
    model = base(kind, config)
    cls, parameters = type(model.layer), list(model.parameters())
    try:
        apply_lora(model, config)
    except ValueError as error:
        assert "'layer'" in str(error) and (f"init={init!r}" in str(error) or variant in str(error) or "freezes" in str(error)), error
        assert type(model.layer) is cls and all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        return str(error)
    return None


@torch.no_grad()
def start(kind: str, variant: str, init: str, folder: Path) -> None:
    """The model starts as its base; with LoftQ nearer to the one that was quantized."""
    _, layer = started(kind, variant, init)
    x = CASES[kind].x()
    # Not in evaluation mode, in which bitsandbytes rounds a 4-bit weight on some CPUs.
    plain = base(kind, config_of(kind, variant, init)).layer
    if belongs_to_packed_base(init):
        torch.manual_seed(6)
        wanted = nn.Linear(128, 256)(x)
        assert (layer(x) - wanted).norm() < (plain(x) - wanted).norm()
    elif variant == "dora":  # computed in another order
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-5 * float(plain(x).abs().max()) if init == "orthogonal" else 0)


def trains(kind: str, variant: str, init: str, folder: Path) -> None:
    """Something has a gradient that is not zero."""
    _, layer = started(kind, variant, init)
    layer(CASES[kind].x()).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in layer.lora_parameters().values())


def files(kind: str, variant: str, init: str, folder: Path) -> None:
    """A folder holds the adapter, merged or not, and the base comes back."""
    model, layer = started(kind, variant, init)
    with torch.no_grad():
        for parameter in layer.lora_parameters().values():
            parameter.add_(0.02 * parameter.requires_grad)
        if getattr(layer, "padding_idx", None) is not None:
            layer.lora_A[:, layer.padding_idx] = 0
    x = CASES[kind].x()
    wanted = layer(x)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*PEFT 0.21 takes other norms")
        save_adapter(model, folder, overwrite=True)
    read = load_adapter(base(kind, config_of(kind, variant, init)), folder).eval()
    torch.testing.assert_close(read.layer(x), wanted, rtol=1e-5, atol=1e-5 * float(wanted.detach().abs().max()))
    if layer.merge_refusal(CASES[kind].quantized) is None:
        weights = {name: part.base_weight().detach().clone() for name, part in layer.by_weight().items()}
        merge_lora(model, quantized=CASES[kind].quantized)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4 * float(wanted.detach().abs().max()))
        unmerge_lora(model)
        assert all(same_bits(part.base_weight(), weights[name]) for name, part in layer.by_weight().items())


CHECKS: dict[str, Callable[[str, str, str, Path], Any]] = {"start": start, "trains": trains, "files": files}


def cell(kind: str, variant: str, init: str, folder: Path) -> str:
    """✓, or "refused"; a check that fails raises."""
    if refusal(kind, variant, init) is not None:
        return "refused"
    for check in CHECKS.values():
        check(kind, variant, init, folder / f"{kind}-{variant}-{init}")
    return "✓"


def main() -> int:
    """Print both tables, and a last line that counts. The exit code is the number of failed pairs."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for title, pairs, axis in (("kind", KIND_PAIRS, 0), ("variant", VARIANT_PAIRS, 1)):
        print(f"\n| {title} | {' | '.join(NAMES)} |\n|---|{'---|' * len(NAMES)}")
        with tempfile.TemporaryDirectory() as folder:
            for row in dict.fromkeys(pair[axis] for pair in pairs):
                cells = []
                for pair in (pair for pair in pairs if pair[axis] == row):
                    try:
                        cells.append(cell(*pair, Path(folder)))
                    except Exception as error:
                        print(f"{pair}: {type(error).__name__}: {error}")
                        cells.append("FAILED")
                counts["passed"] += len(CHECKS) * cells.count("✓")
                counts.update(refused=cells.count("refused"), failed=cells.count("FAILED"))
                print(f"| {row} | {' | '.join(cells)} |", flush=True)
    print(f"{counts['passed']} passed, {counts['refused']} refused, {counts['failed']} failed")
    return counts["failed"]


if __name__ == "__main__":
    sys.exit(main())
