"""Reading adapter files without a model: what is refused, by file and reason; what a file carries."""

import io
import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_lora import LoRAConfig, save_adapter
from lightning_lora.adapter_io.files import CONFIG, FORMAT_VERSION, META, TENSORS, AdapterFile, read_adapter
from lightning_lora.adapter_io.fingerprint import base_identity
from tests.conftest import TinyModel, adapted, same_bits

CONFIGURED = LoRAConfig(target_modules=["q_proj"], rank=2, alpha=3, dropout=0.1, bias="lora_only", scaling="rslora", layers=[0])


@pytest.fixture
def model(make):
    return adapted(make(TinyModel), **CONFIGURED.to_dict())


@pytest.fixture
def folder(model, tmp_path):
    return save_adapter(model, tmp_path / "adapter")


def change_tensors(folder, change=lambda tensors: None, change_meta=lambda meta: None, drop_meta=False):
    with safe_open(folder / TENSORS, "pt") as reader:
        metadata = reader.metadata()
    tensors, meta = load_file(folder / TENSORS), json.loads(metadata[META])
    change(tensors)
    change_meta(meta)
    save_file(tensors, folder / TENSORS, {"format": "pt"} if drop_meta else {"format": "pt", META: json.dumps(meta)})


def change_json(folder, **fields):
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | fields))


def test_a_folder_is_two_files_and_reads_back_whole(model, folder):
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS]
    adapter = read_adapter(str(folder))
    assert adapter.config == CONFIGURED
    assert set(adapter.tensors) == {f"layers.0.attn.q_proj.{part}" for part in ("lora_A", "lora_B", "bias")}
    assert all(same_bits(tensor, model.state_dict()[name]) for name, tensor in adapter.tensors.items())
    assert adapter.base == base_identity(model, {"layers.0.attn.q_proj.bias"})


def test_the_files_are_pefts(folder):
    assert set(load_file(folder / TENSORS)) == {
        f"base_model.model.layers.0.attn.q_proj.{part}" for part in ("lora_A.weight", "lora_B.weight", "base_layer.bias")
    }
    with safe_open(folder / TENSORS, "pt") as reader:
        assert reader.metadata()["format"] == "pt"
    assert json.loads((folder / CONFIG).read_text())["peft_type"] == "LORA"


def test_the_tensors_carry_version_config_and_base(folder):
    with safe_open(folder / TENSORS, "pt") as reader:
        meta = json.loads(reader.metadata()[META])
    assert meta["format_version"] == FORMAT_VERSION == 1
    assert LoRAConfig(**meta["config"]) == CONFIGURED
    assert set(meta["base"]) == {"fingerprint", "class", "name"}


def test_the_tensors_alone_are_enough(folder):
    """What a kill leaves where the files had to be moved in one by one."""
    (folder / CONFIG).unlink()
    assert read_adapter(folder).config == CONFIGURED


def test_without_our_metadata_it_is_pefts(folder):
    change_tensors(folder, drop_meta=True)
    adapter = read_adapter(folder)
    assert adapter.base is None
    assert (adapter.config.rank, adapter.config.alpha, adapter.config.scaling, adapter.config.bias) == (2, 3.0, "rslora", "lora_only")
    (folder / CONFIG).unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        read_adapter(folder)


