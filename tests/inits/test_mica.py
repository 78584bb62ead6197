"""MiCA: B is the weight's left singular vectors of the smallest singular values, and stays."""

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.layers import lora_layers
from tests.inits.test_without_data import layer
from tests.lit import make_net


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_mica_takes_the_smallest_left_singular_vectors_and_freezes_them(kind):
    adapted = layer(kind, init="mica", rank=4)
    U, _, _ = torch.linalg.svd(adapted.to_matrix(adapted.weight).double(), full_matrices=False)
    torch.testing.assert_close(adapted.lora_B.double() @ adapted.lora_B.double().T, U[:, -4:] @ U[:, -4:].T, rtol=1e-4, atol=1e-5)
    assert not adapted.lora_A.any() and adapted.adds_nothing()
    assert (adapted.lora_A.requires_grad, adapted.lora_B.requires_grad) == (True, False)


def test_mica_on_a_base_that_comes_later():
    base = make_net()
    with torch.device("meta"):
        model = make_net()
    config = LoRAConfig(target_modules="all-linear", init="mica", rank=2, modules_to_save=[])
    apply_lora(model, config).to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model.load_state_dict(base.state_dict(), strict=False)
    for (_, mine), (_, wanted) in zip(lora_layers(model), lora_layers(apply_lora(base, config)), strict=True):
        torch.testing.assert_close(mine.lora_B @ mine.lora_B.T, wanted.lora_B @ wanted.lora_B.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "fields", "match"),
    [
        (nn.Linear(9, 3), {"rank": 4}, r"init='mica' with rank=4 is above min\(in, out\)=3"),
        (nn.Conv2d(4, 4, 3, groups=2), {"rank": 2}, "split into groups"),
        (nn.Embedding(9, 3, padding_idx=0), {"rank": 2}, "row of padding_idx=0"),
        (nn.Linear(9, 3), {"rank": 2, "variant": "lora_fa"}, "so nothing would train"),
    ],
)
def test_what_mica_refuses(module, fields, match):
    model = nn.Sequential(module)
    with pytest.raises(ValueError, match=match):
        apply_lora(model, LoRAConfig(target_modules=["0"], init="mica", **fields))
    assert not any(lora_layers(model)) and all(parameter.requires_grad for parameter in model.parameters())
