"""``lightning-lora verify``: the run's own model, data and strategy; a table, and an exit code."""

import json
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

import __main__
from lightning_lora.cli.main import main
from lightning_lora.cli.verify import STRATEGY, _equal
from lightning_lora.model.verify_checks import GRADIENTS, IDENTITY, Check
from tests.lit import Net
from tests.processes import ended, start


class Own(L.LightningModule):
    """A user's own, with dropout and BatchNorm, that changes its batch in place.

    ``broken``: a linear that no gradient reaches. ``by_rank``: a loss of another size. ``plan``: split among processes.
    """

    def __init__(self, broken: bool = False, manual: bool = False, by_rank: float = 0.0, plan: str = ""):
        super().__init__()
        self.plan = plan
        self.net, self.dropout, self.broken = Net(), nn.Dropout(0.3), broken
        self.by_rank = by_rank
        self.automatic_optimization = not manual

    def configure_model(self):
        if not self.plan or (self.plan == "guarded" and self.device_mesh is None):
            return
        plan = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x.mul_(0.5)
        hidden = self.net.fc1(self.net.norm(self.net.embed(x))).relu()
        hidden = hidden.detach() if self.broken else hidden
        loss = nn.functional.cross_entropy(self.net.fc2(self.dropout(hidden)), y)
        loss = loss * (1 + self.by_rank * self.global_rank)
        self.log("loss", loss)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2, eps=1e-3)


class OwnData(L.LightningDataModule):
    """Noise."""

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.randn(12, 8, generator=generator), torch.randint(0, 4, (12,), generator=generator))
        return DataLoader(data, batch_size=4, shuffle=True)


@pytest.fixture
def own(tmp_path):
    content = {
        "model": {"class_path": f"{__name__}.Own"},
        "data": {"class_path": f"{__name__}.OwnData"},
        "lora": {"config": {"rank": 2, "target_modules": ["fc1", "fc2"], "dropout": 0.2}},
        "trainer": {"max_epochs": 50, "accelerator": "cpu", "devices": 1},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "own.yaml")


def verified(words, capsys):
    code = main(["verify", *words, "--json"])
    report = json.loads(capsys.readouterr().out)
    return code, {check["name"]: check for check in report["checks"]}, report


