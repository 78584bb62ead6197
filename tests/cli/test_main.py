"""Exit codes, one line per error, nothing written; signals within a fit."""

import re
import signal

import lightning
import pytest
import torch
import transformers
import yaml
from safetensors import SafetensorError

from lightning_lora.cli.help import SWEEP, TOOLS, TRAIN, VERIFY
from lightning_lora.cli.main import main
from tests import tiny_lm


@pytest.fixture
def bad(tmp_path):
    """A folder with files of the wrong kind."""
    folder = tmp_path / "bad"
    (folder / "empty").mkdir(parents=True)
    files = {"text.ckpt": b"hello\n", "empty.ckpt": b"", "noise.ckpt": bytes(range(256)), "list.yaml": b"- a\n", "latin.jsonl": b"\xef\n"}
    files |= {"empty.txt": b"\n", "keys.jsonl": b'{"prompt": "a", "response": "b"}\n{"question": "a"}\n'}
    files |= {"twice.yaml": b"trainer:\n  max_epochs: 1\n  max_epochs: 2\n", "key.yaml": b"trainer: {max_epoch: 1}\n"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    torch.save([1], folder / "list.ckpt")
    return folder


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (2, ["fit", "--lora.compile=model"], r"^lora.compile: expected 'layer', got model"),
        (2, ["fit", "--lora.config.rank=0"], r"rank=0: the rank is a whole number"),
        (2, ["fit", "--lora.config.rank=1.5"], r"^lora.config.rank: expected a whole number, got 1.5"),
        (2, ["fit", "--lora.config={rank: 2, rank: 3}"], r"'rank' is there twice in '{rank: 2, rank: 3}'"),
        (2, ["fit", "--lora.config.bias=some"], r"bias.*some"),
        (2, ["fit", "--lora.rank=4"], r"^no option 'lora.rank'; did you mean 'lora.config.rank'\?$"),
        (2, ["fit", "--model.learning_rate=-1"], r"^model.learning_rate: expected a number > 0 or 'auto', got -1$"),
        (
            2,
            ["fit", "--model.lr=1"],
            r"^no option 'model.lr' of lightning_lora.tasks.CausalLMTask; there are model.model, .*model.learning_rate",
        ),
        (2, ["fit", "--lora.lora_plus_ratio=0"], r"lora_plus_ratio=0"),
        (2, ["fit", "--model.galore.rank=4"], r"q_proj.weight is frozen, .*full_finetuning: true"),
        (2, ["fit", "--model.galore.rank=0"], r"rank=0"),
        (2, ["fit", "--data.batch_size=0"], r"^data.batch_size: expected a whole number > 0, got 0"),
        (2, ["fit", "--trainer.nothing=1"], r"^no option 'trainer.nothing'; --help lists the options$"),
        (2, ["fit", "--trainer.max_epoch=1"], r"^no option 'trainer.max_epoch'; did you mean 'trainer.max_epochs'\?$"),
        (2, ["fit", "--optimizer=SGD"], r"^no option 'optimizer': the optimizer is the model class's"),
        (2, ["fit", "--trainer.accelerator=cuda"], r"^trainer \(accelerator='cuda'\): .*not available"),
        (2, ["fit", "--trainer.strategy=ddp_spawn"], r"^trainer \(.*strategy='ddp_spawn'\): .*copies of this process.*use strategy=ddp"),
        (2, ["fit", "--trainer.strategy=deepspeed"], r"^trainer \(.*strategy='deepspeed'\): .*must have DeepSpeed installed"),
        (2, ["fit", "--trainer.devices=0"], r"^trainer \(.*devices='0'\): .*not a valid input"),
        (2, ["fit", "--trainer.devices=-2"], r"^trainer \(.*devices='-2'\): .*should be an int > 0"),
        (2, ["fit", "--trainer.devices=100000", "--trainer.strategy=ddp"], r"^trainer \(.*\): 100000 processes on \d+ CPUs"),
        (2, ["fit", "--trainer.accumulate_grad_batches=0"], r"^trainer.accumulate_grad_batches=0: give at least 1"),
        (2, ["fit", "--config=none.yaml"], r"^--config none.yaml: no such file"),
        (2, ["fit", "--config={bad}/twice.yaml"], r"^--config .*twice.yaml, line 3: the key 'max_epochs' is there twice"),
        (2, ["fit", "--config={bad}/key.yaml"], r"^no option 'trainer.max_epoch'; did you mean 'trainer.max_epochs'\?"),
        (
            2,
            ["fit", "--data.packing=true", "--data.streaming=true"],
            r"^data.packing=True looks at every row before training; set data.stream",
        ),
        (
            2,
            ["fit", "--data.template=chatml"],
            r"^data.template='chatml' writes <\|im_start\|>, .*which the tokenizer does not have; plain, ",
        ),
        (2, ["fit", "--data.template={{"], r"^data.template is no Jinja template: "),
        (2, ["fit", "--data.columns={reply: answer}"], r"train.jsonl:1: data.columns has reply: answer, and the row has neither"),
        (2, ["fit", "--data.max_length=2"], r"rows lose their answer to max_length=2: .*raise data.max_length"),
        (2, ["fit", "--data.train=null"], r"^data.train is not set; fit needs a file there$"),
        (2, ["test", "--data.test=null"], r"^data.test is not set; test needs a file there$"),
        (2, ["predict", "--data.test=null"], r"^data.predict is not set; predict needs a file there$"),
        (2, ["fit", "--seed_everything=x"], r"^seed_everything: expected true or false or a whole number, got x$"),
        (2, ["fit", "--data.train=none.jsonl"], r"^data.train='none.jsonl': no such file"),
        (2, ["fit", "--data.train={bad}/empty"], r"^data.train='.*empty': "),
        (2, ["fit", "--data.val={bad}/latin.jsonl"], r"latin.jsonl:1 is not UTF-8"),
        (2, ["fit", "--lora.config.target_modules=[q_prej]"], r"q_prej.*q_proj"),
        (2, ["fit", "--config={lora: []}"], r"^lora=\[\]: write its options under it, or leave it out$"),
        (2, ["fit", "--config={trainer: 3}"], r"^trainer=3: write its options under it, or leave it out$"),
        (2, ["fit", "--model.model=/no/such/model"], r"^model='/no/such/model' is no folder"),
        (2, ["fit", "--ckpt_path=last"], r"^ckpt_path='last': there is no last\*.ckpt in .*run/checkpoints.*; give the file, or"),
        (2, ["test", "--ckpt_path=none.ckpt"], r"^ckpt_path='none.ckpt': no such file"),
        (2, ["predict", "--ckpt_path={bad}/empty.ckpt"], r"empty.ckpt is not a readable checkpoint: the file is empty"),
        (2, ["validate", "--ckpt_path={bad}/noise.ckpt"], r"noise.ckpt is not a readable checkpoint: it was not written by torch.save"),
        (2, ["melt"], r"^no command 'melt'; there are fit, validate"),
        (2, ["--verbose"], r"^no command '--verbose'"),
        (2, ["generat"], r"did you mean 'generate'\?$"),
        (2, ["inspect", "/no/such/model"], r"^model='/no/such/model' is no folder"),
        (2, ["inspect", "{bad}/empty"], r"is not a model: the folder has no config.json"),
        (2, ["inspect"], r"path"),
        (2, ["inspect", "{bad}/empty.txt", "--model={model}"], r"empty.txt' has none of the endings of data files: \.jsonl, .*rename it"),
        (2, ["inspect", "{model}", "--lora.rank=-2"], r"rank=-2"),
        (2, ["inspect", "{model}", "--lora.rnk=2"], r"^no option 'lora.rnk'; did you mean 'lora.rank'\?$"),
        (2, ["inspect", "{model}", "--lora.target_modules=[q_prej]"], r"q_prej.*q_proj"),
        (2, ["generate", "{model}", ""], r"prompt is empty"),
        (2, ["generate", "{model}", "\udcff"], r"the message of 'user' is not UTF-8 \(at character 0\)"),
        (2, ["generate", "{model}", "a", "--file={bad}/latin.jsonl"], r"a prompt and --file are both given"),
        (2, ["generate", "{model}", "--file=none.txt"], r"none.txt.*no such file"),
        (2, ["generate", "{model}", "--file={bad}/latin.jsonl"], r"latin.jsonl:1 is not UTF-8"),
        (2, ["generate", "{model}", "--file={bad}/empty.txt"], r"empty.txt has no prompts; write one per line"),
        (2, ["generate", "{model}", "--file={bad}/keys.jsonl"], r"keys.jsonl:2: .*no known format"),
        (2, ["generate", "{model}", "a", "--temperature=-1"], r"^temperature: expected a number ≥ 0, got -1"),
        (2, ["generate", "{model}", "a", "--max_new_tokens=0"], r"^max_new_tokens: expected a whole number > 0, got 0"),
        (2, ["generate", "{model}", "a", "--max_new_tokens=null"], r"^max_new_tokens.*(null|None)"),
        (2, ["generate", "{model}", "a", "--systme=b"], r"did you mean 'system'\?$"),
        (2, ["generate", "{model}", "a", "--adapter=/no/such/adapter"], r"/no/such/adapter"),
        (2, ["chat", "{model}", "--tempreature=1"], r"did you mean 'temperature'\?$"),
        (2, ["chat", "{model}", "--adapter=none"], r"^adapter='none': no such folder or checkpoint"),
        (2, ["init", "{model}", "none.jsonl", "--out=new.yaml"], r"^data.train='none.jsonl': no such file"),
        (2, ["init", "{model}", "none.jsonl"], r"^out='run.yaml' exists; name another file, or pass --overwrite"),
        (2, ["init", "/no/such/model", "none.jsonl", "--out=new.yaml"], r"^model='/no/such/model' is no folder"),
        (2, ["init", "{model}", "{bad}/keys.jsonl", "--out=none/run.yaml"], r"^out='none/run.yaml': there is no folder 'none'"),
        (2, ["init", "{model}", "{bad}/keys.jsonl", "--out=new.yaml"], r"keys.jsonl:2: .*no known format"),
        (2, ["inspect", "{bad}/keys.jsonl"], r"^model.model is not set"),
        (2, ["inspect", "{bad}/keys.jsonl", "--model={model}"], r"keys.jsonl:2: .*no known format"),
        (2, ["inspect", "{bad}/keys.jsonl", "--model={model}", "--data.max_lenth=3"], r"did you mean 'data.max_length'\?$"),
        (2, ["inspect", "none.yaml"], r"none.yaml: no such file"),
        (2, ["generate", "{model}", "a", "--adapter={bad}/text.ckpt"], r"text.ckpt is not a readable checkpoint"),
        (2, ["generate", "{model}", "a", "--adapter={bad}/list.ckpt"], r"list.ckpt was not written under LoRACallback: it holds a list"),
        (2, ["init", "{model}", "{tmp}/train.jsonl", "--val=none.jsonl", "--out=new.yaml"], r"^data.val='none.jsonl': no such file"),
        (2, ["init", "{model}", "{tmp}/train.jsonl", "--val=2", "--out=new.yaml"], r"^data.val='2' must be a share"),
        (2, ["export", "{adapter}", "{tmp}/out", "--for", "vlm"], r"^for: expected one of 'peft', .*, got vlm; did you mean 'vllm'\?$"),
        (2, ["export", "{adapter}", "{tmp}/out", "--for"], r"^argument --for: expected one argument$"),
        (2, ["export", "{adapter}", "{tmp}/out", "--base="], r"^base='' is empty; name a hub id or a folder"),
        (2, ["export", "{adapter}", ""], r"^out='' is empty; name a folder"),
        (2, ["export", "{adapter}", "{bad}/text.ckpt"], r"^out='.*text.ckpt' is a file; name a folder"),
        (
            2,
            ["generate", "{model}", "a", "--max_new_tokens=1", "--system={long}"],
            r"^the prompt has \d+ tokens, the model's context 256; shorten it",
        ),
        (2, ["merge", "{model}", "/no/such/adapter", "{tmp}/out/deep"], r"/no/such/adapter"),
        (2, ["inspect", "none.ckpt"], r"^none.ckpt: there is no such adapter folder or checkpoint"),
        (2, ["generate", "/no/such/model", "a"], r"^model='/no/such/model' is no folder"),
        (2, ["generate", "{model}", "a", "--adapter={bad}/empty"], r"adapter_model.safetensors is missing"),
        (2, ["merge", "{model}", "{adapter}", "{bad}/text.ckpt"], r"^out='.*text.ckpt' is a file; name a folder"),
        (2, ["merge", "{model}", "{adapter}", "{bad}"], r"^out='.*bad' is not empty"),
        (2, ["merge", "{bad}/text.ckpt", "{model}", "{tmp}/out"], r"text.ckpt' is a file; name its folder"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(code, arguments, message, config, model, adapter, bad, tmp_path, capsys, monkeypatch):
    places = {"{model}": model, "{adapter}": adapter, "{tmp}": str(tmp_path), "{bad}": str(bad), "{long}": "a " * 300}
    for place, path in places.items():
        arguments = [argument.replace(place, path) for argument in arguments]
    if arguments[0] in ("fit", "validate", "test", "predict"):
        arguments[1:1] = ["--config", config]
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-lora: error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0].removeprefix("lightning-lora: error: ")), lines[0]
    assert sorted(tmp_path.rglob("*")) == before  # nothing written


