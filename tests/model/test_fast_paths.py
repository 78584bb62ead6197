"""torch's encoder layers have a path for evaluation that calls no linear: an adapter inside keeps it off."""

import copy

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, merge_lora, unload_lora
from lightning_lora.model.fast_paths import keep_off
from tests.conftest import fill

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
TARGETS = [["linear1"], ["linear2"], ["self_attn"], "all-linear"]


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2)).eval()


def padded(model, x):
    """With a padding mask torch's encoder packs its input first."""
    mask = torch.tensor([[False, False, True], [False, True, True]])
    return model[0](x, src_key_padding_mask=mask)[~mask]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_adapters_act_in_evaluation(targets, mode):
    plain, x = encoder(), torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))
    model = fill(apply_lora(copy.deepcopy(plain), LoRAConfig(rank=2, target_modules=targets)))
    merged = unload_lora(merge_lora(copy.deepcopy(model)), merged="keep")
    close = {"atol": 1e-4, "rtol": 1e-4}  # float32, since the path takes no float64; the adapters' effect is a thousand times that
    with mode():
        torch.testing.assert_close(model(x), merged(x), **close)
        torch.testing.assert_close(padded(model, x), padded(merged, x), **close)
        assert (model(x) - plain(x)).abs().max() > 0.1


def test_the_paths_are_back_after_unloading():
    model = encoder()
    before = [module.__dict__.copy() for module in model.modules()]
    apply_lora(model, LoRAConfig(rank=2, target_modules=[r".*layers\.1\.linear1"]))
    encoder_, first, second = model[0], *model[0].layers
    assert (encoder_.use_nested_tensor, first.activation_relu_or_gelu, second.activation_relu_or_gelu) == (False, 1, 0)
    keep_off(model)
    unload_lora(model)
    for module, own in zip(model.modules(), before, strict=True):
        assert module.__dict__.keys() == own.keys()
    assert (encoder_.use_nested_tensor, second.activation_relu_or_gelu) == (True, 1)


def test_a_subclass_with_a_read_of_its_own_is_still_found():
    class Reads(nn.TransformerEncoderLayer):
        def forward(self, src, *args, **kwargs):
            return super().forward(src * self.linear1.weight.mean(), *args, **kwargs)

    with pytest.raises(ValueError, match=r"'0.linear1' .*Reads.forward reads its weight"):
        apply_lora(nn.Sequential(Reads(8, 2, 16)), LoRAConfig(rank=2, target_modules=["linear1"]))
