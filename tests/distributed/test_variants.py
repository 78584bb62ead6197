"""Every variant under every wrapper: trained and merged as in one process, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_lora import LoRAConfig, apply_lora
from tests.distributed.nets import CONFIG, Net, fill_adapters, make_net
from tests.distributed.wrappers import BOTH, check_merge, check_training, fsdp1, wrapped_and_adapted

VARIANTS = {name: replace(CONFIG, variant=name) for name in ("dora", "lora_fa", "adalora")}
VARIANTS["vera"] = replace(CONFIG, variant="vera", alpha=LoRAConfig().alpha)  # whose formula has no scaling
VARIANTS["pissa"] = replace(CONFIG, init="pissa")  # whose start is kept beside A and B
# These read the weight, which FSDP1 has flattened.
RUNS = [(variant, *run) for variant in VARIANTS for run in BOTH if variant not in ("dora", "pissa") or run != ("fsdp1", "after")]


def check(name: str, order: str, variant: str) -> dict[str, Any]:
    config = VARIANTS[variant]
    made = wrapped_and_adapted(name, order, config)
    trained = check_training(name, order, config, made)
    fill_adapters(made[0])  # those that the reference merges
    return trained | check_merge(name, order, config, made)


@pytest.mark.parametrize(("variant", "name", "order"), RUNS)
def test_trains_and_merges_as_one_process_does(pool: Any, variant: str, name: str, order: str) -> None:
    for result in pool.run(check, name, order, variant):
        assert result["gradient"] < 1e-6 and result["adapter"] < 2e-6, result
        assert result["difference"] < 1e-5 and result["exact"] < 1e-6 and result["back"], result


def check_checkpointed(name: str, variant: str, mode: str) -> dict[str, float]:
    Net.checkpointing = mode
    return check_training(name, "before", VARIANTS[variant])


@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_trains_as_one_process_does_under_checkpointing(pool: Any, variant: str, name: str, mode: str) -> None:
    """FSDP1 has plain tensors in place of parameters while a checkpoint's forward runs again."""
    for result in pool.run(check_checkpointed, name, variant, mode):
        assert result["gradient"] < 1e-6 and result["adapter"] < 2e-6, result


def refused(variant: str) -> str:
    model = fsdp1(make_net())
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"(variant='dora'|init='pissa')") as error:
        apply_lora(model, config=VARIANTS[variant])
    assert [type(module) for module in model.modules()] == classes and not any("lora_" in n for n, _ in model.named_parameters())
    return str(error.value)


@pytest.mark.parametrize("variant", ["dora", "pissa"])
def test_what_reads_the_weight_is_refused_after_fsdp1(pool: Any, variant: str) -> None:
    for message in pool.run(refused, variant):
        assert "'layers.0." in message and "apply LoRA before" in message
