"""A model that cannot be loaded is named at once; what is wrong is not left to a minute of retries."""

import shutil
import urllib.error
from email.message import Message
from pathlib import Path

import huggingface_hub
import pytest

from lightning_lora.tasks import hf
from tests import tiny_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Path(tiny_lm.save(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def asked(monkeypatch):
    """What was asked of the hub; each answer is an error, as from a machine without a network."""
    addresses = []
    answers = [urllib.error.URLError("no route to host")]

    def urlopen(address, timeout):
        addresses.append(address)
        raise answers[-1]

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf.urllib.request, "urlopen", urlopen)
    return addresses, answers


def test_a_mistyped_folder_is_told_after_one_question(folder, asked, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for load in (hf.load_causal_lm, hf.skeleton):
        with pytest.raises(ValueError, match=r"model='tinny' is no folder .*no route to host; did you mean 'tiny'\?$"):
            load("tinny")
    assert asked[0] == ["https://huggingface.co/api/models/tinny"] * 2


def test_offline_nothing_is_asked(folder, asked, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"model='owner/none' is no folder .*HF_HUB_OFFLINE is set, and the model is not in the cache"):
        hf.check_there("owner/none")
    assert not asked[0]


def test_a_hub_that_answers_is_left_to_transformers(asked):
    addresses, answers = asked
    answers.append(urllib.error.HTTPError("", 401, "", Message(), None))
    hf.check_there("owner/private")
    assert len(addresses) == 1


def test_what_is_in_the_cache_needs_no_hub(asked, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda model, file: f"/cache/{file}")
    hf.check_there("owner/model")
    assert not asked[0]


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