def truncate(folder, size):
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[:size])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / TENSORS).unlink(), r"adapter_model\.safetensors is missing"),
        (
            lambda f: ((f / TENSORS).unlink(), (f / "adapter_model.bin").write_bytes(b"")),
            r"is missing; adapter_model\.bin is a pickle, which can run code: load it in PEFT",
        ),
        (lambda f: truncate(f, 0), r"adapter_model\.safetensors is not a readable safetensors file \(truncated\?\)"),
        (lambda f: truncate(f, 4), "not a readable safetensors file"),
        (lambda f: truncate(f, 700), "not a readable safetensors file"),
        (lambda f: truncate(f, -1), "not a readable safetensors file"),
        (lambda f: (f / CONFIG).write_text('{"r": 2,'), r"adapter_config\.json is not valid JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), r"adapter_config\.json holds a list, not a JSON object"),
        (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), r"adapter_config\.json is not valid JSON"),
        (lambda f: change_json(f, r=4), "says r=4, the tensors were saved with 2: files of two different saves"),
        (lambda f: change_json(f, lora_alpha=4), "says lora_alpha=4"),
        (lambda f: change_json(f, use_rslora=False), "says use_rslora=False"),
        (lambda f: change_json(f, bias="none"), "says bias='none'"),
        (lambda f: change_tensors(f, change_meta=lambda m: m.update(format_version=2)), "format version 2, .* reads up to 1; update"),
        (lambda f: change_tensors(f, lambda t: t.update({"q.lora_A": torch.ones(1)})), "'q.lora_A' does not start with 'base_model"),
        (lambda f: change_tensors(f, change_meta=lambda m: m["config"].update(rank=0)), "rank=0"),
        (lambda f: change_tensors(f, change_meta=lambda m: m["config"].update(new_field=1)), "new_field"),
        (lambda f: change_tensors(f, change_meta=lambda m: m.pop("format_version")), "format_version"),
    ],
    ids=[
        "no-tensors", "pickle", "empty", "header-length", "header", "last-byte", "json-cut", "json-list", "json-binary", "rank", "alpha",
        "scaling", "bias", "version", "name", "bad-config", "unknown-config-field", "no-version",
    ],
)  # fmt: skip
def test_damaged_folders_are_refused_by_file_and_reason(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 9\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / TENSORS).write_bytes(LFS), "is a pointer of Git LFS, not the file itself: run git lfs pull"),
        (lambda f: (f / TENSORS).write_bytes(b"<!DOCTYPE html>"), "is a web page, not the file: download it again"),
        (lambda f: (f / TENSORS).rename(f / f"{TENSORS}.index.json"), "the tensors are in several files: load them in PEFT, and save"),
        (lambda f: ((f / "checkpoint-9").mkdir(), (f / TENSORS).rename(f / "checkpoint-9" / TENSORS)), "below it, checkpoint-9: name one"),
    ],
    ids=["lfs", "html", "shards", "below"],
)
def test_what_a_download_left_instead_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)


def test_single_files_of_an_adapter_and_of_other_formats(folder, tmp_path):
    for name in (CONFIG, TENSORS):
        with pytest.raises(ValueError, match="is part of an adapter folder: load"):
            read_adapter(folder / name)
    save_file({"lora_unet_mid.lora_down.weight": torch.ones(1)}, tmp_path / "kohya.safetensors")
    with pytest.raises(ValueError, match=r"kohya.safetensors is no adapter folder: PEFT's has adapter_model.safetensors and"):
        read_adapter(tmp_path / "kohya.safetensors")


def test_a_name_of_the_hub():
    with pytest.raises(ValueError, match=r"owner/adapter: there is no such adapter .*; of the hub nothing is downloaded here"):
        read_adapter("owner/adapter")


def test_no_such_folder(tmp_path):
    with pytest.raises(ValueError, match="nothing: there is no such adapter folder or checkpoint"):
        read_adapter(tmp_path / "nothing")


# Checkpoints.


def write_checkpoint(path, folder, root="model", change=lambda checkpoint: None):
    adapter = read_adapter(folder)
    prefix = f"{root}." if root else ""
    checkpoint = {"state_dict": {prefix + name: t for name, t in adapter.tensors.items()}, META: adapter.meta(root=root), "epoch": 1}
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize("root", ["model", "", "net.inner"])
def test_a_checkpoint_reads_as_the_folder_does(folder, tmp_path, root):
    adapter, expected = read_adapter(write_checkpoint(tmp_path / "a.ckpt", folder, root)), read_adapter(folder)
    assert replace(adapter, tensors={}) == replace(expected, tensors={})
    assert adapter.tensors.keys() == expected.tensors.keys()
    assert all(same_bits(tensor, expected.tensors[name]) for name, tensor in adapter.tensors.items())


def test_meta_is_plain_types():
    meta = AdapterFile(CONFIGURED, {}, {"fingerprint": "0"}).meta(root="model")
    assert json.loads(json.dumps(meta)) == meta
    assert meta["root"] == "model"


