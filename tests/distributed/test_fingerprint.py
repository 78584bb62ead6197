"""The base's fingerprint is that of one process under every wrapper, and no process gathers a weight for it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_lora import apply_lora, load_adapter, merge_lora, save_adapter, unmerge_lora
from lightning_lora.adapter_io.files import read_adapter
from lightning_lora.adapter_io.fingerprint import base_identity
from lightning_lora.utils.checksums import sampled_digest
from lightning_lora.utils.names import adapter_root
from tests.distributed.nets import CONFIG, fill_adapters, make_net
from tests.distributed.wrappers import WRAPPERS, fsdp1, wrapped_and_adapted


class Large(nn.Module):
    """Weights that are sampled, not read in full; sizes that no number of ranks divides. FSDP1 takes any memory format."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList()
        self.a, self.b, self.conv = nn.Linear(101, 67), nn.Linear(67, 3), nn.Conv2d(5, 49, 7)
        self.scalar = nn.Parameter(torch.randn(1))


def gathers(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("gathers a whole tensor")


def fingerprints(name: str, order: str) -> list[Any]:
    """Of a base that was wrapped, adapted, used, merged and unmerged."""
    base = WRAPPERS[name][0](make_net()) if order == "after" else None
    models = [] if base is None else [base]
    model = wrapped_and_adapted(name, order)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DTensor, "full_tensor", gathers)
        patch.setattr(FSDP, "summon_full_params", gathers)
        found = [base_identity(adapter_root(each)[1])["fingerprint"] for each in [*models, model]]
    for change in (merge_lora, unmerge_lora):
        found.append(base_identity(adapter_root(change(model))[1])["fingerprint"])
    return found


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["fsdp2", "fsdp2 used", "fsdp2 pulled", "fsdp1", "tp"])
def test_it_is_that_of_one_process(pool: Any, name: str, order: str) -> None:
    wanted = base_identity(make_net())["fingerprint"]
    for found in pool.run(fingerprints, name, order):
        assert found and set(found) == {wanted}


@pytest.mark.parametrize("name", ["2d", "fsdp1 hybrid"])
def test_on_a_mesh_of_two_dimensions(pool4: Any, name: str) -> None:
    assert {each for found in pool4.run(fingerprints, name, "after") for each in found} == {base_identity(make_net())["fingerprint"]}


def reductions(name: str) -> int:
    model, count, reduce = WRAPPERS[name][0](make_net()), [], dist.all_reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda tensor, *args, **kwargs: count.append(tensor) or reduce(tensor, *args, **kwargs))
        base_identity(model)
    return len(count)


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2", "tp"])
def test_it_takes_few_collectives(pool: Any, name: str) -> None:
    """One for all tensors over the same processes."""
    assert all(count == 1 for count in pool.run(reductions, name))


def large(name: str) -> str:
    model = WRAPPERS[name][0](Large()) if name != "fsdp1" else fsdp1(Large().to(memory_format=torch.channels_last), auto_wrap_policy=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DTensor, "full_tensor", gathers)
        patch.setattr(FSDP, "summon_full_params", gathers)
        return base_identity(model)["fingerprint"]


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
def test_of_large_and_odd_weights_too(pool: Any, name: str) -> None:
    assert set(pool.run(large, name)) == {base_identity(Large())["fingerprint"]}


def digests(placements: list[Any]) -> list[str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = [torch.arange(size * 31.0).view(size, 31) for size in (1, 3, 130)]
    return [sampled_digest(distribute_tensor(tensor, mesh, placements)) for tensor in tensors]


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
def test_however_a_tensor_is_cut(pool: Any, placement: Any) -> None:
    wanted = [sampled_digest(torch.arange(size * 31.0).view(size, 31)) for size in (1, 3, 130)]
    assert all(found == wanted for found in pool.run(digests, [placement]))


def saved(name: str, folder: str) -> dict[str, Any] | None:
    return read_adapter(save_adapter(wrapped_and_adapted(name, "before")[0], folder)).base


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
def test_a_saved_adapter_has_it(pool: Any, name: str, tmp_path: Any) -> None:
    """So its base is checked wherever it is loaded."""
    wanted = base_identity(make_net())
    assert all(found == wanted for found in pool.run(saved, name, str(tmp_path / "adapter")))
    load_adapter(make_net(), tmp_path / "adapter")
    other = make_net()
    nn.init.normal_(other.embed.weight)
    with pytest.raises(ValueError, match="was trained on another base"):
        load_adapter(other, tmp_path / "adapter")


def saved_inside(folder: str) -> tuple[Any, list[str]]:
    model = wrapped_and_adapted("fsdp1", "before")[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = save_adapter(model.module, folder)
    return read_adapter(path).base, [str(each.message) for each in caught if "fingerprint" in str(each.message)]


def test_one_saved_inside_a_unit_of_fsdp1_says_that_it_has_none(pool: Any, tmp_path: Any) -> None:
    for base, said in pool.run(saved_inside, str(tmp_path / "adapter")):
        assert base is None and len(said) == 1 and f"{tmp_path / 'adapter'}: Net is part of an FSDP1 unit" in said[0]
    other = make_net()
    nn.init.normal_(other.embed.weight)
    load_adapter(other, tmp_path / "adapter")


def test_the_reference_is_the_adapted_base_too() -> None:
    model = apply_lora(make_net(), config=CONFIG)
    fill_adapters(model)
    assert base_identity(model) == base_identity(make_net())
