import pytest
import torch
import transformers as T

from lightning_lora import LoRACallback, LoRAConfig, export_merged, load_adapter, save_adapter
from lightning_lora.data import Seq2SeqDataModule
from lightning_lora.tasks import Seq2SeqTask
from tests import tiny_lm
from tests.tasks import tiny
from tests.tasks.tiny import trainer

CONFIG = LoRAConfig(rank=8, target_modules="all-linear")
ROWS = [
    {"prompt": "the sky", "response": "blue sky"},
    {"prompt": "which colour is the grass", "response": "green"},
    {"prompt": "blood", "response": "red apple pear"},
] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("t5"), "t5")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_lm.write(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def trained(folder, rows):
    torch.manual_seed(0)
    task = Seq2SeqTask(folder, learning_rate=3e-2, max_new_tokens=6)
    fit = trainer(LoRACallback(CONFIG, merge_on_fit_end=False), max_epochs=25, num_sanity_val_steps=0, check_val_every_n_epoch=25)
    fit.fit(task, Seq2SeqDataModule(rows, rows, batch_size=6))
    return task, {name: value.item() for name, value in fit.callback_metrics.items()}


def written(task, rows):
    return trainer().predict(task, Seq2SeqDataModule(predict=rows, batch_size=12))[0]


def test_it_learns_to_write_the_targets(trained, rows):
    task, metrics = trained
    assert [row["text"] for row in written(task, rows)] == [row["response"] for row in ROWS]
    assert [row["source"] for row in written(task, rows)] == [row["prompt"] for row in ROWS]
    assert metrics["val_rouge1"] == metrics["val_rougeL"] == pytest.approx(1)
    assert metrics["val_perplexity"] == pytest.approx(torch.tensor(metrics["val_loss"]).exp().item(), rel=1e-4)


def test_loss_and_gradients_are_hugging_faces(folder, rows, monkeypatch):
    task = Seq2SeqTask(folder)
    monkeypatch.setattr(task, "log", lambda *args, **kwargs: None)
    data = Seq2SeqDataModule(rows, batch_size=3)
    data._tokenizer = task.tokenizer
    data.setup("fit")
    batch = data.collate([data.examples["train"][i] for i in range(3)], "train")
    assert batch["labels"].tolist()[1][-2:] == [-100, -100] and (batch["labels"] == 3).sum() == 3  # each ends
    ours = torch.autograd.grad(task.training_step(batch, 0), list(task.model.parameters()))
    reference = task.model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    torch.testing.assert_close(ours, torch.autograd.grad(reference, list(task.model.parameters())))


def test_scores_are_of_the_written_texts_over_the_whole_set(folder, rows, monkeypatch):
    """By hand: two texts with 1 and 3 words of theirs right."""
    task = Seq2SeqTask(folder)
    texts = {"the sky": "blue pear", "blood": "red apple pear", "which colour is the grass": ""}
    monkeypatch.setattr(
        task, "_write", lambda batch: [texts[task.tokenizer.decode(ids, skip_special_tokens=True)] for ids in batch["input_ids"]]
    )
    for size in (1, 2):
        (found,) = trainer().test(task, Seq2SeqDataModule(test=rows, batch_size=size), verbose=False)
        assert found["test_rouge1"] == pytest.approx((0.5 + 1 + 0) / 3) and found["test_rouge2"] == pytest.approx((0 + 1 + 0) / 3)
    assert 0 <= found["test_bleu"] < 1


def test_without_generation_nothing_is_written(folder, rows, monkeypatch):
    task = Seq2SeqTask(folder, predict_with_generate=False)
    monkeypatch.setattr(task.model, "generate", lambda **options: pytest.fail("it wrote"))
    (found,) = trainer().validate(task, Seq2SeqDataModule(val=rows), verbose=False)
    assert found.keys() == {"val_loss", "val_perplexity"}


def test_saved_loaded_and_exported_it_writes_the_same(trained, folder, rows, tmp_path):
    save_adapter(trained[0], tmp_path / "adapter")
    fresh = Seq2SeqTask(folder, max_new_tokens=6)
    load_adapter(fresh, tmp_path / "adapter")
    assert written(fresh, rows) == written(trained[0], rows)
    export_merged(trained[0], tmp_path / "merged")
    loaded = T.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    ids = trained[0].tokenizer(ROWS[2]["prompt"], return_tensors="pt").input_ids
    assert trained[0].tokenizer.decode(loaded.generate(ids, max_new_tokens=6)[0], skip_special_tokens=True) == ROWS[2]["response"]


def test_prefix_columns_and_lengths(folder, tmp_path):
    rows = [{"document": "sky " * 30, "summary": "blue " * 30}, {"document": "blood", "summary": "red"}]
    file = tiny_lm.write(tmp_path / "rows.jsonl", rows)
    columns = {"document": "prompt", "summary": "response"}
    data = Seq2SeqDataModule(val=file, columns=columns, source_prefix="name a ", max_length=12, max_target_length=8)
    with pytest.warns(UserWarning, match="1 of 2 rows are cut"):
        trainer().validate(Seq2SeqTask(folder, predict_with_generate=False), data, verbose=False)
    long, short = sorted(data.examples["val"], key=len, reverse=True)
    assert len(long.ids) == 12 and len(long.labels) == 8 and long.labels[-1] == 3
    assert tiny_lm.tokenizer().decode(short.ids) == "name a blood"


def test_a_row_of_another_kind_is_named(folder, tmp_path):
    file = tiny_lm.write(tmp_path / "rows.jsonl", [{"text": "a", "label": "b"}])
    with pytest.raises(ValueError, match=r"rows.jsonl:1: Seq2SeqDataModule takes a conversation, and this row is a text with a label"):
        trainer().validate(Seq2SeqTask(folder), Seq2SeqDataModule(val=file), verbose=False)


@pytest.mark.parametrize(
    ("message", "refused"),
    [({"content": "", "tool_calls": [{"name": "a"}]}, "has tools or calls of them"), ({"content": "blue", "weight": 0}, "has weight 0")],
)
def test_an_answer_that_is_no_text_to_learn_is_refused(folder, tmp_path, message, refused):
    messages = [{"role": "user", "content": "sky"}, {"role": "assistant", **message}]
    file = tiny_lm.write(tmp_path / "rows.jsonl", [{"messages": messages}])
    with pytest.raises(ValueError, match=f"rows.jsonl:1: .*{refused}"):
        trainer().validate(Seq2SeqTask(folder), Seq2SeqDataModule(val=file), verbose=False)
