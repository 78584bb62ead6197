"""A field of PEFT's JSON that is of another type than PEFT writes is one line, and PEFT's own files have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_lora import LoRAConfig, load_adapter, save_adapter
from lightning_lora.adapter_io.files import CONFIG, TENSORS
from lightning_lora.adapter_io.peft_types import check_types
from tests.conftest import TinyModel, adapted, snapshot

WRONG: list[tuple[str, Any, str]] = [
    ("rank_pattern", ["q_proj"], "a mapping"),
    ("alpha_pattern", 3, "a mapping"),
    ("modules_to_save", 3, "a list of names"),
    ("modules_to_save", "head", "a list of names"),
    ("modules_to_save", [3], "a list of names"),
    ("layers_to_transform", 1.5, "a whole number or a list of them"),
    ("layers_to_transform", ["1"], "a whole number or a list of them"),
    ("layers_pattern", 1, "a name or a list of names"),
    ("target_modules", {"q_proj": 1}, "a name or a list of names"),
    ("target_modules", [1], "a name or a list of names"),
    ("exclude_modules", 1, "a name or a list of names"),
    ("lora_alpha", "16", "a number"),
    ("lora_alpha", True, "a number"),
    ("lora_dropout", [], "a number"),
    ("r", 1.5, "a whole number"),
    ("r", "8", "a whole number"),
    ("use_dora", "yes", "true or false"),
    ("use_rslora", 1, "true or false"),
    ("bias", ["none"], "a text"),
    ("peft_type", ["LORA"], "a text"),
    ("init_lora_weights", [1], "true, false or a name"),
    ("variant_options", [1], "a mapping"),
]


@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.parametrize(("name", "value", "what"), WRONG)
def test_another_type_is_refused_by_name(make: Any, tmp_path: Path, name: str, value: Any, what: str, theirs: bool) -> None:
    folder = save_adapter(adapted(make(TinyModel)), tmp_path / "adapter")
    if theirs:
        save_file(load_file(folder / TENSORS), folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), name: value}))
    model = make(TinyModel)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {name}=.* is not {what}\.$"):
        load_adapter(model, folder)
    assert snapshot(model) == before


def test_a_long_value_is_cut() -> None:
    with pytest.raises(ValueError, match=r"rank_pattern=.{60}… is not a mapping") as caught:
        check_types({"rank_pattern": ["x" * 1000]}, "f")
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(),
        peft.LoraConfig(target_modules=["a"], layers_to_transform=1, layers_pattern="layers", init_lora_weights="gaussian"),
        peft.LoraConfig(target_modules={"a", "b"}, exclude_modules=["c"], rank_pattern={"a": 3}, modules_to_save=["head"], use_dora=True),
        peft.VeraConfig(target_modules=["a"]),
    ],
)
def test_what_peft_writes_passes(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    check_types(json.loads((tmp_path / CONFIG).read_text()), "f")


def test_json_that_cannot_be_read_is_one_line(make: Any, tmp_path: Path) -> None:
    folder = save_adapter(adapted(make(TinyModel)), tmp_path / "adapter")
    file = folder / CONFIG
    for content in (b"[" * 100_000, b"\xff\xfe", b"", b"[1]", b'{"r": ' + b"9" * 5000 + b"}"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"adapter_config\.json (is not valid JSON|holds a list, not a JSON object)"):
            load_adapter(make(TinyModel), folder)
    file.unlink()
    file.mkdir()
    (file / "x").write_text("")
    save_file(load_file(folder / TENSORS), folder / TENSORS)
    with pytest.raises(ValueError, match=r"adapter_config\.json is a folder, not a file"):
        load_adapter(make(TinyModel), folder)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_other_kinds_of_numbers_are_refused(make: Any, tmp_path: Path, dtype: str) -> None:

    folder = save_adapter(adapted(make(TinyModel), target_modules=["q_proj"], modules_to_save=["lm_head"]), tmp_path / "adapter")
    for part in ("lora_A.weight", "lm_head.weight"):
        tensors = load_file(folder / TENSORS)
        name = next(name for name in tensors if name.endswith(part))
        save_file({**tensors, name: tensors[name].to(getattr(torch, dtype))}, tmp_path / "x")
        other = tmp_path / part
        other.mkdir()
        (other / CONFIG).write_text((folder / CONFIG).read_text())
        (tmp_path / "x").rename(other / TENSORS)
        with pytest.raises(ValueError, match=r"has (integer|boolean|complex) numbers \(torch\.\w+\), this model needs floating-point ones"):
            load_adapter(make(TinyModel), other)


def test_two_tensors_for_one_parameter_are_refused_unless_they_agree(make: Any, tmp_path: Path) -> None:
    folder = save_adapter(adapted(make(TinyModel)), tmp_path / "adapter")
    tensors = load_file(folder / TENSORS)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    for change in (0, 1):
        save_file({**tensors, name.removesuffix(".weight"): tensors[name] + change}, folder / TENSORS)
        if change:
            with pytest.raises(ValueError, match=r"two tensors for the parameter of \S+, with different values"):
                load_adapter(make(TinyModel), folder)
        else:
            load_adapter(make(TinyModel), folder)


def test_a_config_takes_names_only() -> None:
    for name in ("init", "variant"):
        with pytest.raises(ValueError, match=rf"{name}=\['x'\]: give a registered name"):
            LoRAConfig(**{name: ["x"]})
