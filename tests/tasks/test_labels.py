"""Tasks with labels: where the labels come from, what is learnt, and what is left on disk."""

import json

import pytest
import torch
import transformers as T

from lightning_lora import LoRACallback, LoRAConfig, export_merged, load_adapter, save_adapter
from lightning_lora.data import ClassificationDataModule
from lightning_lora.tasks import SequenceClassificationTask
from tests import tiny_lm
from tests.tasks import tiny
from tests.tasks.tiny import trainer

TEXTS = {"sky": "which colour is the sky", "grass": "which colour is the grass", "blood": "name a colour is blood"}
ROWS = [{"text": text, "label": label} for label, text in TEXTS.items()] * 4
TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module", params=["bert", "llama"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp(kind), kind)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_lm.write(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def trained(kind, folder, rows, tmp_path_factory):
    """A task after its training, not merged, with the metrics and the folder of a checkpoint."""
    torch.manual_seed(0)
    task = SequenceClassificationTask(folder, learning_rate=1e-2)
    callback = LoRACallback(LoRAConfig(rank=4, target_modules=TARGETS[kind]), merge_on_fit_end=False)
    fit = trainer(callback, max_epochs=15, num_sanity_val_steps=0)
    fit.fit(task, ClassificationDataModule(rows, rows, batch_size=6))
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "x.ckpt"
    fit.save_checkpoint(checkpoint)
    return task, {name: value.item() for name, value in fit.callback_metrics.items()}, checkpoint


def predictions(task, rows):
    return trainer().predict(task, ClassificationDataModule(predict=rows, batch_size=12))[0]


def test_labels_are_those_of_the_rows_and_are_learnt(trained):
    task, metrics, _ = trained
    assert task.labels == ["blood", "grass", "sky"] == [task.model.config.id2label[i] for i in range(3)]
    assert metrics["val_accuracy"] == metrics["val_f1"] == 1 and metrics["val_loss"] < 0.2


def test_prediction_names_the_labels(trained, rows, tmp_path):
    found = predictions(trained[0], rows)
    assert [(row["text"], row["label"]) for row in found] == [(row["text"], row["label"]) for row in ROWS]
    assert all(0.5 < row["score"] <= 1 for row in found)
    unlabelled = tiny_lm.write(tmp_path / "unlabelled.jsonl", [{"text": row["text"]} for row in ROWS])
    assert json.dumps(predictions(trained[0], unlabelled)) == json.dumps(found)


def test_head_and_adapter_are_saved_and_loaded(trained, folder, rows, tmp_path):
    save_adapter(trained[0], tmp_path / "adapter")
    for source in (tmp_path / "adapter", trained[2]):
        fresh = SequenceClassificationTask(folder, labels=["blood", "grass", "sky"])
        assert predictions(fresh, rows) != predictions(trained[0], rows)
        load_adapter(fresh, source)
        assert predictions(fresh, rows) == predictions(trained[0], rows)


def test_checkpoint_tells_its_labels_and_is_resumed(trained, kind, folder, rows):
    config = LoRAConfig(rank=4, target_modules=TARGETS[kind])
    fresh = SequenceClassificationTask(folder)  # its labels come from the training rows
    data = ClassificationDataModule(rows, test=rows)
    (tested,) = trainer(LoRACallback(config)).test(fresh, data, ckpt_path=trained[2], verbose=False)
    assert tested["test_accuracy"] == 1
    turned = SequenceClassificationTask(folder, labels=["sky", "grass", "blood"])
    with pytest.raises(ValueError, match=r"the checkpoint was trained with labels=\['blood', 'grass', 'sky'\], this task has \['sky', "):
        trainer(LoRACallback(config)).test(turned, ClassificationDataModule(test=rows), ckpt_path=trained[2], verbose=False)


def test_export_is_a_model_of_the_auto_class_with_its_labels(trained, rows, tmp_path):
    export_merged(trained[0], tmp_path / "merged")
    trained[0].tokenizer.save_pretrained(tmp_path / "merged")
    loaded = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert loaded.config.id2label == {0: "blood", 1: "grass", 2: "sky"} and loaded.config.label2id["sky"] == 2
    for label, text in TEXTS.items():
        logits = loaded(**trained[0].tokenizer(text, return_tensors="pt")).logits
        assert loaded.config.id2label[logits.argmax().item()] == label
    again = SequenceClassificationTask(str(tmp_path / "merged"))  # it knows its labels without any rows
    assert again.labels == trained[0].labels
    assert [row["label"] for row in predictions(again, rows)] == [row["label"] for row in ROWS]


