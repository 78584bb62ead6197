import pytest
import torch
import transformers as T

from lightning_lora import LoRACallback, LoRAConfig, export_merged, load_adapter, save_adapter
from lightning_lora.data import TokenClassificationDataModule
from lightning_lora.tasks import TokenClassificationTask
from lightning_lora.tasks.token_classification import EntityF1, entities
from tests import tiny_lm
from tests.tasks import tiny
from tests.tasks.tiny import trainer

CONFIG = LoRAConfig(rank=4, target_modules=["query", "value"])
ROWS = [
    {"tokens": ["the", "green", "apple", "is", "red"], "tags": ["O", "B-FRUIT", "I-FRUIT", "O", "B-COLOUR"]},
    {"tokens": ["blood", "is", "red"], "tags": ["O", "O", "B-COLOUR"]},
    {"tokens": ["a", "pear", "is", "a", "green", "pear"], "tags": ["O", "B-FRUIT", "O", "O", "B-FRUIT", "I-FRUIT"]},
] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_lm.write(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def trained(folder, rows):
    torch.manual_seed(0)
    task = TokenClassificationTask(folder, learning_rate=2e-2)
    fit = trainer(LoRACallback(CONFIG, merge_on_fit_end=False), max_epochs=20, num_sanity_val_steps=0)
    fit.fit(task, TokenClassificationDataModule(rows, rows, batch_size=6))
    return task, {name: value.item() for name, value in fit.callback_metrics.items()}


def predictions(task, rows):
    return trainer().predict(task, TokenClassificationDataModule(predict=rows, batch_size=12))[0]


def test_it_learns_and_prediction_gives_every_word_its_label(trained, rows):
    task, metrics = trained
    assert task.labels == ["B-COLOUR", "B-FRUIT", "I-FRUIT", "O"]
    assert metrics["val_accuracy"] == metrics["val_f1"] == metrics["val_entity_f1"] == 1
    assert predictions(task, rows) == ROWS


def test_saved_loaded_and_exported_it_predicts_the_same(trained, folder, rows, tmp_path):
    save_adapter(trained[0], tmp_path / "adapter")
    fresh = TokenClassificationTask(folder, labels=trained[0].labels)
    load_adapter(fresh, tmp_path / "adapter")
    assert predictions(fresh, rows) == ROWS
    export_merged(trained[0], tmp_path / "merged")
    loaded = T.AutoModelForTokenClassification.from_pretrained(tmp_path / "merged").eval()
    ids = trained[0].tokenizer(" ".join(ROWS[0]["tokens"]), return_tensors="pt")
    assert [loaded.config.id2label[i] for i in loaded(**ids).logits[0].argmax(-1).tolist()] == ROWS[0]["tags"]


def test_entities_are_compared_as_wholes():
    assert entities(["B-A", "I-A", "O", "I-B", "B-B", "I-A", "I-A"]) == {("A", 0, 2), ("B", 3, 4), ("B", 4, 5), ("A", 5, 7)}
    assert entities(["O", "O"]) == set() and entities(["I-A"]) == {("A", 0, 1)}
    metric = EntityF1()
    metric.update([["B-A", "I-A", "O"], ["B-B"]], [["B-A", "O", "O"], ["B-B"]])
    metric.update([["O"]], [["B-A"]])
    assert metric.compute() == pytest.approx(2 * 1 / (2 + 3))


def test_labels_without_entities_have_no_entity_f1(folder, tmp_path):
    file = tiny_lm.write(tmp_path / "rows.jsonl", [{"tokens": ["a", "pear"], "tags": ["DET", "NOUN"]}])
    (found,) = trainer().validate(TokenClassificationTask(folder), TokenClassificationDataModule(val=file), verbose=False)
    assert {"val_loss", "val_accuracy", "val_f1"} == found.keys()
