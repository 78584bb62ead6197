"""``save_adapter`` and ``load_adapter`` through what wraps a model: the files are the bare model's."""

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_lora import find_targets, load_adapter, save_adapter
from lightning_lora.adapter_io.files import CONFIG, read_adapter
from lightning_lora.config import LoRAConfig
from tests.conftest import ALL, Task, TinyModel, adapted, same_bits

WRAPPERS = {
    "dataparallel": nn.DataParallel,
    "averaged": AveragedModel,
    "fabric": lambda model: Fabric(accelerator="cpu", devices=1).setup(model),
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "task": Task,
    "fabric-task": lambda model: Fabric(accelerator="cpu", devices=1).setup(Task(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_the_same_files(make, ids, tmp_path, wrap):
    model = adapted(make(TinyModel), **ALL)
    bare, through = save_adapter(model, tmp_path / "bare"), save_adapter(wrap(model), tmp_path / "through")
    assert (bare / CONFIG).read_bytes() == (through / CONFIG).read_bytes()
    one, other = read_adapter(bare), read_adapter(through)
    assert one.meta() == other.meta() and one.tensors.keys() == other.tensors.keys()
    assert all(same_bits(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    other = make(TinyModel)
    load_adapter(wrap(other), bare)
    if wrap is not AveragedModel:  # which has a copy
        assert same_bits(other(ids), model(ids))


def test_a_model_that_fabric_set_up_is_adapted_by_its_own_names(make):
    model = Fabric(accelerator="cpu", devices=1).setup(make(TinyModel))
    names = [target.fqn for target in find_targets(model, LoRAConfig(target_modules=["layers.0.attn.q_proj"])).targets]
    assert names == ["layers.0.attn.q_proj"]