def test_a_head_of_its_own_is_kept_where_it_has_the_labels(trained, rows, tmp_path):
    export_merged(trained[0], tmp_path / "merged")
    trained[0].tokenizer.save_pretrained(tmp_path / "merged")
    for content in (ROWS[:2], [{"text": row["text"], "label": trained[0].labels.index(row["label"])} for row in ROWS]):  # names, ids
        file = tiny_lm.write(tmp_path / "some.jsonl", content)
        (found,) = trainer().test(SequenceClassificationTask(str(tmp_path / "merged")), ClassificationDataModule(test=file), verbose=False)
        assert found["test_accuracy"] == 1
    other = tiny_lm.write(tmp_path / "other.jsonl", [{"text": "a", "label": "x"}, {"text": "a", "label": "blood"}])
    task = SequenceClassificationTask(str(tmp_path / "merged"))
    trainer().validate(task, ClassificationDataModule(val=other), verbose=False)
    assert task.labels == ["blood", "x"]


def test_metrics_are_those_of_the_whole_set_whatever_the_batches(folder, rows, tmp_path):
    file = tiny_lm.write(tmp_path / "rows.jsonl", ROWS[:7])
    torch.manual_seed(3)
    task = SequenceClassificationTask(folder, labels=["blood", "grass", "sky", "none"])
    found = [trainer().validate(task, ClassificationDataModule(val=file, batch_size=size), verbose=False)[0] for size in (1, 3, 7)]
    assert found[0] == pytest.approx(found[2], rel=1e-5) and found[1] == pytest.approx(found[2], rel=1e-5)
    mine, theirs = ([row["label"] for row in each] for each in (predictions(task, file), ROWS[:7]))
    assert found[2]["val_accuracy"] == pytest.approx(sum(a == b for a, b in zip(mine, theirs, strict=True)) / 7)
    seen = set(mine) | set(theirs)
    ones = [2 * sum(a == b == k for a, b in zip(mine, theirs, strict=True)) / (mine.count(k) + theirs.count(k)) for k in seen]
    assert found[2]["val_f1"] == pytest.approx(sum(ones) / len(seen))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([*ROWS, {"text": "a", "label": None}], r"rows.jsonl:13: .*no 'label'"),
        ([*ROWS, {"text": "a", "label": 0.5}], r"rows.jsonl:13: the label is 0.5; it must be a text or a whole number"),
        ([{"text": "a", "label": "x"}], r"labels=\['x'\]: there must be at least two, all different"),
        (
            [{"prompt": "a", "response": "b"}],
            r"rows.jsonl:1: ClassificationDataModule takes a text with a label or a text, and this row is a conversation",
        ),
    ],
)
def test_a_bad_row_is_named(content, message, folder, tmp_path):
    file = tiny_lm.write(tmp_path / "rows.jsonl", content)
    with pytest.raises(ValueError, match=message):
        trainer(max_epochs=1).fit(SequenceClassificationTask(folder), ClassificationDataModule(file))


def test_a_label_that_training_has_not_is_named_with_its_place(folder, rows, tmp_path):
    file = tiny_lm.write(tmp_path / "val.jsonl", [ROWS[0], {"text": "a", "label": "moon"}])
    with pytest.raises(ValueError, match=r"val.jsonl:2: the label 'moon' is none of \['blood', 'grass', 'sky'\]; correct the row"):
        trainer(max_epochs=1).fit(SequenceClassificationTask(folder), ClassificationDataModule(rows, file))


def test_whole_numbers_are_ordered_as_numbers(folder, tmp_path):
    file = tiny_lm.write(tmp_path / "rows.jsonl", [{"text": "a", "label": i} for i in (10, 2, 1)])
    task = SequenceClassificationTask(folder)
    trainer().validate(task, ClassificationDataModule(val=file), verbose=False)
    assert task.labels == ["1", "2", "10"]


def test_long_rows_are_cut_and_keep_their_end(folder, tmp_path):
    file = tiny_lm.write(tmp_path / "rows.jsonl", [{"text": "sky " * 30, "label": "a"}, {"text": "a", "label": "b"}])
    data = ClassificationDataModule(val=file, max_length=16)
    with pytest.warns(UserWarning, match=r"1 of 2 rows are cut to max_length=16"):
        trainer().validate(SequenceClassificationTask(folder), data, verbose=False)
    assert max(data.examples["val"].lengths) == 16


def test_without_labels_the_task_says_what_it_needs(folder):
    loader = torch.utils.data.DataLoader([0])
    with pytest.raises(ValueError, match=r"the labels are not known: give SequenceClassificationTask labels=\[...\], or Classification"):
        trainer().validate(SequenceClassificationTask(folder), loader, verbose=False)
    with pytest.raises(ValueError, match=r"labels=\['a', 'a'\]: there must be at least two, all different"):
        SequenceClassificationTask(folder, labels=["a", "a"])
