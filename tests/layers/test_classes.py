"""An adapted layer's class: one for each base, kind and variant, in this order of precedence, whatever the base does at its making."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, LoRALinear, apply_lora
from lightning_lora.layers.classes import adapted_class, lora_class
from tests.conftest import fill, same_bits
from tests.layers.kinds import CASES


def test_classes_are_made_once_and_named_after_the_base():
    kind, base = LoRALinear, type(CASES["linear-subclass"].base())
    assert lora_class(base, kind, object) is lora_class(base, kind, object) is type(CASES["linear-subclass"].layer())
    assert lora_class(base, kind, object).__name__ == "LoRAOwnForward"
    assert lora_class(nn.Linear, kind, object) is LoRALinear


def test_a_variant_stands_before_the_kind():
    class Doubled:
        def lora_update(self, y, x):
            return super().lora_update(y, x) * 2

    cls = lora_class(nn.Linear, LoRALinear, Doubled)
    assert cls.__mro__.index(Doubled) < cls.__mro__.index(LoRALinear) < cls.__mro__.index(nn.Linear)


def test_an_adapted_class_is_found_from_the_base_and_from_itself():
    class OnTop(LoRALinear):
        """As FSDP2 puts a class of its own on top."""

    dora = adapted_class(nn.Linear, "dora")
    assert dora.__name__ == "DoRALinear"
    assert dora.lora_base is nn.Linear
    assert [adapted_class(cls, "dora") for cls in (LoRALinear, dora, OnTop)] == [dora] * 3
    assert adapted_class(dora, "plain") is LoRALinear
    assert adapted_class(nn.LayerNorm, "plain") is None


def test_a_base_that_checks_its_subclasses():
    class Strict(nn.Linear):
        def __init_subclass__(cls, name, **kwargs):
            raise TypeError("wants a name")

    model = apply_lora(nn.Sequential(Strict(4, 3)), config=LoRAConfig(rank=2, target_modules=["0"]))
    assert type(model[0]).__name__ == "LoRAStrict"


class Named(nn.Linear):
    def forward(self, hidden, label=None):
        self.label = label
        return super().forward(hidden)


@pytest.mark.parametrize("make", [lambda: Conv1D(6, 6), lambda: Named(6, 6)], ids=["Conv1D", "a subclass"])
@pytest.mark.parametrize("variant", ["plain", "dora", "vera"])
def test_the_input_has_the_name_that_the_base_gives_it(make, variant):
    model = nn.Sequential(make())
    fill(apply_lora(model, config=LoRAConfig(rank=2, target_modules=["0"], dropout=0.5, variant=variant)))
    layer, x, found = model[0], torch.randn(3, 6), []
    name = "x" if layer.lora_base is Conv1D else "hidden"
    more = {} if layer.lora_base is Conv1D else {"label": "a"}
    for args, kwargs in (((x,), more), ((), {name: x, **more}), ((), {"input": x, **more})):
        torch.manual_seed(0)
        found.append(layer(*args, **kwargs))
    assert same_bits(found[1], found[0]) and same_bits(found[2], found[0])
    with pytest.raises(TypeError, match="input"):
        layer()
    with pytest.raises(TypeError):
        layer(x, **{name: x})
