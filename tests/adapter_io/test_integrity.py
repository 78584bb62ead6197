"""What is in an adapter folder is what was saved, or is refused: damage by the checksum, edits of the JSON by the field."""

import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_lora import LoRAConfig, load_adapter, save_adapter
from lightning_lora.adapter_io.files import CONFIG, META, TENSORS, read_adapter
from lightning_lora.adapter_io.integrity import seal
from tests.conftest import TinyModel, adapted, same_bits, snapshot

CONFIGURED = LoRAConfig(target_modules=["q_proj", "v_proj"], rank=2, alpha=4, alpha_pattern={r".*1.*q_proj": 8}, bias="lora_only")


@pytest.fixture
def model(make):
    return adapted(make(TinyModel), **CONFIGURED.to_dict())


@pytest.fixture
def folder(model, tmp_path):
    return save_adapter(model, tmp_path / "adapter")


def edit(folder, **fields):
    """Change fields of the JSON; ``...`` removes one."""
    changed = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in changed.items() if value is not ...}))


MEANT = {
    "r": [3, 1, ...], "lora_alpha": [8, 4.5, ...], "lora_dropout": [0.1], "target_modules": [["q_proj"], ".*q_proj", ["q_proj", "mlp"]],
    "exclude_modules": [["v_proj"], ".*1.*"], "layers_to_transform": [[0], 1], "layers_pattern": [],
    "bias": ["none", "all", ...], "use_rslora": [True], "modules_to_save": [["lm_head"]], "rank_pattern": [{"q_proj": 1}],
    "alpha_pattern": [{"q_proj": 64}, {}, ...], "init_lora_weights": ["pissa", "gaussian"], "use_dora": [True],
    "peft_type": ["LOHA", "VERA", ...], "lora_bias": [True], "layer_replication": [[[0, 2]]], "trainable_token_indices": [[1]],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in MEANT.items() for value in values])
def test_an_edit_that_would_change_the_adapter_is_refused_by_its_field(make, folder, field, value):
    edit(folder, **{field: value})
    model = make(TinyModel)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"adapter_config\.json.*{field if field != 'use_dora' else 'dora'}"):
        load_adapter(model, folder)
    assert snapshot(model) == before


WRONG = [5, "x", [], {}, True, 1.5, [[1]], {"a": {"b": 1}}, 10**400]


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "PEFT's"])
def test_a_value_of_any_type_in_any_field_counts_or_is_refused_by_its_field(make, folder, model, ids, ours):
    """Nothing else comes of it, no error of Python's own, and nothing that loads unnoticed and computes something else."""
    text, expected = (folder / CONFIG).read_text(), model(ids)
    if not ours:
        save_file(load_file(folder / TENSORS), folder / TENSORS, {"format": "pt"})
    for field in json.loads(text).keys() | MEANT.keys():
        for value in WRONG:
            (folder / CONFIG).write_text(text)
            edit(folder, **{field: value})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    result = load_adapter(make(TinyModel), folder)(ids)
                except ValueError:
                    continue
            assert same_bits(result, expected) or not ours, f"{field}={value!r}"


@pytest.mark.parametrize(
    "fields",
    [
        {"base_model_name_or_path": "hub/name"},
        {"task_type": "CAUSAL_LM", "revision": "main", "peft_version": "0.21", "inference_mode": False, "auto_mapping": None},
        {"lora_alpha": 4.0},
        {"modules_to_save": ..., "rank_pattern": ..., "use_rslora": ..., "init_lora_weights": ..., "use_dora": False, "lora_bias": False},
    ],
    ids=["base", "inert", "number", "defaults"],
)
def test_an_edit_that_changes_nothing_loads(make, ids, folder, model, fields):
    edit(folder, **fields)
    assert same_bits(load_adapter(make(TinyModel), folder)(ids), model(ids))


def test_an_unknown_field_warns_as_in_anyones_folder(make, folder):
    edit(folder, colour="blue")
    with pytest.warns(UserWarning, match="colour='blue' is not a field we know"):
        load_adapter(make(TinyModel), folder)