class RunsCode:
    def __reduce__(self):
        return print, ("code ran",)


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a readable checkpoint"),
        (b"not a checkpoint", "is not a readable checkpoint"),
        (b"PK\x03\x04 cut", "is not a readable checkpoint"),
        (saved({META: RunsCode()}), "is not a readable checkpoint"),
    ],
    ids=["empty", "text", "cut-zip", "code"],
)
def test_unreadable_checkpoints(tmp_path, capsys, content, message):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.ckpt {message}"):
        read_adapter(tmp_path / "a.ckpt")
    assert "code ran" not in capsys.readouterr().out


def test_a_truncated_checkpoint(folder, tmp_path):
    path = write_checkpoint(tmp_path / "a.ckpt", folder)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        read_adapter(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop(META), "was not written under LoRACallback: it holds no adapter"),
        (lambda c: c["state_dict"].update(other=torch.ones(1)), "'other' is not part of 'model'; load it through Trainer"),
        (lambda c: c[META].update(format_version=9), "has format version 9"),
    ],
)
def test_checkpoints_that_hold_no_adapter_we_can_read(folder, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_adapter(write_checkpoint(tmp_path / "a.ckpt", folder, change=change))


def test_a_checkpoint_that_is_no_dict(tmp_path):
    torch.save([1, 2], tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="was not written under LoRACallback"):
        read_adapter(tmp_path / "a.ckpt")


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")], ids=["fifo", "folder", "endless"])
def test_a_json_that_is_no_file(folder, put):
    """Refused at once: a FIFO has no writer, and the device no end."""
    change_tensors(folder, drop_meta=True)
    (folder / CONFIG).unlink()
    put(folder / CONFIG)
    with pytest.raises(ValueError, match=r"adapter_config\.json is a (folder|device or a pipe), not a file"):
        read_adapter(folder)


def test_a_config_of_pefts_that_is_out_of_range_names_the_file(folder):
    change_tensors(folder, drop_meta=True)
    change_json(folder, lora_dropout=1.5)
    with pytest.raises(ValueError, match=r"adapter_config\.json: dropout=1\.5"):
        read_adapter(folder)


def test_metadata_of_another_variant_than_its_own_json(folder):
    change_tensors(folder, change_meta=lambda meta: meta["config"].update(variant="dora"))
    with pytest.raises(ValueError, match="is of a 'plain' adapter, the tensors were saved with 'dora'"):
        read_adapter(folder)


@pytest.mark.parametrize("odd", [lambda t: t.to("meta"), lambda t: t.to_sparse()], ids=["meta", "sparse"])
@pytest.mark.parametrize("root", ["", "model"])
@pytest.mark.parametrize("beside", [False, True], ids=["adapter", "beside"])
def test_a_tensor_of_a_checkpoint_without_plain_values(model, tmp_path, odd, beside, root):
    """Of the adapter, or of what is saved beside it: a buffer, inside the adapted part or around it."""
    meta = AdapterFile(CONFIGURED, {}, None).meta(root=root) | {"beside": ["mean"]}
    prefix = f"{root}." if root else ""
    tensors = {prefix + name: tensor.detach() for name, tensor in model.state_dict().items() if "lora_" in name} | {"mean": torch.zeros(3)}
    tensors |= {name: odd(tensor) for name, tensor in tensors.items() if beside == (name == "mean")}
    torch.save({META: meta, "state_dict": tensors}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=rf"x\.ckpt: '{'mean' if beside else '.*lora_A'}' has no plain values"):
        read_adapter(tmp_path / "x.ckpt")


def test_metadata_of_null_does_not_make_it_a_folder_of_pefts(folder):
    save_file(load_file(folder / TENSORS), folder / TENSORS, {"format": "pt", META: "null"})
    with pytest.raises(ValueError, match="metadata holds a NoneType, not a JSON object"):
        read_adapter(folder)


@pytest.mark.parametrize("value", [2.0, True])
def test_a_field_that_is_equal_and_of_another_type(folder, value):
    """What the metadata says of the JSON was edited: 2.0 and True are no rank."""
    change_tensors(folder, change_meta=lambda meta: meta["json"].update(r=value))
    change_json(folder, r=int(value))
    with pytest.raises(ValueError, match=rf"r={int(value)}, the tensors were saved with {value}"):
        read_adapter(folder)
