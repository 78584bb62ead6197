"""Parquet files and data sets, all local: a folder of data files stands for one of the hub, which `datasets` reads the same way."""

import json

import datasets
import pyarrow.parquet
import pytest

from lightning_lora.data import hub
from lightning_lora.data.reading import read_rows

ROWS = [{"prompt": f"{i}?", "response": str(i)} for i in range(5)]
TALK = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": None}]


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def read(source, slot="train", **options):
    return list(read_rows(str(source), slot, **options))


def test_null_fields_of_other_rows_are_left_out(tmp_path):
    """A column of objects gives each the fields of all: the model would learn to call tools with nulls."""
    rows = [{"calls": [{"arguments": {name: "a"}}], "text": None} for name in ("city", "unit")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [row for _, row in read_rows(str(tmp_path / "rows.parquet"), "train")] == rows
    datasets.Dataset(pyarrow.Table.from_pylist(rows)).save_to_disk(tmp_path / "saved")
    assert [row for _, row in read_rows(str(tmp_path / "saved"), "train")] == rows


def test_parquet(tmp_path):
    file = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(file)
    assert read(file) == [(f"{file}:{i}", row) for i, row in enumerate(ROWS, start=1)]
    datasets.Dataset.from_list(TALK).to_parquet(file)
    assert [row["messages"] for _, row in read(file)] == [TALK[0]["messages"]]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"rows.parquet is not a whole parquet file"):
        read(file)


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_folders(tmp_path, streaming):
    folder = tmp_path / "one"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    assert read(folder, streaming=streaming) == [(f"{folder}:{i}", row) for i, row in enumerate(ROWS, start=1)]
    several = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])})
    several.save_to_disk(tmp_path / "several")
    assert [len(read(tmp_path / "several", slot, streaming=streaming)) for slot in ("train", "test", "predict")] == [5, 2, 2]
    assert len(read(f"{tmp_path / 'several'}:test", "train", streaming=streaming)) == 2
    with pytest.raises(ValueError, match=r"it has no split 'validation', but train, test; write .*several:SPLIT"):
        read(tmp_path / "several", "val", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_files(tmp_path, streaming):
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    for split, rows in (("train", ROWS), ("validation", ROWS[:3])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row for _, row in read(folder, streaming=streaming)] == ROWS
    assert len(read(folder, "val", streaming=streaming)) == 3
    if not streaming:  # `datasets` slices only what it has as a whole
        assert [place for place, _ in read(f"{folder}:train[:2]")] == [f"{folder}:train[:2]:1", f"{folder}:train[:2]:2"]
    with pytest.raises(ValueError, match=r"data.test='.*': this is a folder, and (Unknown|Bad) split"):
        read(folder, "test", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_that_is_no_data_set(tmp_path, streaming):
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n{"a": ')
    with pytest.raises(ValueError, match=r"data.train='.*': this is a folder, and ") as error:
        read(tmp_path, streaming=streaming)
    assert "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data.train='.*empty': this is a folder, and "):
        read(tmp_path / "empty", streaming=streaming)


def test_what_the_hub_does_not_have(monkeypatch):
    def refuse(*args, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name'\ndoesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        ValueError, match=r"^data.train='owner/name:train': no such file, and of the hub: Dataset 'owner/name' doesn't exist"
    ):
        read("owner/name:train")


def test_a_missing_package_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    (tmp_path / "a.parquet").touch()
    for source in ("owner/name", tmp_path, tmp_path / "a.parquet"):
        with pytest.raises(ImportError, match=r"reading it needs the package \w+; pip install 'lightning-lora\[datasets\]'"):
            read(source)
