"""What happens when a private name of torch is gone: an error that says which, or the slower way; nothing wrong in silence."""

from __future__ import annotations

import re

import pytest
import torch

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
