"""A name that is no model's is told after one question to the hub; without a network, after none."""

import urllib.error
from email.message import Message

import huggingface_hub
import pytest

from lightning_lora.tasks import hf, model_source


@pytest.fixture
def asked(monkeypatch):
    """What was asked of the hub; each answer is an error, as from a machine without a network."""
    addresses = []
    answers = [urllib.error.URLError("no route to host")]

    def urlopen(address, timeout):
        addresses.append(address)
        raise answers[-1]

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(model_source.urllib.request, "urlopen", urlopen)
    return addresses, answers


def test_a_mistyped_folder_is_told_after_one_question(asked, monkeypatch, tmp_path):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    for load in (hf.load_causal_lm, hf.skeleton):
        with pytest.raises(ValueError, match=r"model='tinny' is no folder .*no route to host; did you mean 'tiny'\?$"):
            load("tinny")
    assert asked[0] == ["https://huggingface.co/api/models/tinny"] * 2


def test_offline_nothing_is_asked(folder, asked, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"model='owner/none' is no folder .*HF_HUB_OFFLINE is set, and the model is not in the cache"):
        model_source.check_there("owner/none")
    assert not asked[0]


def test_a_hub_that_answers_is_left_to_transformers(asked):
    addresses, answers = asked
    answers.append(urllib.error.HTTPError("", 401, "", Message(), None))
    model_source.check_there("owner/private")
    assert len(addresses) == 1


def test_what_is_in_the_cache_needs_no_hub(asked, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda model, file: f"/cache/{file}")
    model_source.check_there("owner/model")
    assert not asked[0]
