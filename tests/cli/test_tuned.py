"""A model as it was tuned, from whatever a run leaves: an adapter folder, a checkpoint file, a folder of shards, a merged model."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from lightning_lora.cli.answers import Answerer, Sampling
from lightning_lora.cli.main import main
from lightning_lora.cli.task_file import FILE, read_task
from lightning_lora.cli.tuned import load_tuned
from lightning_lora.data.records import Conversation
from lightning_lora.strategies.checkpoint_io import write_folder
from tests import tiny_lm
from tests.tasks import tiny

ASKED = ["which colour is the sky", "--max_new_tokens=5"]


def out(capsys, *words):
    assert main(list(words)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def sharded(checkpoint: str, folder: Path) -> str:
    """The checkpoint as a folder of shards, as `LoRAFSDP2Strategy(save_distributed_checkpoint=True)` writes it."""
    write_folder(torch.load(checkpoint, weights_only=True), folder)
    return str(folder)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("full_finetuning", ["false", "true"])
def test_a_folder_of_shards_is_used_as_the_file(full_finetuning, model, config, tmp_path, capsys):
    template = tiny_lm.CHATML.replace("<s> ", "<s> a ")
    words = ["--config", config, f"--full_finetuning={full_finetuning}", "--data.template", template, "--model.learning_rate=0.1"]
    file = json.loads(out(capsys, "fit", *words, "--json"))["checkpoints"][0]
    folder = sharded(file, tmp_path / "sharded.ckpt")
    assert read_task(folder) == read_task(file) and read_task(folder).chat_template == template
    content = torch.load(file, weights_only=True)
    del content["task"]  # a task of one's own says nothing: the model's own kind is taken
    write_folder(content, Path(folder))
    assert read_task(folder).auto_class is None
    answers = [out(capsys, "generate", model, *ASKED, "--adapter", path) for path in (file, folder)]
    assert answers[0] == answers[1] != out(capsys, "generate", model, *ASKED)
    merged = []
    for number, path in enumerate((file, folder)):
        out(capsys, "merge", model, path, str(tmp_path / f"merged{number}"))
        merged.append(safetensors.torch.load_file(tmp_path / f"merged{number}" / "model.safetensors"))
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])
    served = str(tmp_path / "served")
    if full_finetuning == "true":
        for path in (file, folder):
            assert main(["export", path, served, "--base", model]) == 2
            assert "is the checkpoint of a full fine-tune; write it as a model with" in capsys.readouterr().err
            assert "all weights of a" in out(capsys, "inspect", file) and "no adapter" in out(capsys, "inspect", path)
    else:
        out(capsys, "export", folder, served, "--base", model, "--for", "vllm")
        assert Path(served, "chat_template.jinja").read_text() == template
        assert json.loads(out(capsys, "inspect", folder, "--json"))["tensors"]
        assert main(["export", folder, f"{served}2"]) == 2
        assert "is a checkpoint; give --base" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Experiment logs directory", "ignore:The dirpath has changed")
def test_the_source_prefix_travels_with_the_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, rows = tiny.save(tmp_path / "model", "t5"), tiny_lm.write(tmp_path / "rows.jsonl", tiny_lm.rows(4))
    shared = ["--model=Seq2SeqTask", f"--model.model={model}", "--lora.config.target_modules=[q,v]", "--trainer.accelerator=cpu"]
    report = json.loads(
        out(capsys, "fit", *shared, f"--data.train={rows}", "--data.source_prefix=which ", "--trainer.max_steps=1", "--json")
    )
    (adapter,), (checkpoint,) = report["adapter"], report["checkpoints"]
    assert json.loads(Path(adapter, FILE).read_text()) == {"auto_class": "AutoModelForSeq2SeqLM", "source_prefix": "which "}
    out(capsys, "merge", model, adapter, "merged")
    expected = tiny_lm.tokenizer(chat=False)("which colour is")["input_ids"]
    for name, tuned in ((model, adapter), (model, checkpoint), (model, sharded(checkpoint, tmp_path / "sharded.ckpt")), ("merged", None)):
        answerer = Answerer(load_tuned(name, tuned, None, "auto"), Sampling(3))
        assert answerer._encode(Conversation([{"role": "user", "content": "colour is"}])) == expected
    asked = []
    monkeypatch.setattr(
        transformers.T5ForConditionalGeneration, "generate", lambda self, input_ids, **_: asked.append(input_ids) or input_ids
    )
    (tmp_path / "ask.jsonl").write_text('{"prompt": "colour is"}\n')
    for extra in (
        [f"--ckpt_path={checkpoint}"],
        [f"--lora.start_from={adapter}"],
        [f"--ckpt_path={checkpoint}", "--data.source_prefix=a "],
    ):
        out(capsys, "predict", *shared, "--data.predict=ask.jsonl", "--trainer.logger=false", *extra)
    other = tiny_lm.tokenizer(chat=False)("a colour is")["input_ids"]
    assert [ids.tolist() for ids in asked] == [[expected], [expected], [other]]


def test_a_model_says_its_own_kind(tmp_path, capsys):
    for kind, auto_class in (
        ("t5", "AutoModelForSeq2SeqLM"),
        ("vit", "AutoModelForImageClassification"),
        ("llama", "AutoModelForCausalLM"),
    ):
        folder = tiny.save(tmp_path / kind, kind)
        assert load_tuned(folder, None, None, "auto").task.auto_class == auto_class
    assert main(["generate", str(tmp_path / "vit"), "a"]) == 2
    assert "ViTForImageClassification writes no texts" in capsys.readouterr().err
