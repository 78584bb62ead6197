"""An adapter folder that cannot be read, or does not fit the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_lora import (
    load_adapter,
    merge_lora,
)
from tests.faults.adapter_files import (
    A0,
    FILE,
    HEAD,
    JSON,
    OURS_A0,
    as_peft,
    cut_header,
    edit_json,
    only_a_pickle,
    peft,
    remove,
    shrink,
    tensors,
    truncate,
)
from tests.faults.kit import adapted, case, net, refused

BAD_FOLDERS = [
    case(16, "use_dora", peft(use_dora=True), ("missing", "layers.0.q_proj.lora_magnitude_vector")),
    case(18, "variant_of_another_save", lambda f: edit_json(f, use_dora=True), (JSON, "'dora'", "'plain'", "two different saves")),
    case(14, "lora_bias", peft(lora_bias=True), ("4 tensors are missing", "layers.0.q_proj.lora_B_bias")),
    case(14, "replication", peft(layer_replication=[[0, 2]]), (JSON, "layer_replication=[[0, 2]]", "not supported")),
    case(14, "pissa", peft(init_lora_weights="pissa"), (JSON, "init_lora_weights='pissa'", "convert")),
    case(15, "missing", peft(peft_type=...), (JSON, "peft_type=None", "only LORA")),
    case(15, "bogus", peft(peft_type="LOHA"), (JSON, "peft_type='LOHA'", "only LORA")),
    case(15, "not_an_object", lambda f: (as_peft(f), (f / JSON).write_text("[]")), (JSON, "list", "not a JSON object")),
    case(15, "not_json", lambda f: (as_peft(f), (f / JSON).write_text("{")), (JSON, "not valid JSON")),
    case(16, "rank_pattern", peft(rank_pattern={"q_proj": 1}), (OURS_A0, "(2, 12)", "(1, 12)")),
    case(16, "modules_to_save", peft(modules_to_save=["head"]), ("missing", "head.weight")),
    case(16, "bias", peft(bias="lora_only"), ("missing", "layers.0.q_proj.bias")),
    case(16, "target_parameters", peft(target_parameters=["w"]), (JSON, "target_parameters=['w']", "not supported")),
    case(16, "trainable_tokens", peft(trainable_token_indices=[1]), ("trainable_token_indices=[1]", "no rows for them")),
    case(18, "config", peft(r=4), (OURS_A0, "(2, 12)", "rank=4", "(4, 12)")),
    case(18, "tensors", tensors(shrink), (OURS_A0, "(1, 12)", "rank=2", "(2, 12)")),
    case(18, "json_of_another_save", lambda f: edit_json(f, r=4), (JSON, "r=4", "2", "two different saves")),
    case(19, "one", tensors(lambda t: t.pop(A0)), ("1 tensor is missing", OURS_A0)),
    case(19, "all", tensors(lambda t: t.clear()), ("8 tensors are missing", OURS_A0)),
    case(19, "of_pefts", tensors(lambda t: t.pop(A0), foreign=True), ("1 tensor is missing", OURS_A0)),
    case(20, "layer", tensors(lambda t: t.update({A0.replace("0", "2", 1): t[A0] + 1})), ("layers.2.q_proj.lora_A", "no tensor")),
    case(20, "base_weight", tensors(lambda t: t.update({HEAD: torch.ones(16, 12)})), ("'head.weight'", "base weight")),
    case(20, "not_pefts", tensors(lambda t: t.update({"q_proj.weight": torch.ones(2)})), ("'q_proj.weight'", "does not start with")),
    case(21, "nan", tensors(lambda t: t[A0].view(-1)[3:4].fill_(math.nan)), (OURS_A0, "NaN or infinity", "allow_nonfinite=True")),
    case(21, "inf", tensors(lambda t: t[A0].fill_(-math.inf)), (OURS_A0, "NaN or infinity", "allow_nonfinite=True")),
    case(21, "nan_of_pefts", tensors(lambda t: t[A0].fill_(math.nan), foreign=True), (OURS_A0, "NaN or infinity", "allow_nonfinite=True")),
    case(24, "truncated", truncate, (FILE, "truncated")),
    case(24, "header", cut_header, (FILE, "truncated")),
    case(24, "empty", lambda f: (f / FILE).write_bytes(b""), (FILE, "truncated")),
    case(26, "pickle", only_a_pickle, (FILE, "is missing", "adapter_model.bin is a pickle", "safe_serialization=True")),
    case(30, "no_tensors", remove(FILE), (FILE, "is missing")),
    case(30, "no_config", lambda f: (as_peft(f), remove(JSON)(f)), (JSON, "is missing")),
    case(30, "empty", lambda f: (remove(FILE)(f), remove(JSON)(f)), (FILE, "is missing")),
]  # fmt: skip


@pytest.mark.parametrize("target", ["plain", "adapted", "merged"])
@pytest.mark.parametrize(("spoil", "said"), BAD_FOLDERS)
def test_bad_folder(folder: Path, spoil: Callable[[Path], object], said: tuple[str, ...], target: str) -> None:
    """Whatever state the model is in: plain, adapted already, merged."""
    spoil(folder)
    model = {"plain": net, "adapted": adapted, "merged": lambda: merge_lora(adapted())}[target]()
    with refused(*said, model=model, folder=folder):
        load_adapter(model, folder)
