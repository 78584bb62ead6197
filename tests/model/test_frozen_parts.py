"""Targets in a part that the user froze as a whole beside targets that train: refused, with the two ways to say what is meant."""

import re

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, find_targets, quantize_base, unload_lora
from tests.conftest import TinyModel


def net():
    return nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})


def frozen(module):
    return module.requires_grad_(False)


BOTH = LoRAConfig(rank=2)
EVERYTHING = LoRAConfig(rank=2, target_modules="all-linear")


def half_of_the_blocks():
    model = TinyModel()
    model.layers[0].requires_grad_(False)
    return model


def frozen_but_for_norms():
    model = nn.ModuleDict({"a": net(), "b": net()})
    for part in model.values():
        part.q_proj.requires_grad_(False)
        part.v_proj.requires_grad_(False)
    return model


def packed():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.ModuleDict({"q_proj": nn.Linear(64, 64)}), "q_proj": nn.Linear(64, 64)})
    quantize_base(model["a"], "nf4")
    return model


def vision_language():
    model = nn.ModuleDict({"model": nn.ModuleDict({"vision": frozen(net()), "language": net()}), "lm_head": nn.Linear(4, 4)})
    return model


MIXED = {
    "a teacher": (lambda: nn.ModuleDict({"student": net(), "teacher": frozen(net())}), BOTH, "student", "teacher"),
    "a perceptual loss": (lambda: nn.ModuleDict({"loss": frozen(net()), "unet": net()}), BOTH, "unet", "loss"),
    "deeper": (lambda: nn.ModuleDict({"nets": nn.ModuleDict({"ema": frozen(net()), "net": net()})}), BOTH, "nets.net", "nets.ema"),
    "a vision tower": (vision_language, BOTH, "model.language", "model.vision"),
    "a new head": (lambda: nn.ModuleDict({"backbone": frozen(net()), "head": nn.Linear(4, 2)}), EVERYTHING, "head", "backbone"),
}
ALIKE = {
    "frozen altogether": (lambda: frozen(nn.ModuleDict({"a": net(), "b": net()})), BOTH),
    "the frozen part alone is hit": (lambda: nn.ModuleDict({"backbone": frozen(net()), "head": nn.Linear(4, 2)}), BOTH),
    "one part": (lambda: frozen(net()), BOTH),
    "blocks": (half_of_the_blocks, BOTH),
    "layers": (frozen_but_for_norms, BOTH),
    "packed": (packed, LoRAConfig(rank=2, target_modules=["q_proj"])),
    "excluded": (MIXED["a teacher"][0], LoRAConfig(rank=2, exclude_modules=[r"teacher\..*"])),
}


@pytest.mark.parametrize("name", MIXED)
def test_refused(name):
    build, config, trains, kept = MIXED[name]
    model = build()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError) as error:
        apply_lora(model, config)
    message = str(error.value)
    assert f"in {kept!r}, which is frozen as a whole" in message and f"LoRACallback(module={trains!r})" in message
    assert [p.requires_grad for p in model.parameters()] == flags
    (advice,) = re.findall(r"exclude_modules=\[r'(.*?)'\]", message)
    found = find_targets(model, LoRAConfig(rank=2, target_modules=config.target_modules, exclude_modules=[advice]))
    assert all(target.fqn.startswith(trains) for target in found.targets)


@pytest.mark.parametrize("name", ALIKE)
def test_not_refused(name):
    build, config = ALIKE[name]
    model = build()
    apply_lora(model, config)
    apply_lora(model, config)  # asked again, with adapters that train
    apply_lora(unload_lora(model), config)
