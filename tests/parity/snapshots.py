"""The whole of a model before and after a call that must change nothing."""

import torch
from torch import nn


def snapshot(model: nn.Module) -> dict[str, object]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    return {"state": state, "flags": flags, "types": {key: type(module) for key, module in model.named_modules()}}


def same_snapshot(before: dict, after: dict) -> None:
    assert before["flags"] == after["flags"]
    assert before["types"] == after["types"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
