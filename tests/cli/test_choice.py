import pytest
import yaml

from lightning_lora import data, tasks
from lightning_lora.cli.choice import chosen_data, chosen_task, class_path
from tests.cli.test_lightning_cli import Head

OWN = "tests.cli.test_lightning_cli.Head"


@pytest.mark.parametrize(
    ("words", "content", "task", "module"),
    [
        ([], None, tasks.CausalLMTask, data.InstructionDataModule),
        (["--model=DPOTask"], None, tasks.DPOTask, data.PreferenceDataModule),
        (["--model", "Seq2SeqTask"], None, tasks.Seq2SeqTask, data.Seq2SeqDataModule),
        (["--model.class_path=lightning_lora.tasks.DPOTask"], None, tasks.DPOTask, data.PreferenceDataModule),
        (["--model", OWN], None, Head, data.InstructionDataModule),
        (["--model=DPOTask", "--data=InstructionDataModule"], None, tasks.DPOTask, data.InstructionDataModule),
        ([], {"model": {"class_path": "DPOTask"}}, tasks.DPOTask, data.PreferenceDataModule),
        ([], {"model": "DPOTask"}, tasks.DPOTask, data.PreferenceDataModule),
        ([], {"model": {"model": "x"}}, tasks.CausalLMTask, data.InstructionDataModule),
        (["--model=Seq2SeqTask"], {"model": {"class_path": "DPOTask"}}, tasks.Seq2SeqTask, data.Seq2SeqDataModule),
        (["--config={model: DPOTask}"], None, tasks.DPOTask, data.PreferenceDataModule),
    ],
    ids=str,
)
def test_the_class_is_known_before_the_command_line_is_parsed(words, content, task, module, tmp_path):
    if content is not None:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        words = ["--config", str(tmp_path / "run.yaml"), *words]
    assert (chosen_task(words), chosen_data(words)) == (task, module)


def test_a_name_that_there_is_not():
    with pytest.raises(ValueError, match=r"^model='DPOTaks': there are CausalLMTask, .*; did you mean 'DPOTask'\?$"):
        chosen_task(["--model=DPOTaks"])


@pytest.mark.parametrize(
    ("choose", "content", "message"),
    [
        (chosen_data, {"data": ["train.jsonl"]}, r"data=\['train.jsonl'\] is no class; write data.train: in YAML, or --data.train as an"),
        (chosen_data, {"data": "train.jsonl"}, "data='train.jsonl' is no class; write data.train: in YAML"),
        (chosen_task, {"model": "owner/name"}, "model='owner/name' is no class; write model.model: in YAML"),
        (chosen_task, {"model": 3}, "model=3 is no class"),
        (
            chosen_task,
            {"model": "tests"},
            "model='tests': there are .*ClassificationTask, and a class.*; for a folder of this name write model.m",
        ),
        (chosen_task, {"model": {"class_path": "DPOTask", "model": "x"}}, "model.model stands beside class_path; .* under model.init_args"),
    ],
)
def test_what_is_no_class(choose, content, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        choose(["--config", str(content)])


@pytest.mark.parametrize(("option", "choose", "base"), [("model", chosen_task, "Module"), ("data", chosen_data, "DataModule")])
def test_a_class_of_another_kind_is_refused(option, choose, base):
    """`pytorch_lightning`'s are of another kind; parsing such a default ended in a traceback."""
    with pytest.raises(
        ValueError, match=rf"^{option}='pytorch_lightning.Lightning{base}' is no Lightning{base} of lightning.pytorch; derive"
    ):
        choose([f"--{option}=pytorch_lightning.Lightning{base}"])


def test_paths():
    assert class_path(tasks.DPOTask) == "lightning_lora.tasks.DPOTask" and class_path(Head) == OWN
