"""What happens when a private name of torch is gone: an error that says which, or the slower way; nothing wrong in silence."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from lightning_lora.utils import torch_private


def test_a_name_that_is_gone_is_told() -> None:
    with pytest.raises(RuntimeError, match=rf"torch {re.escape(torch.__version__)} has no torch\._C\._no_such\.name, which lightning_lora"):
        torch_private._name("_C._no_such.name")


def test_settings_that_this_torch_has_not_are_left_out() -> None:
    from torch._functorch import config as autograd

    with torch._dynamo.config.patch(recompile_limit=8):
        assert torch_private.change_dynamo(recompile_limit=9, no_such_setting=True) == {"recompile_limit": 8}
        assert torch._dynamo.config.recompile_limit == 9
    before = autograd.ban_recompute_used_far_apart
    with torch_private.autograd_settings(ban_recompute_used_far_apart=not before, no_such_setting=True):
        assert autograd.ban_recompute_used_far_apart is not before
    assert autograd.ban_recompute_used_far_apart is before


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
        torch_private.fsdp2_group(unit)


def test_what_ddp_ignores_already_is_kept() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    for names in (["1.bias"], ["0.weight", "1.bias"]):
        torch_private.ddp_ignores(model, names)
    assert model._ddp_params_and_buffers_to_ignore == ["1.bias", "0.weight"]
