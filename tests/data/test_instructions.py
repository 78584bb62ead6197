import json

import lightning
import pytest

from lightning_lora.data import InstructionDataModule
from lightning_lora.data.templates import TEMPLATES
from tests import tiny_lm
from tests.faults import kit
from tests.tiny_lm import load_examples

ROW = {"prompt": "which colour is the sky", "response": "blue"}
CHAT = [{"role": "user", "content": ROW["prompt"]}, {"role": "assistant", "content": "blue"}]


def load(tmp_path, content, split="train", max_length=64, chat=True):
    return load_examples(tiny_lm.write(tmp_path / "rows.jsonl", content), tiny_lm.tokenizer(chat), max_length, split)


def test_prompt_and_answer_with_a_chat_template(tmp_path):
    tokenizer = tiny_lm.tokenizer()
    for row in (ROW, {"messages": CHAT}):
        (example,) = load(tmp_path, [row])
        assert tokenizer.decode(example.prompt) == "<s> user which colour is the sky </s> <s> assistant"
        assert tokenizer.decode(example.answer) == "blue </s>"


def test_without_a_chat_template_the_prompt_says_where_the_answer_begins(tmp_path):
    for row in (ROW, {"messages": CHAT}):
        (example,) = load(tmp_path, [row], chat=False)
        assert tiny_lm.tokenizer().decode(example.prompt) == ROW["prompt"] + " <unk> <unk>"  # ### Response:
        assert tiny_lm.tokenizer().decode(example.answer) == "blue </s>"
    (example,) = load(tmp_path, [{"messages": CHAT + CHAT}], chat=False)
    assert tiny_lm.tokenizer().decode(example.answer) == "blue </s> blue </s>"


def test_the_template_is_set_whether_rows_are_read_cached_or_streamed(tmp_path):
    """It is saved with the adapter: a second run, whose rows are all in the cache, must leave it there too."""
    file = tiny_lm.write(tmp_path / "rows.jsonl", [ROW])
    for template, streaming in ((None, False), (None, False), ("alpaca", False), ("alpaca", False), ("alpaca", True)):
        data = InstructionDataModule(file, template=template, cache=str(tmp_path / "cache"), streaming=streaming)
        data._tokenizer = tiny_lm.tokenizer(chat=False)
        data.setup("fit")
        assert data.tokenizer.chat_template == TEMPLATES[template or "plain"]
    assert len(list((tmp_path / "cache").iterdir())) == 2  # so the second and the fourth found theirs
    with pytest.raises(ValueError, match=r"data\.template='alpacca' is not known; the names are plain, alpaca"):
        InstructionDataModule(file, template="alpacca")


def test_a_text_is_learnt_as_a_whole(tmp_path):
    (example,) = load(tmp_path, [{"text": "the sky is blue"}, {"text": " \n"}])
    assert example.ids == example.labels
    assert tiny_lm.tokenizer().decode(example.ids) == "the sky is blue </s>"


def test_a_text_of_one_token_teaches_nothing(tmp_path):
    tokenizer, file = tiny_lm.tokenizer(), tiny_lm.write(tmp_path / "rows.jsonl", [{"text": "blue"}, {"text": "the sky"}])
    tokenizer.eos_token = None
    (example,) = load_examples(file, tokenizer, 64, "train")
    assert tokenizer.decode(example.ids) == "the sky"
    with pytest.raises(ValueError, match="2 of 2 rows lose their answer to max_length=1"):
        load(tmp_path, [{"text": "the sky"}, {"text": "blue sky"}], max_length=1)


def test_choices_become_the_places_where_they_part(tmp_path):
    row = {**ROW, "response": "green pear", "choices": tiny_lm.CHOICES}
    token = tiny_lm.tokenizer().convert_tokens_to_ids
    assert load(tmp_path, [row], "val")[0].rivals == sorted([(0, token("red")), (1, token("apple")), (0, token("blue"))])
    assert load(tmp_path, [row], "train")[0].rivals == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"is not JSON \(Expecting property name"),
        (b"\xff\xfe", r"is not UTF-8"),
        ("[1]", r"expected a JSON object, got list; a row is"),
        ({"prompt": "a"}, r"no 'response' among the keys \['prompt'\], for the format 'prompt_response'"),
        ({"instruction": "a"}, r"no 'output' among the keys \['instruction'\]"),
        ({"question": "a"}, r"the keys \['question'\] are of no known format \(preference: chosen, rejected; messages"),
        ({"prompt": 3, "response": "a"}, r"the prompt must be text"),
        ({"prompt": "a", "response": None}, r"no 'response' among the keys"),
        ({"messages": []}, r"there are no messages"),
        ({"messages": CHAT[:1]}, r"the last message must be the assistant's"),
        ({"messages": [{"role": "user"}]}, r"the message of 'user' has no 'content'"),
        ({"messages": [{"content": "a"}]}, r"'messages' must be a list of objects"),
        ({**ROW, "choices": ["red"]}, r"'choices' must be a list of texts that holds the answer 'blue', got \['red'\]"),
        ({**ROW, "choices": "blue"}, r"'choices' must be a list"),
        ({**ROW, "choices": ["blue", 3]}, r"'choices' must be a list of texts"),
        ({"messages": [{"role": 3, "content": "a"}, CHAT[-1]]}, r"every 'role' must be text"),
        ({**ROW, "response": "a", "choices": ["a", " a"]}, r"the choices 'a' and ' a' begin with the same tokens"),
    ],
)
@kit.row(58)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "rows.jsonl"
    bad = line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else json.dumps(line).encode()
    file.write_bytes(json.dumps(ROW).encode() + b"\n\n" + bad + b"\n")
    with pytest.raises(ValueError, match=rf"rows.jsonl:3:? {message}"):
        load_examples(file, tiny_lm.tokenizer(), 64, "val")


