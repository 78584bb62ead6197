"""``lightning-lora sweep``: each trial is what ``fit`` with its options is."""

import csv
import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_lora.cli.main import main
from lightning_lora.trials.joint_step import JointStep
from tests import tiny_lm
from tests.tasks import tiny


@pytest.fixture
def steps(monkeypatch):
    """How many steps of trials every joint step served."""
    served = []

    class Counted(JointStep):
        def __call__(self, members, batches):
            results = super().__call__(members, batches)
            served.append(len(members))
            return results

    monkeypatch.setattr("lightning_lora.trials.side_by_side.JointStep", Counted)
    return served


@pytest.fixture
def run(model, tmp_path):
    """A run in float64 with dropout, whose rows have several lengths."""
    files = {split: tiny_lm.write(tmp_path / f"{split}.jsonl", tiny_lm.rows(10)) for split in ("train", "val", "test")}
    content = {
        "model": {"model": model, "learning_rate": 1e-2},
        "data": {**files, "batch_size": 3, "cache": False},
        "lora": {"config": {"rank": 2, "dropout": 0.1}},
        "trainer": {"max_epochs": 2, "num_sanity_val_steps": 0, "accelerator": "cpu", "precision": "64-true", "log_every_n_steps": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return ["--config", str(tmp_path / "run.yaml")]


def fit(words, folder):
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder.parent), "name": folder.name, "version": ""},
    }
    assert main(["fit", *words, f"--trainer.logger={json.dumps(logger)}", "--trainer.enable_progress_bar=false"]) == 0


def numbers(folder):
    return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines())]


def assert_same(trial: Path, single: Path, least: int = 4) -> None:
    """The same files, the same numbers to 1e-6 (metrics are in fp32), in every logged value and every tensor."""
    assert {p.relative_to(trial) for p in trial.rglob("*")} == {p.relative_to(single) for p in single.rglob("*")}
    mine, theirs = numbers(trial), numbers(single)
    assert [row.keys() for row in mine] == [row.keys() for row in theirs] and len(mine) > least
    for one, other in zip(mine, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    for file in trial.rglob("*.safetensors"):
        other = load_file(single / file.relative_to(trial))
        for name, tensor in load_file(file).items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-6, atol=1e-6)  # adapters are saved in fp32
    for file in trial.rglob("*.ckpt"):
        one, other = (torch.load(path, weights_only=True) for path in (file, single / file.relative_to(trial)))
        assert one["global_step"] == other["global_step"]
        for name, tensor in one["state_dict"].items():
            torch.testing.assert_close(tensor, other["state_dict"][name], rtol=1e-7, atol=1e-7)
        for key, state in one["optimizer_states"][0]["state"].items():
            for name, tensor in state.items():
                torch.testing.assert_close(tensor, other["optimizer_states"][0]["state"][key][name], rtol=1e-7, atol=1e-7)


