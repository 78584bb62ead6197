"""Names without what compilers and checkpoint wrappers put into them, and what adapter files are relative to."""

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from lightning_lora import get_lora_parameters
from lightning_lora.utils.blocks import repeated_blocks
from lightning_lora.utils.names import adapter_root, bare, clean_name, modules_by_name, persistent_buffers, second_names
from tests.conftest import Task, TinyModel


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("model.layers.0.q", "model.layers.0.q"),
        ("_orig_mod.layers.0.q", "layers.0.q"),
        ("layers.0._orig_mod._checkpoint_wrapped_module.q", "layers.0.q"),
        ("_fsdp_wrapped_module._fsdp_wrapped_module.q", "q"),
        ("my_orig_mod.q", "my_orig_mod.q"),
        ("_orig_mod", ""),
        ("", ""),
    ],
)
def test_clean_name(name, clean):
    assert clean_name(name) == clean


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), checkpoint_wrapper], ids=["compile", "checkpoint"])
def test_modules_by_name_finds_the_module_inside_the_wrapper(make, wrap):
    model = make(TinyModel)
    plain, inner = list(modules_by_name(model)), model.layers[0]
    model.layers[0] = wrap(inner)
    assert sorted(modules_by_name(model)) == sorted(plain)
    assert modules_by_name(model)["layers.0"] is inner
    assert modules_by_name(wrap(make(TinyModel))).keys() == set(plain)


def test_both_names_of_a_shared_module():
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    model["b"] = model["a"]
    assert list(modules_by_name(model)) == ["a", "b"]


def test_adapter_root_of_a_task_is_its_only_child_with_parameters(make):
    model = make(TinyModel)
    assert adapter_root(model) == ("", model)
    task = Task(model)
    assert adapter_root(task) == ("model", model)
    task.metric = nn.ReLU()
    assert adapter_root(task) == ("model", model)
    task.second = nn.Linear(2, 2)
    assert adapter_root(task) == ("", task)
    owner = Task(model)
    owner.scale = nn.Parameter(torch.ones(1))
    assert adapter_root(owner) == ("", owner)


@pytest.mark.parametrize(
    "wrap", [lambda module: module, lambda module: checkpoint_wrapper(module), lambda module: torch.compile(module, backend="eager")]
)
def test_adapter_root_of_a_task_with_one_layer_is_the_task(make, wrap):
    """Inside the layer no name would be left for it."""

    class Activated(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.act = nn.ReLU()

    for layer in (nn.Linear(2, 2), Activated()):
        task = Task(wrap(layer))
        assert adapter_root(task) == ("", task)
    name, root = adapter_root(Task(wrap(make(TinyModel))))
    assert name == "model" and root is not None


WRAPPERS = {
    "dataparallel": nn.DataParallel,
    "averaged": AveragedModel,
    "fabric": lambda model: fabric().setup(model),
    "fabric-compiled": lambda model: fabric().setup(torch.compile(model, backend="eager")),
    "compiled-dataparallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "averaged-dataparallel": lambda model: AveragedModel(nn.DataParallel(model)),
}


def fabric():
    return Fabric(accelerator="cpu", devices=1)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_adapter_root_is_what_a_wrapper_wraps(make, wrap):
    for model, name in ((make(TinyModel), ""), (Task(make(TinyModel)), "model")):
        prefix, root = adapter_root(wrap(model))
        assert modules_by_name(root).keys() == modules_by_name(make(TinyModel)).keys()
        assert prefix.replace("module", "").strip(".") == name
        assert f"{prefix}.embed.weight".strip(".") in map(clean_name, wrap(model).state_dict())


def test_bare_is_the_module_inside(make):
    model = make(TinyModel)
    assert bare(model) is model
    assert bare(torch.compile(checkpoint_wrapper(model), backend="eager")) is model
    assert bare(fabric().setup(model)) is model


def test_modules_that_fabric_set_up_keep_their_names(make):
    assert modules_by_name(fabric().setup(make(TinyModel))).keys() == modules_by_name(make(TinyModel)).keys()


def test_second_names_are_those_of_shared_modules():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    model["b"] = nn.Sequential(model["a"])
    assert second_names(model) == {"a": "b.0"}


def test_persistent_buffers_leave_the_others_out():
    module = nn.Module()
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("derived", torch.ones(1), persistent=False)
    assert list(persistent_buffers(module)) == ["kept"]


@pytest.mark.parametrize("model", ["owner/model", None, {"a": 1}, nn.Linear, [nn.Linear(1, 1)]], ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("call", [adapter_root, modules_by_name, repeated_blocks, get_lora_parameters], ids=lambda call: call.__name__)
def test_what_is_no_model_is_refused(call, model):
    with pytest.raises(ValueError, match=r"^model=.*: give a torch.nn.Module"):
        call(model)