def test_the_error_says_what_was_saved_and_both_ways_on(make, ids, folder, model):
    edit(folder, lora_alpha=8, base_model_name_or_path="hub/name")
    with pytest.raises(ValueError, match=r"says lora_alpha=8, the tensors were saved with 4: .*Put the value back\. If you meant the edit"):
        read_adapter(folder)
    save_file(load_file(folder / TENSORS), folder / TENSORS, {"format": "pt"})
    assert read_adapter(folder).config.alpha == 8
    edit(folder, lora_alpha=4)
    assert same_bits(load_adapter(make(TinyModel), folder)(ids), model(ids))


def test_a_pair_of_two_saves_is_refused(make, folder, tmp_path):
    other = save_adapter(adapted(make(TinyModel), **CONFIGURED.to_dict() | {"alpha_pattern": {"q_proj": 8}}), tmp_path / "other")
    (folder / CONFIG).write_bytes((other / CONFIG).read_bytes())
    with pytest.raises(ValueError, match=r"alpha_pattern=.* files of two different saves"):
        read_adapter(folder)


def test_a_flipped_bit_anywhere_is_refused_or_harmless(make, ids, folder, model):
    """In every byte of the header, which has the config, and in a sample of the tensors' bytes."""
    file, expected = folder / TENSORS, model(ids)
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    loaded = 0
    for place in [*range(0, header, 7), *range(header, len(data), 97), len(data) - 1]:
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                result = load_adapter(make(TinyModel), folder)(ids)
            except ValueError:
                continue
        assert same_bits(result, expected), place
        loaded += 1
    assert loaded < 30  # in the names of the metadata's keys, or of PEFT's


def test_damage_is_said_last(make, folder):
    """What is known more exactly is said first, and a damaged file changes nothing."""
    with safe_open(folder / TENSORS, "pt") as reader:
        metadata = reader.metadata()
    tensors = load_file(folder / TENSORS)
    name = next(iter(tensors))
    model = make(TinyModel)
    before = snapshot(model)
    for change, message in ((torch.zeros(1), "has shape"), (tensors[name] * torch.nan, "NaN"), (tensors[name] + 1, "its checksum differs")):
        save_file(tensors | {name: change}, folder / TENSORS, metadata)
        with pytest.raises(ValueError, match=message):
            load_adapter(model, folder)
    assert snapshot(model) == before
    assert read_adapter(folder).damaged


def test_folders_without_a_checksum_load(make, ids, folder, model):
    """As earlier versions wrote them; their JSON is held against the config."""
    with safe_open(folder / TENSORS, "pt") as reader:
        meta = json.loads(reader.metadata()[META])
    earlier = {name: value for name, value in meta.items() if name not in ("json", "checksum")}
    save_file(load_file(folder / TENSORS), folder / TENSORS, {"format": "pt", META: json.dumps(earlier)})
    assert same_bits(load_adapter(make(TinyModel), folder)(ids), model(ids))
    edit(folder, r=3)
    with pytest.raises(ValueError, match="says r=3, the tensors were saved with 2"):
        read_adapter(folder)


@pytest.mark.parametrize("value", [5, [], "x"], ids=repr)
@pytest.mark.parametrize("entry", ["json", "base", "config", "checksum"])
def test_malformed_metadata_is_our_error(make, folder, entry, value):
    with safe_open(folder / TENSORS, "pt") as reader:
        meta = json.loads(reader.metadata()[META])
    save_file(load_file(folder / TENSORS), folder / TENSORS, {"format": "pt", META: json.dumps(meta | {entry: value})})
    with pytest.raises(ValueError):
        load_adapter(make(TinyModel), folder)


def test_the_checksum_covers_names_dtypes_shapes_and_bits():
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(0), "c": torch.tensor(1.0)}
    meta = {"config": {"rank": 2}}
    sums = {
        seal(meta, tensors),
        seal({"config": {"rank": 3}}, tensors),
        seal(meta, {**tensors, "a": torch.ones(3, 2)}),
        seal(meta, {**tensors, "a": torch.ones(2, 3).view(torch.int32)}),
        seal(meta, {**tensors, "c": torch.tensor(2.0)}),
        seal(meta, {"A": tensors["a"], "b": tensors["b"], "c": tensors["c"]}),
    }
    assert len(sums) == 6
    assert seal({**meta, "checksum": "x"}, dict(reversed(tensors.items()))) in sums


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int16, torch.bfloat16], ids=str)
def test_the_checksum_takes_any_dtype(dtype):
    assert len(seal({}, {"a": torch.zeros(3, dtype=dtype)})) == 32