def test_each_trial_is_what_fit_is(run, steps, tmp_path, capsys):
    """Ranks, rates, seeds, with dropout: every metric, the adapter, the checkpoint with the optimizer's state."""
    words = ["sweep", *run, "--rank", "2,3", "--learning_rate", "3e-3", "--seed=0,1", "--folder", str(tmp_path / "sweep"), "--json"]
    assert main([*words, "--side_by_side", "true"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["trials"]) == 4 and steps == [4] * 8  # 2 epochs of 4 batches: one pass each for all
    assert report["best"] == min(report["trials"], key=lambda trial: trial["best"])["name"]
    assert all(trial["monitor"] == "val_loss" and trial["steps"] == 8 for trial in report["trials"])
    options = ["--lora.config.rank=3", "--model.learning_rate=3e-3", "--seed_everything=0", "--data.seed=0"]
    fit([*run, *options], tmp_path / "single")
    assert_same(tmp_path / "sweep" / "rank3-learning_rate3e-3-seed0", tmp_path / "single")
    table = list(csv.reader((tmp_path / "sweep" / "sweep.csv").read_text().splitlines()))
    assert table[0][:4] == ["trial", "rank", "learning_rate", "seed"] and len(table) == 5


TRIALS = """
- {name: long, trainer.max_epochs: 3}
- {name: small, data.batch_size: 2, lora.config.target_modules: all-linear}
- {name: dora, lora.config.variant: dora, trainer.accumulate_grad_batches: 2, trainer.gradient_clip_val: 0.1}
- {name: stops, trainer.max_epochs: 9, trainer.callbacks: [{class_path: lightning.pytorch.callbacks.EarlyStopping,
    init_args: {monitor: val_loss, patience: 1, min_delta: 9}}]}
"""


def test_trials_that_differ_in_length_batch_variant_and_stop(run, steps, tmp_path, capsys):
    (tmp_path / "trials.yaml").write_text(TRIALS)
    words = ["sweep", *run, "--trials", str(tmp_path / "trials.yaml"), "--folder", str(tmp_path / "sweep")]
    assert main([*words, "--side_by_side=true"]) == 0
    assert "best: " in capsys.readouterr().out
    assert set(steps) >= {2, 4}, "the longer ones go on together"
    for trial in yaml.safe_load(TRIALS):
        name = trial.pop("name")
        fit(
            [*run, *(f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in trial.items())],
            tmp_path / "single" / name,
        )
        assert_same(tmp_path / "sweep" / name, tmp_path / "single" / name)
    epochs = [row["epoch"] for row in numbers(tmp_path / "sweep" / "stops")]
    assert epochs[-1] < 8, "it stopped early"


def test_fewer_at_once_make_room_for_the_next(run, steps, tmp_path):
    words = [*run, "--rank=1,2,3", "--folder", str(tmp_path / "sweep"), "--trainer.max_epochs=1", "--at_once", "2"]
    assert main(["sweep", *words]) == 0
    assert steps == [2] * 4, "the third has nobody beside it"
    fit([*run, "--trainer.max_epochs=1", "--lora.config.rank=3"], tmp_path / "single")
    assert_same(tmp_path / "sweep" / "rank3", tmp_path / "single")


def test_gradient_checkpointing_draws_dropout_twice_and_is_named(run, tmp_path, caplog):
    words = ["sweep", *run, "--rank=1,2", "--folder", str(tmp_path / "sweep"), "--model.gradient_checkpointing=true"]
    words += ["--trainer.max_steps=1", "--lora.config.dropout=0.5"]
    assert main(words) == 0
    told = "one after another: the model draws other random numbers for several trials than for one: gradient checkpointing draws"
    assert told in caplog.text


def test_a_fresh_head_and_the_bases_own_dropout(steps, tmp_path):
    """Heads that train in full, drawn by each trial's seed; a model whose own dropout draws, and whose padding has no place of its own."""
    model, rows = tiny.save(tmp_path / "model", "bert"), [{"text": text, "label": label} for text, label in TEXTS]
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_dropout_prob": 0.2}))
    files = [f"--data.{split}={tiny_lm.write(tmp_path / f'{split}.jsonl', rows)}" for split in ("train", "val")]
    run = ["--model=SequenceClassificationTask", f"--model.model={model}", *files, "--data.batch_size=3", "--data.cache=false"]
    run += ["--lora.config.target_modules=all-linear", "--lora.config.dropout=0.1", "--trainer.max_epochs=2", "--trainer.precision=64-true"]
    run += ["--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"]
    assert main(["sweep", *run, "--rank=1,2", "--seed=3,4", "--folder", str(tmp_path / "sweep"), "--side_by_side=true"]) == 0
    assert steps == [4] * 6
    fit([*run, "--lora.config.rank=2", "--seed_everything=4", "--data.seed=4"], tmp_path / "single")
    assert_same(tmp_path / "sweep" / "rank2-seed4", tmp_path / "single")


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_an_init_that_reads_data_reads_the_trials_own(run, init, tmp_path):
    """It runs training steps before training: these take part in no joint step."""
    words = [*run, f"--lora.config.init={init}", "--lora.init_batches=2", "--trainer.max_epochs=1"]
    (tmp_path / "trials.yaml").write_text("- {name: one, rank: 2, seed: 0}\n- {name: other, rank: 3, seed: 1}\n")
    assert main(["sweep", *words, "--trials", str(tmp_path / "trials.yaml"), "--folder", str(tmp_path / "sweep")]) == 0
    for name, rank, seed in (("one", 2, 0), ("other", 3, 1)):
        fit([*words, f"--lora.config.rank={rank}", f"--seed_everything={seed}", f"--data.seed={seed}"], tmp_path / "single" / name)
        assert_same(tmp_path / "sweep" / name, tmp_path / "single" / name, least=3)


TEXTS = [("the sky is blue", "sky"), ("blood is red", "blood"), ("a green apple", "fruit"), ("which pear", "fruit")] * 2


def test_an_interrupted_sweep_goes_on(run, tmp_path, capsys, monkeypatch):
    """What is complete is kept, what has a checkpoint resumes, what has none starts; a signal stops all after their batch."""
    (tmp_path / "trials.yaml").write_text("- {name: short, trainer.max_steps: 2}\n- {name: long}\n- {name: other, seed: 1}\n")
    words = ["sweep", *run, "--trials", str(tmp_path / "trials.yaml"), "--folder", str(tmp_path / "sweep"), "--json"]
    seen = []

    class Told(JointStep):
        def __call__(self, members, batches):
            seen.append(len(members))
            if len(seen) == 6:
                signal.raise_signal(signal.SIGTERM)
            return super().__call__(members, batches)

    monkeypatch.setattr("lightning_lora.trials.side_by_side.JointStep", Told)
    assert main(words) == 143
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [record[name]["status"] for name in ("short", "long", "other")] == ["complete", "interrupted", "interrupted"]
    written = (tmp_path / "sweep" / "short" / "metrics.csv").stat().st_mtime_ns
    (tmp_path / "sweep" / "other").rename(tmp_path / "away")  # as if it had never written anything
    capsys.readouterr()
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(trial["status"], trial["steps"]) for trial in report["trials"]] == [("complete", 2), ("complete", 8), ("complete", 8)]
    assert (tmp_path / "sweep" / "short" / "metrics.csv").stat().st_mtime_ns == written
    for name, seed in (("long", 0), ("other", 1)):
        fit([*run, *([f"--seed_everything={seed}", f"--data.seed={seed}"] if seed else [])], tmp_path / "single" / name)
        mine, theirs = numbers(tmp_path / "sweep" / name), numbers(tmp_path / "single" / name)
        assert mine == [pytest.approx(row, rel=1e-6) for row in theirs[-len(mine) :]] and len(mine) > 2
    assert (tmp_path / "sweep" / "long" / "metrics-before-1.csv").exists()
    assert main([*words, "--lora.config.alpha=3"]) == 2
    assert "holds another sweep" in capsys.readouterr().err


