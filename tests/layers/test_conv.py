"""Convolutions: shapes by group, the update is itself a convolution, PEFT's ungrouped A and back."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora import LoRAConfig
from lightning_lora.layers.adapting import adapt
from lightning_lora.layers.conv import LoRAConv
from lightning_lora.layers.spec import LayerSpec
from tests.conftest import fill, same_bits
from tests.layers.kinds import CASES


def grouped(groups=2, rank=4, cls=nn.Conv2d):
    torch.manual_seed(0)
    return fill(adapt(cls(4 * groups, 6 * groups, 3, groups=groups, padding=1), LayerSpec(LoRAConfig(), rank, 8.0)))


@pytest.mark.parametrize(("cls", "kernel"), [(nn.Conv1d, (3,)), (nn.Conv2d, (3, 3)), (nn.Conv3d, (3, 3, 3))])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_shapes(cls, kernel, groups):
    layer = grouped(groups, 4, cls)
    assert layer.lora_A.shape == (4, 4, *kernel)
    assert layer.lora_B.shape == (6 * groups, 4 // groups, *(1 for _ in kernel))
    assert layer.lora_delta().shape == layer.weight.shape


@pytest.mark.parametrize("groups", [1, 2])
def test_the_update_is_a_convolution_with_the_merged_kernel(groups):
    layer = grouped(groups).double()
    x = torch.randn(2, 4 * groups, 5, 5, dtype=torch.float64)
    merged = F.conv2d(x, layer.weight + layer.lora_delta(), layer.bias, padding=1, groups=groups)
    torch.testing.assert_close(layer(x), merged)


def test_groups_do_not_mix():
    layer, x = grouped(2), torch.randn(1, 8, 5, 5)
    changed = x.clone()
    changed[:, 4:] += 1  # the second group's input
    assert torch.equal(layer(x)[:, :6], layer(changed)[:, :6])
    assert not torch.equal(layer(x)[:, 6:], layer(changed)[:, 6:])


@pytest.mark.parametrize("shape", [(4, 9), (3, 4, 9)], ids=["unbatched", "batched"])
def test_unbatched_input(shape):
    layer = fill(adapt(nn.Conv1d(4, 6, 3), LayerSpec(LoRAConfig(), 4, 8.0)))
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), F.conv1d(x, layer.weight + layer.lora_delta(), layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_weights_merge_and_come_back(dtype):
    layer = grouped(1).to(dtype).to(memory_format=torch.channels_last)
    assert not layer.weight.is_contiguous()
    base = layer.weight.detach().clone()
    x = torch.randn(2, 4, 5, 5).to(dtype, memory_format=torch.channels_last)
    unmerged = layer(x)
    layer.merge_weights()
    torch.testing.assert_close(layer(x), unmerged, rtol=0.02, atol=0.05)
    layer.unmerge_weights()
    assert same_bits(layer.weight, base)
    assert layer.weight.stride() == base.stride()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_pefts_shape_and_back(groups):
    layer = grouped(groups)
    tensors = layer.to_peft()
    A, B = tensors["lora_A.weight"], tensors["lora_B.weight"]
    assert A.shape == (4, 4 * groups, 3, 3)
    assert same_bits(LoRAConv.from_peft(layer, "lora_A", A, layer.spec), layer.lora_A)
    assert same_bits(B, layer.lora_B)
    # PEFT runs A without groups and B with them: the same update.
    x = torch.randn(2, 4 * groups, 5, 5)
    theirs = F.conv2d(F.conv2d(x, A, padding=1), B, groups=groups) * layer.scaling
    base = F.conv2d(x, layer.weight, layer.bias, padding=1, groups=groups)
    torch.testing.assert_close(layer(x), base + theirs, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_mixes_the_groups_is_refused():
    layer = grouped(2)
    with pytest.raises(ValueError, match=r"groups=2 mixes the groups, as PEFT's do"):
        LoRAConv.from_peft(layer, "lora_A", torch.ones(4, 8, 3, 3), layer.spec)


@pytest.mark.parametrize("shape", [(4, 4, 3, 3), (3, 8, 3, 3), (4, 5, 3, 3)])
def test_another_shape_passes_through_for_the_caller_to_judge(shape):
    A = torch.ones(shape)
    layer = grouped(2)
    assert LoRAConv.from_peft(layer, "lora_A", A, layer.spec) is A


def test_half_precision_activations_stay_half():
    case = CASES["conv2d"]
    layer, saved = case.layer(torch.bfloat16), []
    x = case.x(torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert not any(t.dtype == torch.float32 and t.shape[0] == 2 for t in saved)
