"""``disabled_lora`` on a wrapped model: what the wrapped base computes, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_lora import disabled_lora
from lightning_lora.utils.sharding import full_tensor
from tests.distributed.nets import make_net
from tests.distributed.wrappers import WRAPPERS, wrapped_and_adapted


def outputs(name: str, order: str, x: torch.Tensor) -> tuple[bool, bool]:
    """Whether it is the base within the block, and something else after it."""
    model = wrapped_and_adapted(name, order)[0]
    base = full_tensor(WRAPPERS[name][0](make_net())(x))
    with disabled_lora(model):
        off = full_tensor(model(x))
    return torch.equal(off, base), torch.equal(full_tensor(model(x)), base)


@pytest.mark.parametrize(("name", "order"), [("ddp", "before"), *((n, o) for n in ("fsdp1", "fsdp2", "tp") for o in ("before", "after"))])
def test_a_wrapped_model_is_its_wrapped_base(pool: Any, name: str, order: str) -> None:
    assert pool.run(outputs, name, order, torch.randn(3, 8, generator=torch.Generator().manual_seed(2))) == [(True, False)] * 2
