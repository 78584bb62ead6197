"""When the Triton kernels are used."""

from types import SimpleNamespace

import pytest
import torch

from lightning_lora.ops import backends


def gpu_tensor(rows=2048, features=4096, dtype=torch.bfloat16, index=0):
    """What `worth_kernels` asks a tensor on a GPU."""
    answers = {"numel": lambda: rows * features, "is_floating_point": lambda: True}
    return SimpleNamespace(is_cuda=True, dtype=dtype, shape=(rows, features), device=torch.device("cuda", index), **answers)


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(backends, "_RUNS", {0: True, 1: False})


def test_a_cpu_has_none():
    backends.look_at(torch.device("cpu"))
    assert not backends.worth_kernels(torch.ones(4096, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"rows": backends.FEW_ROWS - 1}, False),
        ({"rows": backends.FEW_ROWS}, True),
        ({"index": 1}, False),  # looked at, and does not run them
        ({"index": 2}, False),  # not looked at
    ],
)
def test_half_precision_and_enough_rows(device, options, expected):
    assert backends.worth_kernels(gpu_tensor(**options)) is expected


def test_autocast_decides_the_dtype(device):
    with torch.autocast("cuda", torch.bfloat16, enabled=False):
        assert not backends.worth_kernels(gpu_tensor(dtype=torch.float32))
    torch.set_autocast_enabled("cuda", True)
    try:
        assert backends.worth_kernels(gpu_tensor(dtype=torch.float32))
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize(
    ("why", "capability", "reason"),
    [(None, (9, 0), None), ("plain", (9, 0), "LIGHTNING_LORA_KERNELS=plain"), (None, (7, 5), "its compute capability is 7.5, under 8.0")],
)
def test_a_device_is_looked_at_once_and_what_is_missing_is_said(monkeypatch, caplog, why, capability, reason):
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "_RUNS", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setenv("LIGHTNING_LORA_KERNELS", why or "")
    for _ in range(2):
        backends.look_at(torch.device("cuda", 0))
    assert {0: reason is None} == backends._RUNS
    assert [record.message for record in caplog.records] == ([f"cuda:0 goes without the Triton kernels: {reason}."] if reason else [])


def test_a_compiler_keeps_small_inputs(device, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not backends.worth_kernels(gpu_tensor(rows=2048))
    assert backends.worth_kernels(gpu_tensor(rows=8192))
    with backends.recording():  # a recorded graph launches every kernel alike
        assert backends.worth_kernels(gpu_tensor(rows=2048)) and not backends.worth_kernels(gpu_tensor(rows=512))
    assert not backends.worth_kernels(gpu_tensor(rows=2048))
