"""An adapter folder against a model: what is honoured, which base it is for, what is never acted on."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    load_adapter,
    save_adapter,
)
from tests.faults.adapter_files import (
    OURS_A0,
    as_peft,
    edit_json,
)
from tests.faults.kit import CONFIG, IDS, Net, adapted, case, net, refused, row


@row(14)
def test_an_unknown_field_is_a_warning(folder: Path) -> None:
    as_peft(folder)
    edit_json(folder, colour="blue")
    model = net()
    with pytest.warns(UserWarning, match=r"adapter_config\.json: colour='blue' is not a field we know"):
        load_adapter(model, folder)
    assert torch.equal(model(IDS), adapted()(IDS))


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {"q_proj": 3}},
        {"alpha_pattern": {"v_proj": 1.0}},
        {"bias": "all"},
        {"modules_to_save": ["head"]},
        {"scaling": "rslora"},
    ],
    ids=lambda fields: next(iter(fields)),
)
@row(16)
def test_honoured(tmp_path: Path, fields: dict[str, Any]) -> None:
    """From PEFT's JSON alone, every one of these changes what is loaded."""
    source = adapted(LoRAConfig(**{**CONFIG.to_dict(), **fields}))
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    folder = save_adapter(source, tmp_path / "adapter")
    as_peft(folder)
    loaded = load_adapter(net(), folder)
    assert torch.equal(loaded(IDS), source(IDS))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {n for n, p in source.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "pefts"])
@row(17)
def test_an_adapter_for_another_shape(folder: Path, foreign: bool) -> None:
    if foreign:
        as_peft(folder)
    model = net(width=20)
    with refused(str(folder), OURS_A0, "(2, 12)", "(2, 20)", "another base", model=model, folder=folder):
        load_adapter(model, folder)


@row(21)
def test_the_flag_accepts_it(tmp_path: Path) -> None:
    model = adapted()
    nn.init.constant_(model.layers[0].q_proj.lora_A, math.nan)
    folder = save_adapter(model, tmp_path / "adapter")
    assert load_adapter(net(), folder, allow_nonfinite=True).layers[0].q_proj.lora_A.isnan().all()


def hashes(message: str) -> set[str]:
    return set(re.findall(r"\b[0-9a-f]{32}\b", message))


def scale_one_weight(model: Net) -> Net:
    """A new revision of the same base: one of its matrices was trained on."""
    with torch.no_grad():
        model.layers[1].v_proj.weight.mul_(1.05)
    return model


@pytest.mark.parametrize(
    "make", [case(22, "another_base", lambda: net(seed=1)), case(23, "another_revision", lambda: scale_one_weight(net()))]
)
def test_another_base(folder: Path, make: Callable[[], Net]) -> None:
    model = make()
    with pytest.raises(ValueError) as caught:
        load_adapter(model, folder)
    assert len(hashes(str(caught.value))) == 2, "both fingerprints"
    with refused(str(folder), "trained on another base", "Net", "check_base=False", model=model, folder=folder):
        load_adapter(model, folder)
    load_adapter(model, folder, check_base=False)
    assert torch.equal(model.layers[0].q_proj.lora_A, adapted().layers[0].q_proj.lora_A)


@row(22)
def test_the_same_base_in_another_dtype_is_the_same(folder: Path) -> None:
    load_adapter(net(dtype=torch.bfloat16), folder)


@pytest.mark.parametrize("field", ["auto_mapping", "megatron_core", "trust_remote_code"])
@row(29)
def test_fields_that_name_code_are_never_acted_on(folder: Path, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module by the name that the file gives would be found, and is not imported."""
    (folder.parent / "spy_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(folder.parent))
    as_peft(folder)
    edit_json(folder, **{field: {"base_model_class": "Net", "parent_library": "spy_module"} if field == "auto_mapping" else "spy_module"})
    model = net()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        load_adapter(model, folder)
    # PEFT writes auto_mapping into ordinary files: a warning for each of those would only teach people to ignore warnings.
    assert [field in str(w.message) and "never acted on" in str(w.message) for w in seen] == ([] if field == "auto_mapping" else [True])
    assert torch.equal(model(IDS), adapted()(IDS))


@row(30)
def test_no_such_folder(tmp_path: Path) -> None:
    model = net()
    with refused(str(tmp_path / "nowhere"), "no such adapter folder", model=model, folder=tmp_path):
        load_adapter(model, tmp_path / "nowhere")
