"""``save_adapter`` into one folder from several sides; what `load_adapter` finds. Kills: tests/harness."""

import os
import threading

import pytest

from lightning_lora import load_adapter, save_adapter
from lightning_lora.adapter_io.files import CONFIG, TENSORS, read_adapter
from lightning_lora.storage.folders import aside
from tests.conftest import TinyModel, adapted, same_bits


def run_all(*work):
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_without_overwrite_the_first_of_two_writers_wins(make, ids, tmp_path):
    """Both find the folder free before either writes."""
    models = [adapted(make(TinyModel), seed=seed, target_modules=["q_proj"], rank=2) for seed in (1, 2)]
    folder, errors, together = tmp_path / "adapter", {}, threading.Barrier(2)

    def save(number):
        together.wait()
        try:
            save_adapter(models[number], folder)
        except ValueError as error:
            errors[number] = str(error)

    run_all(lambda: save(0), lambda: save(1))
    assert len(errors) == 1 and "is not empty" in next(iter(errors.values()))
    (winner,) = {0, 1} - errors.keys()
    assert same_bits(load_adapter(make(TinyModel), folder)(ids), models[winner](ids))
    assert os.listdir(tmp_path) == ["adapter"]


def test_writers_of_other_configs_and_a_reader(make, tmp_path):
    """Whoever reads gets the config and the tensors of one of them."""
    models = [adapted(make(TinyModel), seed=seed, target_modules=["q_proj"], rank=2, alpha=4.0 * seed) for seed in (1, 2)]
    parts = [model.layers[0].attn.q_proj.lora_A for model in models]
    folder, seen, done = tmp_path / "adapter", set(), threading.Event()
    save_adapter(models[0], folder)

    def read():
        while not done.is_set():
            adapter = read_adapter(folder)
            assert not adapter.damaged
            (which,) = [n for n, part in enumerate(parts) if same_bits(part, adapter.tensors["layers.0.attn.q_proj.lora_A"])]
            assert adapter.config.alpha == 4 * (which + 1)
            seen.add(which)

    def write(number):
        for _ in range(8):
            save_adapter(models[number], folder, overwrite=True)

    reader = threading.Thread(target=read)
    reader.start()
    run_all(lambda: write(0), lambda: write(1))
    done.set()
    reader.join()
    assert seen == {0, 1} and sorted(os.listdir(folder)) == [CONFIG, TENSORS]


@pytest.mark.parametrize("link", [False, True])
def test_an_adapter_that_was_set_aside_is_found_and_put_back(make, ids, tmp_path, link):
    """A kill between two renames, where two names cannot be exchanged."""
    models = [adapted(make(TinyModel), seed=seed, target_modules=["q_proj"], rank=2) for seed in (1, 2)]
    folder, path = tmp_path / "adapter", tmp_path / "link" if link else tmp_path / "adapter"
    if link:
        path.symlink_to(folder)
    save_adapter(models[0], path)
    (folder / "README.md").write_text("mine")
    folder.rename(aside(folder))
    assert same_bits(load_adapter(make(TinyModel), path)(ids), models[0](ids))
    with pytest.raises(ValueError, match="is not empty"):
        save_adapter(models[1], path)
    save_adapter(models[1], path, overwrite=True)
    assert same_bits(load_adapter(make(TinyModel), path)(ids), models[1](ids))
    assert (folder / "README.md").read_text() == "mine" and not aside(folder).exists()


def test_a_folder_of_pefts_that_was_half_overwritten_in_place_is_read(make, ids, tmp_path):
    """Its JSON was put aside, since its folder could not be replaced, and nothing more was done."""
    from safetensors.torch import load_file, save_file

    model = adapted(make(TinyModel), target_modules=["q_proj"], rank=2)
    folder = save_adapter(model, tmp_path / "adapter")
    save_file(load_file(folder / TENSORS), folder / TENSORS, {"format": "pt"})
    (folder / CONFIG).rename(aside(folder / CONFIG))
    assert same_bits(load_adapter(make(TinyModel), folder)(ids), model(ids))
