"""Labels of data sets that the library ``datasets`` saved: they are numbers there, with names beside them."""

import datasets
import pytest

from lightning_lora.data import ClassificationDataModule, TokenClassificationDataModule
from lightning_lora.tasks import SequenceClassificationTask, TokenClassificationTask
from tests.tasks import tiny
from tests.tasks.tiny import trainer

NAMES = ["negative", "positive"]
TAGS = ["O", "B-FRUIT"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("bert"), "bert")


def test_labels_have_their_names_and_ids(folder, tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)})
    datasets.Dataset.from_dict({"text": ["red", "blue", "green"], "label": [1, 0, 1]}, features).save_to_disk(tmp_path / "saved")
    task, data = SequenceClassificationTask(folder), ClassificationDataModule(val=str(tmp_path / "saved"))
    trainer().validate(task, data, verbose=False)
    assert task.labels == NAMES and [example.labels for example in data.examples["val"]] == [[1], [0], [1]]


def test_a_row_without_a_label_is_named(folder, tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)})
    datasets.Dataset.from_dict({"text": ["red", "blue"], "label": [1, -1]}, features).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved:2: the row has no 'label'"):
        trainer().validate(SequenceClassificationTask(folder), ClassificationDataModule(val=str(tmp_path / "saved")), verbose=False)


def test_a_number_that_is_no_label_is_not_taken_for_an_id(folder, tmp_path):
    """Of labels 1 to 3, the 1 has id 0; a 0 is none of them."""
    files = {name: tmp_path / f"{name}.csv" for name in ("train", "val")}
    files["train"].write_text("text,label\nred,1\nblue,2\ngreen,3\n")
    files["val"].write_text("text,label\nred,0\n")
    data = ClassificationDataModule(train=str(files["train"]), val=str(files["val"]))
    with pytest.raises(ValueError, match=r"val.csv:2: the label '0' is none of \['1', '2', '3'\]"):
        trainer(max_epochs=1).fit(SequenceClassificationTask(folder), data)


def test_lists_of_labels_have_their_names(folder, tmp_path):
    tags = datasets.Sequence(datasets.ClassLabel(names=TAGS))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": tags})
    rows = {"tokens": [["a", "pear"], ["the", "sky"]], "ner_tags": [[0, 1], [0, 0]]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "saved")
    task = TokenClassificationTask(folder)
    data = TokenClassificationDataModule(val=str(tmp_path / "saved"), columns={"ner_tags": "tags"})
    (found,) = trainer().validate(task, data, verbose=False)
    assert task.labels == ["B-FRUIT", "O"] and "val_entity_f1" in found
