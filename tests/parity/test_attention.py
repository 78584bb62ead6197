"""``nn.MultiheadAttention`` in PEFT's files, both ways.

PEFT 0.21 merges the output projection twice in each forward pass, so its update counts twice there. Our files have half of B, and B is
doubled when a file is read: the outputs are the same. If this test fails with a later PEFT, see ``factor_in_file``.
"""

import copy

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, load_adapter, save_adapter
from tests.conftest import fill

from .attends import Attends
from .models import close, randomise, theirs


def build():
    torch.manual_seed(0)
    return Attends().double().eval(), torch.randn(2, 3, 8, dtype=torch.float64)


def test_peft_reads_ours(tmp_path):
    plain, x = build()
    ours = fill(apply_lora(copy.deepcopy(plain), LoRAConfig(rank=2, target_modules=["attention", "fc"], bias="lora_only")))
    nn.init.normal_(ours.attention.in_proj_bias), nn.init.normal_(ours.attention.out_proj.bias)
    save_adapter(ours, tmp_path)
    other = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).double().eval()
    close(ours(x), other(x), 1e-6)  # the file has float32
    assert (ours(x) - plain(x)).abs().max() > 0.1
    close(load_adapter(copy.deepcopy(plain), tmp_path)(x), ours(x))
    other.save_pretrained(tmp_path / "back")
    names = {file: load_file(tmp_path / file / "adapter_model.safetensors").keys() for file in (".", "back")}
    assert names["."] - names["back"] == {"base_model.model.attention.base_layer.in_proj_bias"}  # PEFT trains out_proj's bias alone


def test_ours_reads_pefts(tmp_path):
    plain, x = build()
    other = theirs(copy.deepcopy(plain), target_modules=["attention"], r=2, lora_alpha=3).eval()
    randomise(other)
    for name, p in other.named_parameters():
        p.data.mul_(4 if "lora_" in name else 1)
    other.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(plain), tmp_path)
    close(ours(x), other(x), 1e-6)
    assert (ours(x) - plain(x)).abs().max() > 0.1


def test_a_kept_start_is_plain_lora_in_files(tmp_path):
    plain, x = build()
    ours = apply_lora(copy.deepcopy(plain), LoRAConfig(rank=2, target_modules=["attention", "fc"], init="pissa"))
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
    save_adapter(ours, tmp_path)
    close(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).double().eval()(x), ours(x), 1e-6)
    close(load_adapter(copy.deepcopy(plain), tmp_path)(x), ours(x), 1e-6)
