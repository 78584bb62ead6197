"""Tensors that are computed when they are read: what stays deferred, what is computed, and how often."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_lora.utils.deferred import DeferredTensor

X = torch.arange(24.0).reshape(4, 6)


class Counted:
    def __init__(self, value: Tensor = X) -> None:
        self.value, self.count = value, 0

    def __call__(self) -> Tensor:
        self.count += 1
        return self.value


def deferred(compute: object = None) -> DeferredTensor:
    return DeferredTensor(torch.empty(4, 6, device="meta"), compute or Counted())  # type: ignore[arg-type]


CHAINS = {
    "detach": lambda x: x.detach(),
    "transpose": lambda x: x.t().contiguous(),
    "chunk": lambda x: torch.cat([piece.contiguous() for piece in x.chunk(3, dim=1)][::-1]),
    "split sizes": lambda x: torch.split(x, [1, 3])[1].contiguous(),
    "unbind": lambda x: torch.stack(x.unbind(0)[::-1]),
    "index": lambda x: x[...][1:3],
    "reshape": lambda x: x.reshape(2, 2, 6).transpose(0, 1).reshape(4, 6),
    "permute": lambda x: x.view(2, 2, 6).permute(2, 0, 1).flatten().contiguous(),
    "dtype": lambda x: x.to(torch.bfloat16).float() + 1,
    "pad": lambda x: nn.functional.pad(x, (0, 1)),
    "where": lambda x: torch.where(x > 3, x, torch.zeros(6)),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_operations_stay_deferred_and_give_the_same_values(chain: str) -> None:
    compute = Counted()
    result = CHAINS[chain](deferred(compute))
    assert type(result) is DeferredTensor and result.device.type == "meta" and compute.count == 0
    wanted = CHAINS[chain](X)
    assert (result.shape, result.dtype) == (wanted.shape, wanted.dtype)
    assert torch.equal(result.cpu(), wanted) and torch.equal(result.to("cpu"), wanted)


def test_what_needs_values_gets_them() -> None:
    assert deferred().sum().item() == X.sum() and torch.equal(deferred(), X) and float(deferred()[0, 1]) == 1
    target = torch.zeros(4, 6)
    target.copy_(deferred())
    assert torch.equal(target, X)
    assert torch.equal(pickle.loads(pickle.dumps(deferred())), X)


def test_a_piece_says_its_own_size() -> None:
    """Files are split by what the storage says."""
    assert [piece.untyped_storage().nbytes() for piece in deferred().chunk(4)] == [24] * 4


def test_it_is_read_only() -> None:
    before = X.clone()
    with pytest.raises(RuntimeError, match="would write to a tensor that is computed when it is read"):
        deferred().add_(1)
    with pytest.raises(RuntimeError, match="would write"):
        torch.add(torch.ones(4, 6), 1, out=deferred())
    assert torch.equal(X, before)


@pytest.mark.parametrize("wrong", [torch.zeros(6, 4), X.double()], ids=["shape", "dtype"])
def test_other_values_than_announced_are_refused(wrong: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"announced with \(4, 6\) and torch.float32"):
        deferred(Counted(wrong)).cpu()


def test_it_is_a_parameter_and_a_file(tmp_path: Path) -> None:
    layer, compute = nn.Linear(6, 4, bias=False), Counted()
    layer.weight = nn.Parameter(deferred(compute), requires_grad=False)
    assert layer.state_dict()["weight"].shape == (4, 6) and compute.count == 0
    safetensors.torch.save_file({"weight": layer.state_dict()["weight"]}, tmp_path / "x.safetensors")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "x.safetensors")["weight"], X) and compute.count == 1
