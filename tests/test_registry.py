"""The tables that types and names are looked up in."""

import pytest
from torch import nn

from lightning_lora import LoRAConfig, find_targets, registry
from lightning_lora.layers import LoRALinear
from lightning_lora.layers.conv import LoRAConv
from lightning_lora.layers.embedding import LoRAEmbedding


class Sub(nn.Linear):
    pass


class SubSub(Sub):
    pass


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Linear(2, 2), LoRALinear),
        (SubSub(2, 2), LoRALinear),
        (nn.Embedding(2, 2), LoRAEmbedding),
        (nn.Conv1d(2, 2, 1), LoRAConv),
        (nn.Conv2d(2, 2, 1), LoRAConv),
        (nn.Conv3d(2, 2, 1), LoRAConv),
        (nn.LayerNorm(2), None),
        (nn.EmbeddingBag(2, 2), None),
        (nn.ConvTranspose1d(2, 2, 1), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_kind_of_walks_the_mro(module, kind):
    assert registry.kind_of(type(module)) is kind


def test_the_nearest_registered_type_wins(monkeypatch):
    monkeypatch.setattr(registry, "KINDS", dict(registry.KINDS))

    @registry.register_kind(Sub)
    class Special:
        pass

    assert registry.kind_of(SubSub) is Special
    assert registry.kind_of(nn.Linear) is LoRALinear


def test_a_kind_is_registered_by_name_without_importing_the_type(monkeypatch):
    monkeypatch.setattr(registry, "KINDS", dict(registry.KINDS))

    @registry.register_kind(f"{__name__}.Foreign")
    class Kind:
        pass

    class Foreign(nn.Module):
        __qualname__ = "Foreign"

    assert registry.kind_of(Foreign) is Kind


def test_the_message_for_an_unknown_type_lists_the_kinds():
    message = registry.why_refused(nn.LayerNorm(2), "layers.0.norm")
    assert message.startswith("'layers.0.norm' is a torch.nn.modules.normalization.LayerNorm, which LoRA cannot adapt")
    assert all(name in message for name in ("Linear", "Embedding", "Conv1D", "Conv1d", "Conv2d", "Conv3d"))


def test_look_up_lists_what_there_is():
    table = {"b": len, "a": 2}
    assert registry.look_up(table, "init", "b") is len
    with pytest.raises(ValueError, match=r"init='c' is not known; there are a, b\."):
        registry.look_up(table, "init", "c")


@pytest.mark.parametrize(
    ("table", "register", "taken", "free"),
    [
        ("INITS", registry.register_init, "kaiming", "mine"),
        ("VARIANTS", registry.register_variant, "dora", "mine"),
        ("KINDS", registry.register_kind, nn.Linear, Sub),
    ],
)
def test_a_name_is_registered_once(monkeypatch, table, register, taken, free):
    """Anew only as the same object; what is refused changes nothing, the names beside it included."""
    monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    before = dict(getattr(registry, table))

    class Mine:
        pass

    key = taken if isinstance(taken, str) else registry.qualified_name(taken)
    with pytest.raises(ValueError, match=f"'{key}' is registered already, as .*; choose another name"):
        register(taken)(Mine)
    assert getattr(registry, table) == before
    assert register(taken)(before[key]) is before[key]
    assert register(free)(Mine) is Mine and Mine in getattr(registry, table).values()


def test_a_kind_takes_all_its_types_or_none(monkeypatch):
    monkeypatch.setattr(registry, "KINDS", dict(registry.KINDS))
    with pytest.raises(ValueError, match="Linear' is registered already"):
        registry.register_kind(Sub, nn.Linear)(LoRAConv)
    assert registry.kind_of(Sub) is LoRALinear


@pytest.mark.parametrize(("types", "name"), [((nn.Linear,), "mine"), ((Sub,), "taken")])
def test_a_kind_takes_its_types_and_its_name_or_none(monkeypatch, types, name):
    monkeypatch.setattr(registry, "KINDS", dict(registry.KINDS))
    monkeypatch.setattr(registry, "KIND_NAMES", {"taken": LoRAConv})
    before = dict(registry.KINDS)
    with pytest.raises(ValueError, match="is registered already"):
        registry.register_kind(*types, name=name)(LoRAEmbedding)
    assert before == registry.KINDS and {"taken": LoRAConv} == registry.KIND_NAMES


def test_an_init_brings_its_check(monkeypatch):
    def check(module, spec, A, B):
        raise ValueError(f"{type(module).__name__}, rank {spec.rank}, {A}, {B}")

    def init(layer):
        raise AssertionError

    monkeypatch.setitem(registry.INITS, "mine", init)  # which is taken back
    assert registry.register_init("mine", check=check)(init) is init
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"'0' .*: Linear, rank 2, \(2, 4\), \(3, 2\)"):
        find_targets(model, LoRAConfig(target_modules=["0"], rank=2, init="mine"))
    assert registry.init_check("kaiming") is None
