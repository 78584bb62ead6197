import json
import re
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
import transformers
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, get_lora_parameters, load_adapter, save_adapter
from lightning_lora.cli.lightning_cli import LoRACLI
from lightning_lora.cli.main import main
from tests import tiny_lm


@pytest.fixture(autouse=True)
def lightning_on_todays_parser(monkeypatch):
    """LightningCLI 2.6 itself calls what jsonargparse has deprecated; there is no other call to make."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """An adapter that changes the answers."""
    network = apply_lora(transformers.AutoModelForCausalLM.from_pretrained(model), config=LoRAConfig(rank=4))
    torch.manual_seed(1)
    for parameter in get_lora_parameters(network):
        torch.nn.init.normal_(parameter)
    return str(save_adapter(network, tmp_path_factory.mktemp("adapters") / "adapter"))


@pytest.fixture
def config(model, tmp_path):
    """A whole run, in the flat form: no class_path where the defaults are meant."""
    files = {split: tiny_lm.write(tmp_path / f"{split}.jsonl", tiny_lm.rows(6)) for split in ("train", "val", "test")}
    content = {
        "model": {"model": model, "learning_rate": 1e-2},
        "data": {**files, "batch_size": 3},
        "lora": {"config": {"rank": 2}},
        "trainer": {
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
            "accelerator": "cpu",
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(tmp_path), "name": "run", "version": ""},
            },
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "run.yaml")


@pytest.mark.filterwarnings("ignore:Experiment logs directory")  # the same folder again
def test_fit_then_test_and_predict_from_its_checkpoint(config, tmp_path, capsys):
    assert main(["fit", "--config", config, "--lora.config.rank=3"]) == 0
    output = capsys.readouterr()
    assert "Epoch 0: 100%" in output.err + output.out  # a progress bar, though nothing here is a terminal
    run = tmp_path / "run"
    assert "val_accuracy" in (run / "metrics.csv").read_text()
    (checkpoint,) = run.glob("checkpoints/*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state and all("lora_" in name for name in state)
    assert {tensor.shape[0] for name, tensor in state.items() if name.endswith("lora_A")} == {3}

    arguments = ["--config", config, "--lora.config.rank=3", "--ckpt_path", str(checkpoint)]
    assert main(["test", *arguments]) == 0
    assert "test_accuracy" in capsys.readouterr().out
    assert main(["validate", *arguments]) == 0
    assert "val_perplexity" in capsys.readouterr().out
    assert main(["predict", *arguments, "--trainer.enable_progress_bar=false"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in tiny_lm.rows(6)]


def test_galore_trains_every_weight_from_yaml_and_resumes(config, model, tmp_path):
    layer = tmp_path / "galore.yaml"
    layer.write_text("full_finetuning: true\nmodel: {galore: {rank: 4, update_proj_gap: 2}}\n")
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(tmp_path / "saved"), "save_last": True},
    }
    arguments = ["--config", config, "--config", str(layer), f"--trainer.callbacks={json.dumps([checkpoint])}"]
    assert main(["fit", *arguments]) == 0
    saved = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(model).state_dict()
    weights = {name.removeprefix("model."): tensor for name, tensor in saved["state_dict"].items() if name.startswith("model.")}
    assert weights.keys() == base.keys() and not any(torch.equal(weights[name], base[name]) for name in base)
    groups = saved["optimizer_states"][0]["param_groups"]
    assert [(group["name"], group.get("rank")) for group in groups] == [("galore", 4), ("other", None), ("no_decay", None)]
    assert saved["optimizer_states"][0]["state"][0]["exp_avg"].shape == (32, 4)
    resumed = ["--trainer.max_epochs=2", "--ckpt_path", str(tmp_path / "saved" / "last.ckpt")]
    with pytest.warns(UserWarning, match="exists and is not empty"):
        assert main(["fit", *arguments, *resumed]) == 0


def test_lora_plus_from_yaml_in_one_line(config, tmp_path):
    content = yaml.safe_load(Path(config).read_text())
    content["lora"]["lora_plus_ratio"] = 16
    Path(config).write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", config]) == 0
    (checkpoint,) = (tmp_path / "run").glob("checkpoints/*.ckpt")
    a, b = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert b["initial_lr"] == 16 * a["initial_lr"] == pytest.approx(0.16) and all(name.endswith("lora_B") for name in b["params"])


def test_a_second_fit_in_the_same_folder_works(config, tmp_path):
    once = ["fit", "--config", config, "--trainer.limit_train_batches=1", "--trainer.enable_checkpointing=false"]
    assert main([*once, "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]) == 0
    assert (tmp_path / "config.yaml").is_file()
    assert main([*once, "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}", "--lora.config.rank=5"]) == 0
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lora"]["config"]["rank"] == 5


class Head(lightning.LightningModule):
    """A user's own module, with its own optimizer."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.layer = torch.nn.Linear(32, width)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).pow(2).mean()

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