def test_trials_told_to_stop_at_an_epochs_end_count_their_batch(run, tmp_path, monkeypatch):
    """A trial that stopped before that, resumed, was killed and resumed again, skipped an epoch."""

    class Told(JointStep):
        def __call__(self, members, batches):
            if self.steps == 3 * len(members):  # the last of the epoch's four
                signal.raise_signal(signal.SIGTERM)
            return super().__call__(members, batches)

    monkeypatch.setattr("lightning_lora.trials.side_by_side.JointStep", Told)
    assert main(["sweep", *run, "--rank=1,2", "--folder", str(tmp_path / "sweep")]) == 143
    for rank in ("rank1", "rank2"):
        state = torch.load(tmp_path / "sweep" / rank / "checkpoints" / "last-interrupted.ckpt", weights_only=True)["loops"]["fit_loop"]
        assert state["epoch_loop.batch_progress"]["current"]["completed"] == 4


@pytest.mark.filterwarnings("ignore:Encountered `nan` values")
def test_a_trial_that_diverges_leaves_the_others_as_they_are(run, tmp_path, capsys):
    """Also where all rows are in one row, and an attention would carry its NaN to the others."""
    words = [*run, "--trials={trials}", "--folder", str(tmp_path / "sweep"), "--json"]
    (tmp_path / "trials.yaml").write_text("- {name: bad, learning_rate: 1.0e+200}\n- {name: good, learning_rate: 1.0e-2}\n")
    words[2] = f"--trials={tmp_path / 'trials.yaml'}"
    assert main(["sweep", *words, "--trainer.log_every_n_steps=5"]) == 0
    bad, good = json.loads(capsys.readouterr().out)["trials"]
    assert (bad["status"], good["status"]) == ("failed", "complete") and "NaN" in bad["error"]
    fit([*run, "--trainer.log_every_n_steps=5"], tmp_path / "single")
    assert_same(tmp_path / "sweep" / "good", tmp_path / "single", least=1)


