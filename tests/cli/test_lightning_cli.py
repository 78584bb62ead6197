import json
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import transformers
import yaml
from lightning.pytorch.demos.boring_classes import BoringDataModule
from lightning.pytorch.loggers import CSVLogger

from lightning_lora import LoRACallback, load_adapter
from lightning_lora.cli.lightning_cli import LoRACLI
from lightning_lora.cli.main import main
from tests import tiny_lm


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


def test_a_second_fit_in_the_same_folder_works(config, tmp_path, capsys):
    once = ["fit", "--config", config, "--trainer.limit_train_batches=1", "--trainer.enable_checkpointing=false"]
    assert main([*once, "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]) == 0
    first = (tmp_path / "config.yaml").read_text()
    assert main([*once, "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}", "--lora.config.rank=5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["config"] == str(tmp_path / "config-v1.yaml") and report["adapter"] == [str(tmp_path / "adapter-v1")]
    assert yaml.safe_load(Path(report["config"]).read_text())["lora"]["config"]["rank"] == 5
    assert (tmp_path / "config.yaml").read_text() == first


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_without_a_logger_no_file_of_the_users_is_overwritten(command, config, tmp_path, monkeypatch):
    """Their own ``config.yaml`` beside them, above all: the run's would have replaced it."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(Path(config).read_text())
    before = Path("config.yaml").read_text()
    options = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.limit_val_batches=1"]
    assert main([command, "--config", "config.yaml", *options, *(["--trainer.limit_train_batches=1"] if command == "fit" else [])]) == 0
    assert Path("config.yaml").read_text() == before
    assert Path("config-v1.yaml").exists() == (command == "fit")


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


class Data(BoringDataModule):
    """A user's own data, whose defaults are others than the package's."""

    def __init__(self, seed: int = 9, batch_size: int = 5, train: str = "mine"):
        super().__init__()
        self.given = (seed, batch_size, train)


OWN = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
OWN += ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]


def test_any_module_and_data_fit_under_the_same_command(tmp_path, monkeypatch):
    own = ["--model=tests.cli.test_lightning_cli.Head", "--model.width=4", f"--data={BoringDataModule.__module__}.BoringDataModule"]
    lora = ["--lora.config.target_modules=[layer]", "--lora.config.rank=2", "--lora.merge_on_fit_end=false"]
    cli = LoRACLI([*own, *lora, *OWN, f"--trainer.default_root_dir={tmp_path}"], run=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.model.layer.out_features == 4
    assert cli.model.layer.lora_B.abs().max() > 0 and not cli.model.layer.weight.requires_grad


@pytest.mark.parametrize(("given", "expected"), [({}, (9, 5, "mine")), ({"seed": 0}, (0, 5, "mine")), ({"train": "x"}, (9, 5, "x"))])
def test_the_packages_defaults_stay_with_the_packages_classes(given, expected, tmp_path):
    content = {"model": {"class_path": f"{__name__}.Head"}, "data": {"class_path": f"{__name__}.Data", "init_args": given}}
    content["trainer"] = {"logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    cli = LoRACLI(["--config", str(tmp_path / "own.yaml"), "--trainer.accelerator=cpu"], run=False)
    assert cli.datamodule.given == expected and cli.model.layer.out_features == 32


class OtherLogger(CSVLogger):
    """A user's own."""

    def __init__(self, save_dir: str, name: str = "mine"):
        super().__init__(save_dir, name)


def test_another_loggers_name_is_its_own(tmp_path):
    own = [f"--model={__name__}.Head", f"--data={__name__}.Data", f"--trainer.logger={__name__}.OtherLogger"]
    cli = LoRACLI([*own, f"--trainer.logger.save_dir={tmp_path}", "--trainer.accelerator=cpu"], run=False)
    assert cli.trainer.logger.name == "mine"
    assert "lora" in str(LoRACLI([*own[:2], "--trainer.accelerator=cpu"], run=False).trainer.log_dir)


class Mine(LoRACallback):
    """A user's own callback, with other defaults."""

    def __init__(self, check_base: bool = False, **kwargs: Any):
        super().__init__(check_base=check_base, **kwargs)


def test_what_is_set_at_a_callback_stays(capsys):
    own = [f"--model={__name__}.Head", f"--data={__name__}.Data", "--trainer.accelerator=cpu", f"--trainer.callbacks+={__name__}.Mine"]
    cli = LoRACLI([*own, "--trainer.callbacks.merge_on_fit_end=false", "--lora.check_gradients=false"], run=False)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, LoRACallback))
    assert (callback.merge_on_fit_end, callback.check_base, callback.check_gradients) == (False, False, False)
    with pytest.raises(ValueError, match=r"Mine has a merge_on_fit_end of its own, and lora.merge_on_fit_end is set too"):
        LoRACLI([*own, "--trainer.callbacks.merge_on_fit_end=false", "--lora.merge_on_fit_end=true"], run=False)


@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:Checkpoint directory", "ignore:.*val_dataloader")
def test_options_beat_what_a_checkpoint_says(config, tmp_path, capsys, caplog):
    """LightningCLI would train the checkpoint's model, at the checkpoint's rate."""
    once = ["--config", config, "--trainer.limit_val_batches=0"]
    assert main(["fit", *once]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    other = str(tmp_path / "other")
    torch.manual_seed(5)
    network = tiny_lm.llama()
    torch.nn.init.normal_(network.lm_head.weight)
    network.save_pretrained(other)
    tiny_lm.tokenizer().save_pretrained(other)
    capsys.readouterr()
    assert main(["test", *once, f"--model.model={other}", f"--ckpt_path={checkpoint}"]) == 2
    assert "was trained on another base" in capsys.readouterr().err
    resumed = [f"--ckpt_path={checkpoint}", "--model.learning_rate=0.5", "--model.weight_decay=0.1", "--trainer.max_epochs=2"]
    assert main(["fit", *once, *resumed]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["model"]["init_args"]["learning_rate"] == 0.5
    assert "learning_rate=0.5 has no effect: the optimizer goes on with 0.01, from the checkpoint" in caplog.text


def test_stdout_of_predict_holds_predictions_only(config, capsys, caplog):
    assert main(["predict", "--config", config]) == 0
    output = capsys.readouterr()
    assert [json.loads(line)["prompt"] for line in output.out.splitlines()] == [row["prompt"] for row in tiny_lm.rows(6)]
    assert "Predicting" in output.err and "Weights of this predict: the model as it was loaded" in caplog.text


def test_bars_go_to_stderr(config, capsys):
    assert main(["test", "--config", config]) == 0
    output = capsys.readouterr()
    assert "Testing" in output.err and "Testing" not in output.out and "test_accuracy" in output.out


def test_last_means_a_checkpoint_of_this_run(config, tmp_path, capsys):
    once = ["--config", config, "--trainer.limit_val_batches=0", "--trainer.logger.version=null"]
    assert main(["fit", *once]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    before = sorted(tmp_path.rglob("*"))
    assert main(["fit", *once, "--ckpt_path=last"]) == 2  # a new version has none yet
    assert f"the newest checkpoint nearby is {str(checkpoint)!r}; give the file" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_compile_from_yaml(tmp_path):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"lora": {"compile": "layer"}}))
    own = ["--model=tests.cli.test_lightning_cli.Head", "--model.width=4", f"--data={BoringDataModule.__module__}.BoringDataModule"]
    cli = LoRACLI(["--config", str(tmp_path / "own.yaml"), *own, *OWN, f"--trainer.default_root_dir={tmp_path}"], run=False)
    assert [callback.compile for callback in cli.trainer.callbacks if isinstance(callback, LoRACallback)] == ["layer"]


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


@pytest.mark.parametrize(("key", "text"), [("lora.config", "{rank: 3}"), ("lora", "config: {rank: 3}")])
def test_a_section_may_stand_in_a_file_of_its_own(key, text, config, tmp_path):
    (tmp_path / "section.yaml").write_text(text)
    cli = LoRACLI(["--config", config, f"--{key}", str(tmp_path / "section.yaml")], run=False)
    (callback,) = (each for each in cli.trainer.callbacks if isinstance(each, LoRACallback))
    assert callback.config.rank == 3


def test_two_lora_configs_are_one_too_many(config, capsys):
    own = ["--trainer.callbacks+=lightning_lora.AdaLoRACallback", "--trainer.callbacks.config.target_modules=[v_proj]"]
    assert main(["fit", "--config", config, *own]) == 2
    assert "AdaLoRACallback has a config of its own, and lora.config is set too" in capsys.readouterr().err


def test_a_callback_with_its_own_config_needs_no_lora_section(config, tmp_path, caplog):
    content = yaml.safe_load(Path(config).read_text())
    del content["lora"]
    own = {"target_rank": 2, "init_rank": 4, "config": {"target_modules": ["v_proj"], "alpha": 4}}
    content["trainer"] |= {"max_epochs": 2, "callbacks": [{"class_path": "lightning_lora.AdaLoRACallback", "init_args": own}]}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", str(file)]) == 0
    assert "AdaLoRA: 2 modules from rank 4 to 2.00" in caplog.text


def test_the_help_says_that_a_config_is_code(capsys):
    for command in ([], ["fit"], ["predict"]):
        try:
            main([*command, "--help"])
        except SystemExit as stop:
            assert stop.code == 0
        assert "take one only from" in capsys.readouterr().out


def test_a_value_cannot_name_what_runs_a_shell(config, capsys):
    for value in ("os.system", "subprocess.run", "builtins.eval"):
        assert main(["fit", "--config", config, f"--trainer.callbacks+={value}", "--trainer.fast_dev_run=true"]) == 2
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
