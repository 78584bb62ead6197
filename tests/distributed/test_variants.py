"""DoRA and LoRA-FA under every wrapper: trained and merged as in one process, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_lora import apply_lora
from tests.distributed.nets import CONFIG, make_net
from tests.distributed.test_wrapping import BOTH, check_merge, check_training, fsdp1, tensor_parallel

VARIANTS = {"dora": replace(CONFIG, variant="dora"), "lora_fa": replace(CONFIG, variant="lora_fa")}
# DoRA needs norms of whole rows: a tensor-parallel base has pieces of them, FSDP1 has flattened what it has wrapped.
RUNS = [(variant, *run) for variant in VARIANTS for run in BOTH if variant != "dora" or run not in [("fsdp1", "after"), ("tp", "after")]]


def check(name: str, order: str, variant: str) -> dict[str, Any]:
    return check_training(name, order, VARIANTS[variant]) | check_merge(name, order, VARIANTS[variant])


@pytest.mark.parametrize(("variant", "name", "order"), RUNS)
def test_trains_and_merges_as_one_process_does(pool: Any, variant: str, name: str, order: str) -> None:
    for result in pool.run(check, name, order, variant):
        assert result["gradient"] < 1e-6 and result["adapter"] < 2e-6, result
        assert result["difference"] < 1e-5 and result["exact"] < 1e-6 and result["back"], result


def refused(name: str) -> str:
    model = {"fsdp1": fsdp1, "tp": tensor_parallel}[name](make_net())
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="variant='dora'") as error:
        apply_lora(model, config=VARIANTS["dora"])
    assert [type(module) for module in model.modules()] == classes and not any("lora_" in n for n, _ in model.named_parameters())
    return str(error.value)


@pytest.mark.parametrize("name", ["fsdp1", "tp"])
def test_dora_after_wrapping_is_refused_where_rows_are_not_whole(pool: Any, name: str) -> None:
    for message in pool.run(refused, name):
        assert "'layers.0." in message and ("apply LoRA before" in message or "use variant='plain'" in message)