def test_a_right_run(config, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert main(["verify", "--config", config]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "5 passed, 0 failed, 0 not run" and f"{STRATEGY}: not needed: the run is one process." in out
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and "cache" not in str(path)] == []


def test_a_users_own_module(own, capsys):
    code, checks, report = verified(["--config", own], capsys)
    assert code == 0 and report["passed"] == 5, checks


def test_a_fault_is_exit_code_1(own, capsys):
    code, checks, report = verified(["--config", own, "--model.broken=true"], capsys)
    assert code == 1 and report["failed"] == 1
    assert checks[GRADIENTS]["status"] == "failed" and "fc1" in checks[GRADIENTS]["advice"]


def test_manual_optimization_is_not_passed_silently(own, capsys):
    code, _, report = verified(["--config", own, "--model.manual=true"], capsys)
    assert code == 1 and report["not_run"] == 1


def test_devices_that_are_not_there_are_a_row(own, capsys):
    code, checks, report = verified(["--config", own, "--trainer.accelerator=gpu", "--trainer.strategy=ddp", "--trainer.devices=4"], capsys)
    assert code == 1 and report["passed"] == 5 and report["not_run"] == 1, checks
    assert checks[STRATEGY]["status"] == "not run" and "gpu" in checks[STRATEGY]["advice"].lower()


def test_an_adapter_that_is_trained_further(config, capsys, adapter):
    code, checks, _ = verified(["--config", config, f"--lora.start_from={adapter}", "--lora.config.rank=4"], capsys)
    assert code == 0 and checks[IDENTITY]["status"] == "not needed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--full_finetuning=true"], "no adapter to verify"),
        (["--lora.colour=blue"], "colour"),
        (["--lora.config.target_modules=nowhere"], "nowhere"),
    ],
    ids=str,
)
def test_wrong_input_is_exit_code_2(own, words, message, capsys):
    assert main(["verify", "--config", own, *words]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_under_a_launcher_it_is_refused(own, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["verify", "--config", own]) == 2
    assert "start it once" in capsys.readouterr().err


def command(words, said):
    """Be the process of ``python -m lightning_lora.cli.main``, which starts the second one itself."""
    __main__.__spec__ = find_spec("lightning_lora.cli.main")
    sys.argv = ["lightning-lora", *words]
    with said.open("w") as file, redirect_stdout(file):
        code = main()
    sys.exit(code)


def under(strategy, own, *words):
    options = [f"--trainer.strategy={strategy}", "--trainer.devices=2", "--trainer.accumulate_grad_batches=2", "--json", *words]
    out, other = (Path(own).with_name(name) for name in ("out", "other"))
    code = ended(start(command, ["verify", "--config", own, *options], out, said=other), 300)
    assert out.read_text(), other.read_text()
    return code, {check["name"]: check for check in json.loads(out.read_text())["checks"]}


def test_the_strategy_equals_one_process(own):
    """Two processes, accumulated batches, dropout: the same two steps."""
    code, checks = under("ddp", own)
    assert code == 0 and checks[STRATEGY]["status"] == "passed" and checks[STRATEGY]["measured"] < 1e-5, checks


def test_a_loss_that_depends_on_the_rank_fails(own):
    code, checks = under("ddp", own, "--model.by_rank=5.0")
    assert code == 1 and [name for name, check in checks.items() if check["status"] == "failed"] == [STRATEGY], checks


SPLIT = '{"class_path": "ModelParallelStrategy", "init_args": {"data_parallel_size": 1, "tensor_parallel_size": 2}}'


def test_processes_that_split_layers_get_the_same_batches(own):
    code, checks = under(SPLIT, own, "--model.plan=guarded")
    assert code == 0 and checks[STRATEGY]["status"] == "passed" and checks[STRATEGY]["measured"] < 1e-4, checks


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ["lora_fsdp2", '{"class_path": "lightning_lora.LoRAFSDP2Strategy", "init_args": {"tensor_parallel_size": 2}}']
)
def test_a_causal_lm_under_our_strategy(config, strategy):
    code, checks = under(strategy, config)
    assert code == 0 and checks[STRATEGY]["status"] == "passed" and checks[STRATEGY]["measured"] < 1e-2, checks


def test_a_model_that_needs_a_device_mesh_is_told_what_to_do(own, capsys):
    assert main(["verify", "--config", own, f"--trainer.strategy={SPLIT}", "--trainer.devices=2", "--model.plan=unguarded"]) == 2
    assert "begin it with 'if self.device_mesh is None: return'" in capsys.readouterr().err.splitlines()[-1]


def test_two_runs_are_compared_beside_what_they_changed():
    """A gradient that is not averaged is off by more than a half; rounding is not."""
    start = {"a": torch.zeros(100), "b": torch.ones(100)}
    one = {"a": torch.full((100,), 0.01), "b": torch.full((100,), 1.01)}
    eps = torch.finfo(torch.float32).eps
    assert _equal(start, one, one, eps).status == "passed"
    assert _equal(start, one, {name: value * (1 + 1e-7) for name, value in one.items()}, eps).status == "passed"
    wrong = _equal(start, one, {"a": one["a"], "b": start["b"]}, eps)
    assert wrong.status == "failed" and "b differs most" in wrong.advice and wrong.measured == pytest.approx(0.5**0.5, rel=1e-3)
    assert _equal(start, one, {"a": one["a"]}, eps).status == "failed"
    assert _equal(start, start, start, eps).status == "not run"
    assert _equal(start, one, {name: value * float("nan") for name, value in one.items()}, eps).status == "failed"
    assert not Check("", "not run").ok and Check("", "not needed").ok
