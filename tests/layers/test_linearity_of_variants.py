"""A variant that merges more than a sum with the weight is tried itself: it may be wrong where a plain adapter is right."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, find_targets, merge_lora
from lightning_lora.layers.linearity import why_not_linear
from tests.conftest import snapshot
from tests.layers.test_linearity import linear, product


def test_variants_that_merge_more_than_a_sum():
    """DoRA scales all that the base returns, and the adapter's bias goes into the layer's: forwards that add more are refused."""
    forwards = {
        "the product": lambda self, x: product(self, x),
        "a residual": lambda self, x: product(self, x) + x[..., :3],
        "the bias twice": lambda self, x: product(self, x) + self.bias,
        "the bias left out": lambda self, x: F.linear(x, self.weight),
    }
    x = torch.randn(2, 4, dtype=torch.float64)
    for variant, right in {"plain": 4, "vera": 4, "dora": 1, "lora_bias": 2}.items():
        config = LoRAConfig(rank=2, target_modules=["l"], variant=variant)
        for index, (name, forward) in enumerate(forwards.items()):
            cls = linear(forward)
            reason = why_not_linear(cls(4, 3), None, variant)
            assert (reason is None) is (index < right), (variant, name)
            model = nn.ModuleDict({"l": cls(4, 3, dtype=torch.float64)})
            if reason is not None:
                before = snapshot(model)
                with pytest.raises(ValueError, match=rf"'l' .*adds something of its own, and variant='{variant}'.*'plain' would be right"):
                    apply_lora(model, config)
                assert snapshot(model) == before
                continue
            layer = apply_lora(model, config)["l"]
            for factor in layer.lora_parameters().values():
                nn.init.normal_(factor)
            y = layer(x)
            torch.testing.assert_close(merge_lora(model)["l"](x), y)
    assert why_not_linear(linear(forwards["the bias left out"])(4, 3, bias=False), None, "lora_bias") is None  # it never merges
    every = nn.ModuleDict({"a": nn.Linear(40, 30), "b": linear(forwards["a residual"])(4, 3)})
    assert [target.fqn for target in find_targets(every, LoRAConfig(rank=2, target_modules="all-linear", variant="dora")).targets] == ["a"]
