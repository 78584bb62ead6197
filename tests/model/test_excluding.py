"""A module that is excluded around targets is refused, and the refusal says what to write."""

import re

import pytest

from lightning_lora import LoRAConfig, apply_lora
from tests.conftest import TinyModel
from tests.model.test_targeting import names


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "mlp"], "all-linear"])
@pytest.mark.parametrize("entry", ["attn", "layers.1.attn", r".*\.attn", "layers"])
def test_excluding_what_is_around_targets_is_refused_and_the_advice_does_it(make, targets, entry):
    """By its name a container excludes itself, which is no target: all in it would be adapted without a word."""
    model = make(TinyModel)
    inside = [name for name in names(model, target_modules=targets) if ".attn." in name or entry == "layers"]
    with pytest.raises(ValueError, match=r"exclude_modules: .* matches '.*', which is no target itself, and '.*' in it would be") as error:
        apply_lora(model, LoRAConfig(target_modules=targets, exclude_modules=[entry]))
    (advice,) = re.findall(r"write r'(.*)'\.$", str(error.value))
    inside = [name for name in inside if not entry.startswith("layers.1") or name.startswith("layers.1")]
    left = [name for name in names(model, target_modules=targets) if name not in inside]
    if left:
        assert names(model, target_modules=targets, exclude_modules=[advice], allow_unmatched=True) == left
    assert names(model, target_modules=targets, exclude_modules=[entry], allow_unmatched=True) != left