def test_a_traceback_on_request(monkeypatch):
    monkeypatch.setenv("LIGHTNING_LORA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no command"):
        main(["melt"])


def test_a_fault_in_the_code_is_no_wrong_input(monkeypatch, model):
    from lightning_lora.cli import inspect_files

    def broken(*args, **kwargs):
        raise AttributeError("ours")

    monkeypatch.setattr(inspect_files, "skeleton", broken)
    with pytest.raises(AttributeError, match="ours"):
        main(["inspect", model])


def test_help_lists_every_command(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        output = capsys.readouterr().out
        assert all(f"\n  {name} " in output for name in (*TRAIN, *SWEEP, *VERIFY, *TOOLS))
    assert main(["fit", "--help-all"]) == 0
    assert "--optimizer" not in capsys.readouterr().out  # it would never work
    assert main(["merge", "--help"]) == 0
    assert "--overwrite" in capsys.readouterr().out


def test_the_help_has_a_run_to_start_from(model, tmp_path, capsys, monkeypatch):
    """It runs as printed, once the model and the files are there; nothing in it is a file of the repository."""
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    text = printed[printed.index("\n\nmodel:\n") :]
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        tiny_lm.write(tmp_path / f"{split}.jsonl", tiny_lm.rows(6))
    (tmp_path / "run.yaml").write_text(text.replace(yaml.safe_load(text)["model"]["model"], model))
    assert main(["fit", "--config", "run.yaml", "--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "true"]) == 0


@pytest.mark.parametrize("full_finetuning", ["false", "true"])
def test_a_full_disk_is_one_line(full_finetuning, config, tmp_path, capsys, monkeypatch):
    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert main(["fit", "--config", config, f"--full_finetuning={full_finetuning}"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-lora: error")]
    assert len(lines) == 1 and re.search(r"No space left on device: '.*\.ckpt'$", lines[0])
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("*.tmp"))


def test_a_full_disk_in_a_merge_is_one_line(model, adapter, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    assert main(["merge", model, adapter, str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "lightning-lora: error: I/O error: No space left on device (os error 28)"
    assert not list(tmp_path.iterdir())


class Interrupt(lightning.Callback):
    """Presses Ctrl-C, or sends another signal, in a training step."""

    def __init__(self, number: int = int(signal.SIGINT), times: int = 1, at: int = 1):
        self.number, self.times, self.at = number, times, at

    def on_before_optimizer_step(self, trainer, module, optimizer):
        for _ in range(self.times if trainer.global_step + 1 == self.at else 0):
            signal.raise_signal(self.number)


@pytest.mark.parametrize(("number", "times", "code"), [(signal.SIGINT, 1, 130), (signal.SIGINT, 2, 130), (signal.SIGTERM, 1, 143)])
@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:Checkpoint directory", "ignore:You're resuming from a checkpoint")
def test_an_interrupted_fit_says_so_and_goes_on(config, tmp_path, number, times, code):
    own = [f"--trainer.callbacks+={__name__}.Interrupt", f"--trainer.callbacks.number={int(number)}", f"--trainer.callbacks.times={times}"]
    for full in ("false", "true") if number == signal.SIGTERM else ("false",):
        arguments = ["fit", "--config", config, f"--full_finetuning={full}"]
        assert main([*arguments, *own]) == code
        left = list(tmp_path.rglob("*.ckpt"))
        assert [file.name for file in left] == (["last-interrupted.ckpt"] if times == 1 else [])
        if left:
            assert main([*arguments, "--ckpt_path=last"]) == 0
            (done,) = tmp_path.rglob("*.ckpt")
            assert done.name != left[0].name and torch.load(done, weights_only=True)["global_step"] == 2
            done.unlink()


@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:Checkpoint directory", "ignore:.*overwriting")
def test_a_run_that_was_stopped_within_an_epoch_goes_on_with_the_next_rows(config, tmp_path):
    """The adapter of a run with an interruption is that of one without."""
    arguments = ["fit", "--config", config, "--data.batch_size=1", "--trainer.limit_val_batches=0", "--lora.merge_on_fit_end=false"]
    found = []
    for stopped in (False, True):
        if stopped:
            assert main([*arguments, f"--trainer.callbacks+={__name__}.Interrupt", "--trainer.callbacks.at=3"]) == 130
        assert main([*arguments, *(["--ckpt_path=last"] if stopped else [])]) == 0
        (file,) = tmp_path.rglob("*.ckpt")
        found.append(torch.load(file, weights_only=True))
        file.unlink()
    assert found[0]["global_step"] == found[1]["global_step"] == 6
    mine, theirs = (state["state_dict"] for state in found)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
