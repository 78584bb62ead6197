"""Which base an adapter belongs to: the same however it is loaded, wrapped, adapted or merged; another for other weights."""

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_lora import LoRAConfig, apply_lora, merge_lora, unload_lora, unmerge_lora
from lightning_lora.adapter_io.fingerprint import base_identity, check_base
from tests.conftest import ALL, TinyModel, adapted


def fingerprint(model, exclude=()):
    return base_identity(model, exclude)["fingerprint"]


@pytest.fixture
def base(make):
    return fingerprint(make(TinyModel))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m,
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.bfloat16().float(),
        lambda m: m.requires_grad_(False).eval(),
        lambda m: apply_lora(m),
        lambda m: adapted(m, **ALL),
        lambda m: merge_lora(adapted(m, **ALL)),
        lambda m: merge_lora(adapted(m.bfloat16(), **ALL)),
        lambda m: merge_lora(adapted(m, **ALL), reversible=False),
        lambda m: unmerge_lora(merge_lora(adapted(m, **ALL))),
        lambda m: unload_lora(unmerge_lora(merge_lora(adapted(m, **ALL)))),
        lambda m: torch.compile(m, backend="eager"),
        lambda m: (m.layers.__setitem__(0, torch.compile(m.layers[0], backend="eager")), m)[1],
        lambda m: (m.layers.__setitem__(1, checkpoint_wrapper(m.layers[1])), m)[1],
    ],
    ids=[
        "same", "bf16", "fp64", "bf16-fp32", "frozen", "fresh-adapter", "adapter", "merged", "merged-bf16", "merged-for-good", "unmerged",
        "unloaded", "compiled", "compiled-block", "checkpointed-block",
    ],
)  # fmt: skip
def test_the_same_base(make, base, change):
    assert fingerprint(change(make(TinyModel))) == base


@pytest.mark.parametrize(
    "change",
    [
        lambda m: TinyModel(),  # other weights
        lambda m: TinyModel(vocab=12),
        lambda m: (m.embed.weight.data.mul_(1.1), m)[1],
        lambda m: (m.layers[1].mlp.bias.data.add_(0.1), m)[1],
        lambda m: (m.layers.__delitem__(1), m)[1],
        lambda m: (m.__setattr__("extra", torch.nn.Linear(1, 1)), m)[1],
        lambda m: unload_lora(merge_lora(adapted(m, **ALL)), merged="keep"),  # the merge has become the base
    ],
    ids=["seed", "shape", "embedding", "bias", "shorter", "longer", "merged-unloaded"],
)
def test_another_base(make, base, change):
    torch.manual_seed(99)
    assert fingerprint(change(make(TinyModel))) != base


def test_swapped_layers_are_another_base(make, base):
    model = make(TinyModel)
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]
    assert fingerprint(model) != base


def test_what_was_trained_is_no_part_of_the_base(make):
    model, other = make(TinyModel), make(TinyModel)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert fingerprint(model) != fingerprint(other)
    assert fingerprint(model, {"lm_head.weight"}) == fingerprint(other, {"lm_head.weight"})


def test_identity_names_class_and_config(make):
    model = make(TinyModel)
    assert {k: v for k, v in base_identity(model).items() if k != "fingerprint"} == {"class": "TinyModel", "name": ""}
    model.config = type("Config", (), {"_name_or_path": "", "model_type": "tiny"})()
    assert base_identity(model)["name"] == "tiny"
    model.config._name_or_path = "org/tiny-1b"
    assert base_identity(model)["name"] == "org/tiny-1b"
    assert all(isinstance(value, str) for value in base_identity(model).values())


def test_check_base_says_both_and_the_way_out(make):
    torch.manual_seed(99)
    saved = base_identity(TinyModel())
    model = apply_lora(make(TinyModel), config=LoRAConfig())
    with pytest.raises(ValueError) as error:
        check_base(base_identity(model), saved, "adapters/a")
    message = str(error.value)
    for part in ("adapters/a was trained on another base", saved["fingerprint"], fingerprint(model), "check_base=False"):
        assert part in message
    check_base(base_identity(model), base_identity(make(TinyModel)), "adapters/a")
