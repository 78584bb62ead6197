"""Every variant under every wrapper: trained and merged as in one process, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_lora import LoRAConfig, apply_lora
from tests.distributed.nets import CONFIG, make_net
from tests.distributed.test_wrapping import BOTH, check_merge, check_training, fsdp1

VARIANTS = {name: replace(CONFIG, variant=name) for name in ("dora", "lora_fa", "adalora")}
VARIANTS["vera"] = replace(CONFIG, variant="vera", alpha=LoRAConfig().alpha)  # whose formula has no scaling
# DoRA needs norms of whole rows, and FSDP1 has flattened what it has wrapped.
RUNS = [(variant, *run) for variant in VARIANTS for run in BOTH if (variant, *run) != ("dora", "fsdp1", "after")]


def check(name: str, order: str, variant: str) -> dict[str, Any]:
    return check_training(name, order, VARIANTS[variant]) | check_merge(name, order, VARIANTS[variant])


@pytest.mark.parametrize(("variant", "name", "order"), RUNS)
def test_trains_and_merges_as_one_process_does(pool: Any, variant: str, name: str, order: str) -> None:
    for result in pool.run(check, name, order, variant):
        assert result["gradient"] < 1e-6 and result["adapter"] < 2e-6, result
        assert result["difference"] < 1e-5 and result["exact"] < 1e-6 and result["back"], result


def refused() -> str:
    model = fsdp1(make_net())
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="variant='dora'") as error:
        apply_lora(model, config=VARIANTS["dora"])
    assert [type(module) for module in model.modules()] == classes and not any("lora_" in n for n, _ in model.named_parameters())
    return str(error.value)


def test_dora_after_fsdp1_is_refused(pool: Any) -> None:
    for message in pool.run(refused):
        assert "'layers.0." in message and "apply LoRA before" in message