OWN = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
OWN += ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]


def test_any_module_and_data_fit_under_the_same_command(tmp_path, monkeypatch):
    own = ["--model=tests.cli.test_cli.Head", "--model.width=4", f"--data={BoringDataModule.__module__}.BoringDataModule"]
    lora = ["--lora.config.target_modules=[layer]", "--lora.config.rank=2", "--lora.merge_on_fit_end=false"]
    cli = LoRACLI([*own, *lora, *OWN, f"--trainer.default_root_dir={tmp_path}"], run=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.model.layer.out_features == 4
    assert cli.model.layer.lora_B.abs().max() > 0 and not cli.model.layer.weight.requires_grad


def test_compile_from_yaml(tmp_path):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"lora": {"compile": "layer"}}))
    own = ["--model=tests.cli.test_cli.Head", "--model.width=4", f"--data={BoringDataModule.__module__}.BoringDataModule"]
    cli = LoRACLI(["--config", str(tmp_path / "own.yaml"), *own, *OWN, f"--trainer.default_root_dir={tmp_path}"], run=False)
    assert [callback.compile for callback in cli.trainer.callbacks if isinstance(callback, LoRACallback)] == ["layer"]


def test_a_users_own_lightning_cli_takes_the_callback_from_yaml(tmp_path, monkeypatch):
    content = {"trainer": {"callbacks": [{"class_path": "lightning_lora.LoRACallback", "init_args": {"merge_on_fit_end": False}}]}}
    content["trainer"]["callbacks"][0]["init_args"]["config"] = {"rank": 2, "target_modules": ["layer"]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    arguments = ["fit", "--config", str(tmp_path / "own.yaml"), f"--trainer.default_root_dir={tmp_path}", *OWN]
    monkeypatch.setattr(sys, "argv", ["own"])
    cli = LightningCLI(Head, BoringDataModule, args=arguments, seed_everything_default=0)
    assert any(isinstance(callback, LoRACallback) for callback in cli.trainer.callbacks)
    assert cli.model.layer.lora_A.shape == (2, 32) and cli.model.layer.lora_B.abs().max() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--lora.compile=model"], r"lora.compile.*Expected a .*layer"),
        (["fit", "--lora.config.rank=0"], r"rank=0: the rank is a whole number"),
        (["fit", "--lora.config.rank=1.5"], r'"lora.config".*Expected a <class .int.>. Got value: 1.5'),
        (["fit", "--lora.config.bias=some"], r"bias.*some"),
        (["fit", "--model.learning_rate=-1"], r"learning_rate.*-1"),
        (["fit", "--lora.lora_plus_ratio=0"], r"lora_plus_ratio=0"),
        (["fit", "--model.galore.rank=4"], r"q_proj.weight is frozen, .*full_finetuning: true"),
        (["fit", "--model.galore.rank=0"], r"rank=0"),
        (["fit", "--data.batch_size=0"], r"batch_size.*0"),
        (["fit", "--trainer.nothing=1"], r"nothing"),
        (["fit", "--config=none.yaml"], r"none.yaml"),
        (["fit", "--data.train=none.jsonl"], r"data.train='none.jsonl': no such file"),
        (["fit", "--lora.config.target_modules=[q_prej]"], r"q_prej.*q_proj"),
        (["fit", "--model.model=/no/such/model"], r"/no/such/model"),
        (["test", "--ckpt_path=none.ckpt"], r"none.ckpt"),
        (["melt"], r"no command 'melt'; there are fit, validate"),
        (["inspect", "/no/such/model"], r"/no/such/model"),
        (["inspect"], r"path"),
        (["inspect", "{model}", "--lora.rank=-2"], r"rank=-2"),
        (["inspect", "{model}", "--lora.target_modules=[q_prej]"], r"q_prej.*q_proj"),
        (["generate", "{model}", ""], r"prompt is empty"),
        (["generate", "{model}", "a", "--max_new_tokens=0"], r"max_new_tokens.*0"),
        (["generate", "{model}", "a", "--adapter=/no/such/adapter"], r"/no/such/adapter"),
        (["merge", "{model}", "/no/such/adapter", "{tmp}/out"], r"/no/such/adapter"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(arguments, message, config, model, tmp_path, capsys):
    arguments = [a.format(model=model, tmp=tmp_path) for a in arguments]
    if arguments[0] in ("fit", "test") and not arguments[1].startswith("--config"):
        arguments[1:1] = ["--config", config]
    assert main(arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-lora: error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "out").exists()


def test_a_traceback_on_request(monkeypatch):
    monkeypatch.setenv("LIGHTNING_LORA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no command"):
        main(["melt"])


ADALORA = str(Path(__file__).parents[2] / "configs" / "adalora.yaml")


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_adalora_from_its_yaml_on_top_of_another(model, config, tmp_path, capsys, caplog):
    """`callbacks+` adds to the list; what stands under lora, and on the command line, goes to the callback there."""
    arguments = ["--config", config, "--config", ADALORA, "--lora.config.rank=8", "--lora.config.target_modules=all-linear"]
    assert main(["fit", *arguments, "--trainer.max_epochs=5", "--lora.merge_on_fit_end=false"]) == 0
    assert "LoRA on 14 modules" in caplog.text and "AdaLoRA: 14 modules from rank 8 to 4.00 on average" in caplog.text
    assert "merged into" not in caplog.text
    (checkpoint,) = (tmp_path / "run").glob("checkpoints/*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    found = [int(tensor.count_nonzero()) for name, tensor in state.items() if name.endswith("lora_E")]
    assert len(found) == 14 and sum(found) == 14 * 4 and len(set(found)) > 1

    saved = tmp_path / "run" / "config.yaml"  # what Lightning writes beside the metrics runs too
    assert main(["fit", "--config", str(saved), "--trainer.limit_val_batches=1", "--trainer.enable_checkpointing=false"]) == 0
    assert main(["test", *arguments, f"--ckpt_path={checkpoint}"]) == 0
    assert "test_accuracy" in capsys.readouterr().out
    assert main(["merge", model, str(checkpoint), str(tmp_path / "merged")]) == 0
    ids = torch.arange(4, 14)[None]
    with torch.no_grad():
        mine = load_adapter(transformers.AutoModelForCausalLM.from_pretrained(model), checkpoint)(ids).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(merged, mine, rtol=1e-4, atol=1e-4)


def test_two_lora_configs_are_one_too_many(config, capsys):
    own = ["--trainer.callbacks+=lightning_lora.AdaLoRACallback", "--trainer.callbacks.config.target_modules=[v_proj]"]
    assert main(["fit", "--config", config, *own]) == 1
    assert "AdaLoRACallback has a config of its own, and lora is set too" in capsys.readouterr().err


def test_a_callback_with_its_own_config_needs_no_lora_section(config, tmp_path, caplog):
    content = yaml.safe_load(Path(config).read_text())
    del content["lora"]
    own = {"target_rank": 2, "init_rank": 4, "config": {"target_modules": ["v_proj"], "alpha": 4}}
    content["trainer"] |= {"max_epochs": 2, "callbacks": [{"class_path": "lightning_lora.AdaLoRACallback", "init_args": own}]}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", str(file)]) == 0
    assert "AdaLoRA: 2 modules from rank 4 to 2.00" in caplog.text


def test_help_lists_every_command(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        output = capsys.readouterr().out
        assert all(f"\n  {name} " in output for name in ("fit", "validate", "test", "predict", "inspect", "merge", "generate"))
    for command in ("fit", "merge"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
    assert "--overwrite" in capsys.readouterr().out


def test_the_help_says_that_a_config_is_code(capsys):
    for command in ([], ["fit"], ["predict"]):
        try:
            main([*command, "--help"])
        except SystemExit as stop:
            assert stop.code == 0
        assert "take one only from" in capsys.readouterr().out


def test_a_value_cannot_name_what_runs_a_shell(config, capsys):
    for value in ("os.system", "subprocess.run", "builtins.eval"):
        assert main(["fit", "--config", config, f"--trainer.callbacks+={value}", "--trainer.fast_dev_run=true"]) == 1
        assert "is not allowed, denied by" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Experiment logs directory")  # the same folder again
def test_a_checkpoint_does_not_choose_the_model(config, tmp_path, monkeypatch):
    """Lightning's command line would import the class that a checkpoint names, and build it with the arguments there."""
    assert main(["fit", "--config", config, f"--trainer.default_root_dir={tmp_path}"]) == 0
    file = next(tmp_path.rglob("*.ckpt"))
    content = torch.load(file, weights_only=True)
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    torch.save({**content, "hyper_parameters": {"_class_path": "stranger.Model", "model": "another"}}, file)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["test", "--config", config, f"--ckpt_path={file}", f"--trainer.default_root_dir={tmp_path}"]) == 0
    assert not (tmp_path / "ran").exists()


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


def test_the_command_line_starts_without_heavy_imports():
    code = "import sys, lightning_lora.cli.main as c; c.main(['--help']); print(sorted({'transformers', 'lightning'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_inspect_a_model_reads_no_weights(model, tmp_path, capsys):
    folder = tmp_path / "config-only"
    folder.mkdir()
    (folder / "config.json").write_bytes(Path(model, "config.json").read_bytes())
    assert main(["inspect", str(folder), "--lora.rank=4", "--lora.target_modules=all-linear"]) == 0
    assert "LoRA on 14 modules" in capsys.readouterr().out


def test_inspect_an_adapter_and_a_checkpoint(adapter, config, tmp_path, capsys):
    assert main(["inspect", adapter]) == 0
    output = capsys.readouterr().out
    assert "rank=4" in output and "q_proj.lora_A  (4, 32)  float32" in output and "8 tensors, 896 parameters" in output
    assert main(["fit", "--config", config, "--trainer.limit_train_batches=1"]) == 0
    (checkpoint,) = (tmp_path / "run").glob("checkpoints/*.ckpt")
    capsys.readouterr()
    assert main(["inspect", str(checkpoint)]) == 0
    assert "rank=2" in capsys.readouterr().out


def test_merge_gives_the_adapted_models_logits_and_plain_classes(model, adapter, tmp_path):
    out = tmp_path / "merged"
    assert main(["merge", model, adapter, str(out)]) == 0
    ids = torch.arange(4, 14)[None]
    base, merged = (transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (model, out))
    assert merged.state_dict().keys() == base.state_dict().keys()
    with torch.no_grad():
        plain, ours = base(ids).logits, merged(ids).logits
        theirs = load_adapter(base, adapter)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 1e-2
    assert transformers.AutoTokenizer.from_pretrained(out)("blue").input_ids == tiny_lm.tokenizer()("blue").input_ids


def test_merge_never_loses_what_is_there(model, adapter, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("precious")
    assert main(["merge", model, adapter, str(out)]) == 1
    assert "is not empty; name another folder, or pass --overwrite" in capsys.readouterr().err
    assert main(["merge", model, "/no/such/adapter", str(out), "--overwrite"]) == 1
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "old"]
    assert main(["merge", model, adapter, model, "--overwrite"]) == 1
    assert "which it is made from" in capsys.readouterr().err and Path(model, "model.safetensors").is_file()
    assert main(["merge", model, adapter, str(out), "--overwrite"]) == 0
    assert not (out / "old").exists() and (out / "model.safetensors").is_file()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert main(["merge", model, adapter, str(out / "model.safetensors")]) == 1
    assert "is a file; name a folder" in capsys.readouterr().err


def test_generate_answers_with_and_without_the_adapter(model, adapter, capsys):
    answers = []
    for extra in ([], ["--adapter", adapter], ["--system", "name a colour"]):
        assert main(["generate", model, "which colour is the sky", "--max_new_tokens=6", *extra]) == 0
        answers.append(capsys.readouterr().out.strip())
    assert len(set(answers)) == 3

    network, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(model), tiny_lm.tokenizer()
    chat = [{"role": "user", "content": "which colour is the sky"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    expected = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert answers[0] == tokenizer.decode(expected, skip_special_tokens=True)
