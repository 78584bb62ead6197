"""What happens when a private name of torch's wrappers is gone, and what they keep."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_lora.utils import torch_private_parallel


class Several(nn.Module):
    """A unit of FSDP2 over several meshes: torch 2.13 has no single group in it."""

    def _get_fsdp_state(self) -> Several:
        return self

    @property
    def _fsdp_param_group(self) -> None:
        raise AssertionError("Expected at most 1 param group for backward compatibility")


@pytest.mark.parametrize("unit", [Several(), nn.Linear(1, 1)], ids=["several", "elsewhere"])
def test_a_group_of_fsdp2_that_is_not_there_is_told(unit: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"no single parameter group in {type(unit).__name__}, .* a model that is not wrapped"):
        torch_private_parallel.fsdp2_group(unit)


def test_what_ddp_ignores_already_is_kept() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    for names in (["1.bias"], ["0.weight", "1.bias"]):
        torch_private_parallel.ddp_ignores(model, names)
    assert model._ddp_params_and_buffers_to_ignore == ["1.bias", "0.weight"]