def test_a_value_that_no_trial_has_is_told_and_another_needs_no_training(run, tmp_path, capsys):
    words = ["sweep", *run, "--rank=1,2", "--folder", str(tmp_path / "sweep"), "--trainer.max_epochs=1"]
    assert main([*words, "--monitor=val_acc"]) == 0
    assert "no complete trial has a value 'val_acc'; there are train_loss, val_accuracy, val_loss" in capsys.readouterr().out
    written = (tmp_path / "sweep" / "rank1" / "metrics.csv").stat().st_mtime_ns
    for monitor, choose in (("val_loss", min), ("val_perplexity", min), ("val_accuracy", max)):
        assert main([*words, f"--monitor={monitor}", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        seen = {
            trial["name"]: [row[monitor] for row in numbers(tmp_path / "sweep" / trial["name"]) if monitor in row]
            for trial in report["trials"]
        }
        assert {trial["name"]: trial["best"] for trial in report["trials"]} == pytest.approx(
            {name: choose(each) for name, each in seen.items()}
        )
        assert report["best"] is not None
    assert (tmp_path / "sweep" / "rank1" / "metrics.csv").stat().st_mtime_ns == written


def test_a_folder_that_is_a_file_is_refused(run, tmp_path, capsys):
    (tmp_path / "sweep").write_text("")
    assert main(["sweep", *run, "--rank=1,2", "--folder", str(tmp_path / "sweep")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which trials"),
        (["--ranks", "2,4"], "no option 'ranks'; did you mean 'rank'?"),
        (["--rank=2,4", "--monitr=val_loss"], "no option 'monitr'; did you mean 'monitor'?"),
        (["--rank=2,4", "--lora.config.rank=8"], "--rank 2,4 and --lora.config.rank set the same option"),
        (["--rank=2,4", "runs"], "'runs' is one argument too many"),
        (["--seed=a"], "seed_everything: expected true or false or a whole number, got a"),
        (["--rank"], "--rank: give a value"),
        (["--rank=2,2"], "two trials are 'rank2'"),
        (["--rank=2,0"], "rank"),
        (["--rank=2,"], "--rank 2,: a value between commas is empty"),
        (["--rank=2", "--trials=x.yaml"], "are two descriptions"),
        (["--trials=x.yaml"], "no such file"),
        (["--trials={wrong}"], "trial 1: 'ranks' is neither"),
        (["--trials={twice}"], "twice.yaml, line 2: the key 'rank' is there twice; remove one"),
        (["--rank=2,3", "--trainer.default_root_dir=there"], "a sweep writes into --folder, which is "),
        (["--rank=2,3", "--at_once=0"], "at least 1"),
        (["--rank=2,3", "--side_by_side=maybe"], "auto, true and false"),
        (["--rank=2,3", "--mode=most"], "min and max"),
        (["--rank=2,3", "--monitor=val_accuracy", "--data.val=null"], "--monitor val_accuracy: data.val is not set"),
        (["--rank=2,3", "--monitor=val_loss", "--trainer.limit_val_batches=0"], "trainer.limit_val_batches=0, so nothing is validated"),
        (["--rank=2,3", "--lora.colour=blue"], "colour"),
        (["--rank=2,3", "--data.train=nowhere.jsonl"], "no such file"),
        (["--rank=2,3", "--trainer.logger=false"], "save_dir"),
        (["--rank=2,3", "--full_finetuning=true"], "leave full fine-tuning out"),
        (["--rank=8", "--trainer.callbacks={class_path: lightning_lora.AdaLoRACallback}"], "AdaLoRACallback finds the ranks itself"),
        (["--rank=2,3", "--lora.offload=frozen"], "offload"),
        (["--rank=2,3", "--lora.compile=layer", "--side_by_side=true"], "compile='layer' works on the blocks of one model"),
    ],
    ids=str,
)
def test_what_is_refused_leaves_nothing(run, words, message, tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text("- {ranks: 3}\n")
    (tmp_path / "twice.yaml").write_text("- {rank: 3}\n- {rank: 3, rank: 4}\n")
    words = [word.replace("{wrong}", str(tmp_path / "wrong.yaml")).replace("{twice}", str(tmp_path / "twice.yaml")) for word in words]
    assert main(["sweep", *run, "--folder", str(tmp_path / "sweep"), *words]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "sweep").exists()
