"""The list of the family's members: complete, and each of them a config that the package takes."""

from __future__ import annotations

from benchmarks.quality.family import MEMBERS
from benchmarks.quality.methods import METHODS
from lightning_lora import LoRAConfig
from lightning_lora.optim.preconditioning import METHODS as PRECONDITIONERS
from lightning_lora.quantization.quantizers import QUANTIZERS
from lightning_lora.registry import INITS, VARIANTS, init_of
from tests.quality.made_up import everything


def test_every_variant_init_quantizer_and_preconditioner_is_a_member() -> None:
    """A new one that is not listed fails here: add it to MEMBERS."""
    configs = [member.cell.config for member in MEMBERS]
    used = [LoRAConfig(**config["lora"]) for config in configs if "lora" in config]
    assert {config.variant for config in used} == VARIANTS.keys()
    assert {config.init for config in used} == {name.replace("[n]", "4") for name in INITS}
    assert {config.scaling for config in used} == {"standard", "rslora"}
    assert {config.get("callback", {}).get("quantize") for config in configs} - {None} == QUANTIZERS.keys()
    assert {config.get("callback", {}).get("precondition") for config in configs} - {None} == PRECONDITIONERS.keys()


def test_members_are_told_apart() -> None:
    assert len({member.name for member in MEMBERS}) == len(MEMBERS)
    assert len({member.cell.trial(seed=0, lr=1.0).key for member in MEMBERS}) == len(MEMBERS)
    for member in MEMBERS:
        assert member.method in METHODS and member.like in (None, *(other.name for other in MEMBERS if other.like is None))
        if member.group != "full":
            init_of(member.cell.config["lora"].get("init", "kaiming"))


def test_a_member_takes_the_rate_of_the_one_it_is_like() -> None:
    tested = [each for each in everything() if each["study"] == "family" and each["test"]]
    rates = {each["config"]["member"]: each["lr"] for each in tested}
    assert len(tested) == 3 * len(MEMBERS)
    assert all(rates[member.name] == rates[member.like or member.name] for member in MEMBERS)
    assert rates["LoRA"] == 1.5e-3 and rates["full fine-tuning"] == 7.5e-4  # made-up records are best at 1e-3
