"""Digests of what is proved to be the unchanged base."""

from __future__ import annotations

import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, merge_lora
from lightning_lora.strategies import digests
from lightning_lora.strategies.digests import Pass, digest


def test_a_pass_reads_what_is_shared_once(monkeypatch):
    read = []
    monkeypatch.setattr(digests, "checksum", lambda tensor, original=digests.checksum: read.append(tensor.data_ptr()) or original(tensor))
    plain, adapted = nn.Linear(4, 4), nn.Linear(4, 4)
    before = digest(plain, "weight", plain.weight)
    adapted.weight = plain.weight
    model = apply_lora(nn.Sequential(adapted), config=LoRAConfig(rank=2, target_modules=["0"]))
    read.clear()
    here = Pass()
    assert [here.digest(each, "weight", plain.weight) for each in (plain, model[0], plain)] == [before] * 3 and len(read) == 1
    other = nn.Parameter(torch.zeros(4, 4))
    assert here.digest(plain, "weight", other) == digest(plain, "weight", other) != before


def test_a_pass_looks_through_a_merge_of_one_owner_only():
    model = apply_lora(nn.Sequential(nn.Linear(4, 4)), config=LoRAConfig(rank=2, target_modules=["0"]))
    weight, plain = model[0].weight, nn.Linear(4, 4)
    before = digest(model[0], "weight", weight)
    nn.init.ones_(model[0].lora_B)
    merge_lora(model)
    plain.weight = weight
    here = Pass()
    assert here.digest(plain, "weight", weight) == digest(plain, "weight", weight) != before
    assert here.digest(model[0], "weight", weight) == before