@pytest.mark.parametrize("split", ["train", "predict"])
def test_a_template_that_refuses_a_row_is_told_with_its_line(tmp_path, split):
    tokenizer = tiny_lm.tokenizer()
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + tiny_lm.CHATML
    file = tiny_lm.write(tmp_path / "rows.jsonl", [ROW, {"messages": [{"role": "system", "content": "be kind"}, *CHAT[-2:]]}])
    with pytest.raises(
        ValueError, match=r"rows.jsonl:2: the tokenizer's chat template refuses the messages \(system, user\): no system role"
    ):
        load_examples(file, tokenizer, 64, split)


def test_a_template_that_changes_the_answer_is_refused(tmp_path):
    tokenizer = tiny_lm.tokenizer()
    tokenizer.chat_template = tiny_lm.CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    file = tiny_lm.write(tmp_path / "rows.jsonl", [ROW, {"prompt": "a", "response": "<think> a </think> blue"}])
    with pytest.raises(ValueError, match=r"rows.jsonl:2: the tokenizer's chat template changes the answer '<think> a </think> blue'"):
        load_examples(file, tokenizer, 64, "train")


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    tokenizer = tiny_lm.tokenizer(chat=False)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the tokenizer has no end token"):
        load_examples(tiny_lm.write(tmp_path / "rows.jsonl", [ROW]), tokenizer, 64, "train")


def test_a_byte_order_mark_is_no_content(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\n")
    assert load_examples(file, tiny_lm.tokenizer(), 64, "val") == load(tmp_path, [ROW], "val")


def test_an_empty_prompt_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the prompt is empty"):
        load(tmp_path, [{"prompt": "", "response": "blue"}], chat=False)


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data.train='.*none.jsonl': no such file"):
        load_examples(tmp_path / "none.jsonl", tiny_lm.tokenizer(), 64, "train")
    with pytest.raises(ValueError, match=r"data.train='.*rows.jsonl' is empty; it needs at least one row"):
        load(tmp_path, ["", "  "])


@kit.row(58)
def test_rows_that_lose_their_answer_are_counted_and_named(tmp_path):
    long = {"prompt": "sky " * 20, "response": "blue"}
    with pytest.raises(ValueError, match=r"2 of 3 rows lose their answer to max_length=16: .*rows.jsonl:2 .*rows.jsonl:3"):
        load(tmp_path, [ROW, long, long], max_length=16)


def test_rows_that_lose_some_of_their_answer_are_counted_and_kept(tmp_path):
    long = {**ROW, "response": "blue " * 20}
    with pytest.warns(UserWarning, match=r"1 of 2 rows are cut to max_length=16"):
        examples = load(tmp_path, [ROW, long], max_length=16)
    assert len(examples[1]) == 16
    with pytest.raises(ValueError, match="1 of 1 rows lose their answer"):  # half a choice cannot be judged
        load(tmp_path, [{**long, "choices": [long["response"], "red"]}], "val", max_length=16)


def test_an_epoch_has_its_own_order_in_a_fit(tmp_path):
    """Lightning calls `set_epoch`; the same run again sees the same batches."""
    model = tiny_lm.save(tmp_path / "model")
    rows = [{"prompt": "sky " * (i + 1), "response": "blue"} for i in range(24)]
    file = tiny_lm.write(tmp_path / "train.jsonl", rows)

    def orders() -> list[list[int]]:
        from lightning_lora.tasks import CausalLMTask

        seen: list[list[int]] = []

        class Watch(lightning.Callback):
            def on_train_epoch_start(self, trainer, module):
                seen.append([])

            def on_train_batch_start(self, trainer, module, batch, index):
                assert batch["input_ids"].shape[1] % 16 == 0
                seen[-1] += batch["attention_mask"].sum(1).tolist()

        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(accelerator="cpu", max_epochs=2, num_sanity_val_steps=0, callbacks=[Watch()], **quiet)
        trainer.fit(CausalLMTask(model), InstructionDataModule(file, file, batch_size=4, pad_to_multiple_of=16))
        return seen

    one, two = orders()
    assert sorted(one) == sorted(two) and one != two
    assert orders() == [one, two]


def test_what_a_stage_needs_is_asked_for():
    data = InstructionDataModule()
    for stage, key in (("fit", "train"), ("validate", "val"), ("test", "test"), ("predict", "predict")):
        with pytest.raises(ValueError, match=f"data.{key} is not set; {stage} needs a file there"):
            data.setup(stage)


def test_a_module_without_a_tokenizer_is_named(tmp_path):
    from lightning.pytorch.demos.boring_classes import BoringModel

    file = tiny_lm.write(tmp_path / "train.jsonl", [ROW])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    with pytest.raises(ValueError, match=r"BoringModel has no `tokenizer`; set self.tokenizer there"):
        lightning.Trainer(accelerator="cpu", max_epochs=1, **quiet).fit(BoringModel(), InstructionDataModule(file))
