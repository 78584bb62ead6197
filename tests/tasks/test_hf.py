"""A model that cannot be loaded is named at once; what is wrong is not left to a minute of retries."""

import shutil
from pathlib import Path

import pytest

from lightning_lora.tasks import hf
from tests import tiny_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Path(tiny_lm.save(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"model='' is empty"),
        ("bad name", r"model='bad name' is no folder .*nor a hub id"),
        ("tiny/config.json", r"is a file; name its folder \('tiny'\)"),
        ("empty", r"model='empty' is not a model: the folder has no config.json"),
        ("adapter", r"model='adapter' is an adapter; name the model that it was trained on"),
        ("damaged", r"model='damaged': its weights are damaged"),
        ("weightless", r"model='weightless': .*model.safetensors"),
        ("unknown", r"model='unknown': .*model type `nothing`"),
    ],
)
def test_a_folder_that_is_no_model_is_named(name, message, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for copy in ("tiny", "damaged", "weightless", "unknown"):
        shutil.copytree(folder, copy)
    Path("damaged/model.safetensors").write_bytes(b"noise")
    Path("weightless/model.safetensors").unlink()
    Path("unknown/config.json").write_text('{"model_type": "nothing"}')
    Path("empty").mkdir()
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").touch()
    with pytest.raises(ValueError, match=message):
        hf.load_causal_lm(name)


def test_a_model_without_the_tasks_class_is_named(folder):
    with pytest.raises(
        ValueError, match=r"model='.*tiny': there is no AutoModelForSeq2SeqLM for a LlamaConfig; choose another task or model$"
    ):
        hf.load_model("AutoModelForSeq2SeqLM", str(folder))


def test_a_missing_gguf_file_is_named(folder):
    with pytest.raises(ValueError, match=r"is not a model: the folder has no x.gguf"):
        hf.skeleton(str(folder), "x.gguf")
