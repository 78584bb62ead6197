"""``LoRAMonitor(apply_ranks_at=…)``: ranks that change in a run, its checkpoints from before and after, files, refusals."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, LoRAMonitor, load_adapter, lora_layers, save_adapter
from lightning_lora.model.layer_statistics import low_rank_layers
from tests.callbacks.lora_runs import Resumable, fit
from tests.lit import LitNet, bits, make_net, trainer

pytestmark = pytest.mark.filterwarnings(
    *("ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`", "ignore:Using ModelCheckpoint with manual")
)
CONFIG = LoRAConfig(rank=4, alpha=8, target_modules=["fc1", "fc2"])


class Middle(LitNet):
    """Its loader resumes in the middle of an epoch, and each step draws random numbers."""

    def train_dataloader(self) -> DataLoader:
        return Resumable(super().train_dataloader().dataset, batch_size=8)


def run(
    folder: Path, ckpt: Any = None, module: Any = None, *, lora: Any = None, **kwargs: Any
) -> tuple[Any, LoRAMonitor, LoRACallback, L.Trainer]:
    """A fit of eight steps whose ranks change after the third, with a checkpoint after each."""
    monitor = LoRAMonitor(every_n_steps=2, **{"apply_ranks_at": 3, "energy": 0.8, **kwargs})
    torch.manual_seed(5)
    module, lora = module or Middle(), lora or LoRACallback(CONFIG, merge_on_fit_end=False)
    every = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    return module, monitor, lora, fit(folder, module, 2, ckpt, callbacks=(monitor, every), lora=lora)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, LoRAMonitor, LoRACallback, L.Trainer]:
    folder, threads = tmp_path_factory.mktemp("whole"), torch.get_num_threads()
    torch.set_num_threads(1)  # as each test has it, which compares bits
    made = run(folder)
    torch.set_num_threads(threads)
    return folder, *made


def test_the_layers_have_the_suggested_ranks(whole: Any) -> None:
    folder, module, monitor, lora, _ = whole
    assert monitor.rank_change.step == 3 and monitor.rank_change.ranks == {"net.fc1": (4, 2), "net.fc2": (4, 2)}
    assert {name: (layer.rank, layer.scaling) for name, layer in lora_layers(module)} == {"net.fc1": (2, 2.0), "net.fc2": (2, 2.0)}
    before, after = (torch.load(folder / f"step={step}.ckpt", weights_only=True)["lightning_lora"]["config"] for step in (2, 3))
    assert (
        before["rank_pattern"] == {}
        and after["rank_pattern"] == {"fc1": 2, "fc2": 2}
        and after["alpha_pattern"] == {"fc1": 4.0, "fc2": 4.0}
    )
    assert lora.config.rank_pattern == after["rank_pattern"]


@pytest.mark.parametrize("step", [2, 3, 6])
def test_a_run_resumed_from_before_or_after_the_change_is_exact(whole: Any, tmp_path: Path, step: int) -> None:
    folder, module, monitor, *_ = whole
    rest, again, *_ = run(tmp_path, folder / f"step={step}.ckpt")
    assert rest.losses == module.losses[step:] and again.rank_change.ranks == monitor.rank_change.ranks
    torch.testing.assert_close(bits(rest), bits(module), rtol=0, atol=0)
    a, b = (torch.load(each / "step=8.ckpt", weights_only=True) for each in (folder, tmp_path))
    torch.testing.assert_close(a["optimizer_states"][0]["state"], b["optimizer_states"][0]["state"], rtol=0, atol=0)
    assert a["lightning_lora"]["config"] == b["lightning_lora"]["config"] and a["lightning_lora"]["began"] == b["lightning_lora"]["began"]


def test_any_checkpoint_of_the_run_can_be_tested(whole: Any, tmp_path: Path) -> None:
    """In the module that trained, and in a new one; the ranks go back and forth."""
    folder, module, _, lora, trained = whole
    for step, rank in ((2, 4), (8, 2), (2, 4), (3, 2)):
        path = folder / f"step={step}.ckpt"
        here = trained.test(module, ckpt_path=path, verbose=False)
        assert {layer.rank for _, layer in lora_layers(module)} == {rank} and (lora.began is None) == (rank == 4)
        assert trainer(tmp_path, LoRACallback(CONFIG)).test(LitNet(), ckpt_path=path, verbose=False) == here
    trained.test(module, ckpt_path=folder / "step=8.ckpt", verbose=False)


def test_a_run_that_is_refused_leaves_the_ranks(whole: Any, tmp_path: Path) -> None:
    folder, module, _, lora, trained = whole
    saved = torch.load(folder / "step=2.ckpt", weights_only=True)
    del saved["state_dict"]["net.fc2.lora_B"]
    torch.save(saved, tmp_path / "broken.ckpt")
    before, config = bits(module), lora.config
    with pytest.raises(ValueError, match="lacks 1 trained tensor"):
        trained.test(module, ckpt_path=tmp_path / "broken.ckpt", verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(bits(module).values(), before.values(), strict=True))
    assert {layer.rank for _, layer in lora_layers(module)} == {2} and lora.config is config


def test_ranks_that_another_config_gives_are_still_refused(whole: Any, tmp_path: Path) -> None:
    other = LoRAConfig(rank=3, alpha=8, target_modules=["fc1", "fc2"])
    for step in (2, 8):
        with pytest.raises(ValueError, match=r"another LoRA config .*rank: 4 != 3"):
            trainer(tmp_path, LoRACallback(other)).test(LitNet(), ckpt_path=whole[0] / f"step={step}.ckpt", verbose=False)
    same = LoRACallback(LoRAConfig(**torch.load(whole[0] / "step=8.ckpt", weights_only=True)["lightning_lora"]["config"]))
    trainer(tmp_path, same).test(LitNet(), ckpt_path=whole[0] / "step=8.ckpt", verbose=False)


def test_files_have_the_new_ranks(whole: Any, tmp_path: Path) -> None:
    module, x = whole[1].eval(), torch.randn(4, 8)
    save_adapter(module, tmp_path / "adapter")
    for source in (tmp_path / "adapter", whole[0] / "step=8.ckpt"):
        fresh = load_adapter(make_net(), source).eval()
        fresh.norm.load_state_dict(module.net.norm.state_dict())
        assert {layer.rank for _, layer in lora_layers(fresh)} == {2}
        torch.testing.assert_close(fresh(x), module.net(x), rtol=0, atol=0)


def test_the_report_says_what_was_applied(whole: Any) -> None:
    folder = whole[0] / "lora_monitor"
    text = (folder / "report.html").read_text()
    assert "applied after step 3" in text and "<td>net.fc1</td><td>4</td><td>2</td>" in text
    with (folder / "layers.csv").open(newline="") as file:
        assert [(row["rank"], row["rank_before"]) for row in csv.DictReader(file)] == [("2", "4")] * 2
    assert yaml.safe_load((folder / "ranks.yaml").read_text())["rank_pattern"].keys() == {"fc1", "fc2"}


def size(module: Any) -> int:
    return sum(p.numel() for layer in low_rank_layers(module).values() for p in layer.lora_factors())


@pytest.mark.parametrize("budget", [0.4, 1.0, 1.5])
def test_a_budget_is_kept(tmp_path: Path, budget: float) -> None:
    """With all of ‖ΔW‖² to keep, each layer asks for twice its rank."""
    module, monitor, *_ = run(tmp_path, energy=1.0, rank_budget=budget, report=False)
    before = 4 * (16 + 32 + 32 + 4)
    assert size(module) <= budget * before and size(module) > budget * before - 2 * (16 + 32)
    assert monitor.rank_change.step == 3 and (budget == 1.0 or monitor.rank_change.ranks)


class TwoOptimizers(Middle):
    """One optimizer a layer, in turn, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.step(batch)
        self.losses.append(loss.item())
        mine = self.optimizers()[batch_idx % 2]
        self.manual_backward(loss)
        mine.step()
        mine.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(layer.parameters(), lr=1e-2) for layer in (self.net.fc1, self.net.fc2)]


def test_it_works_by_hand_with_several_optimizers(tmp_path: Path) -> None:
    module, monitor, _, trained = run(tmp_path, module=TwoOptimizers(), report=False)
    assert monitor.rank_change.ranks and len(module.losses) == 8
    for optimizer, layer in zip(trained.optimizers, (module.net.fc1, module.net.fc2), strict=True):
        assert optimizer.state[layer.lora_A]["exp_avg"].shape == layer.lora_A.shape and optimizer.state[layer.lora_A]["step"] == 4


def test_parts_with_a_callback_each(tmp_path: Path) -> None:
    parts = [LoRACallback(LoRAConfig(rank=4, target_modules=["^.*$"]), module=f"net.{name}", merge_on_fit_end=False) for name in ("a", "b")]

    class Parts(LitNet):
        def __init__(self) -> None:
            super().__init__()
            self.net.fc1, self.net.a = torch.nn.Identity(), torch.nn.Sequential(torch.nn.Linear(16, 32))
            self.net.fc2, self.net.b = torch.nn.Identity(), torch.nn.Sequential(torch.nn.Linear(32, 4))

        def step(self, batch: Any) -> torch.Tensor:
            x = self.net.norm(self.net.embed(batch[0]))
            return torch.nn.functional.cross_entropy(self.net.b(self.net.a(x).relu()), batch[1])

    torch.manual_seed(5)
    monitor, module = LoRAMonitor(apply_ranks_at=2, energy=0.8, report=False), Parts()
    trainer(tmp_path, *parts, monitor, max_epochs=1).fit(module)
    assert monitor.rank_change.ranks.keys() == {"net.a.0", "net.b.0"}
    assert [part.config.rank_pattern for part in parts] == [{"0": layer.rank} for _, layer in lora_layers(module)]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_lora_plus_schedules_and_accumulation_go_on(tmp_path: Path, accumulated: int) -> None:
    lora = LoRACallback(CONFIG, lora_plus_ratio=4.0, precondition="riemannian")
    module = Middle(schedule=lambda optimizer: {"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 4), "interval": "step"})
    torch.manual_seed(5)
    monitor = LoRAMonitor(apply_ranks_at=2, energy=0.8, report=False)
    trained = fit(tmp_path, module, 2, callbacks=(monitor,), lora=lora, accumulate_grad_batches=accumulated)
    rates = [group["lr"] for group in trained.optimizers[0].param_groups]
    assert monitor.rank_change.step == 2 and monitor.rank_change.ranks and rates == pytest.approx([5e-3, 2e-2])


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "vera": ({"variant": "vera"}, {}, "'net.fc1' cannot get another rank: variant='vera'"),
    "pissa": ({"init": "pissa"}, {}, "init='pissa' keeps its start"),
    "budget": ({}, {"rank_budget": 0.1}, "rank_budget=0.1: even the lowest ranks"),
    "cuda graphs": ({}, {}, "apply_ranks_at=3: recorded CUDA graphs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_training(tmp_path: Path, name: str) -> None:
    fields, kwargs, said = REFUSED[name]
    config = LoRAConfig(rank=4, target_modules=["fc1", "fc2"], **fields)
    lora = LoRACallback(config)
    lora.cuda_graphs = name == "cuda graphs"
    module = Middle()
    with pytest.raises(ValueError, match=said):
        run(tmp_path, module=module, lora=lora, **kwargs)
    assert not module.losses


def test_an_optimizer_that_cannot_follow_is_refused_after_one_step(tmp_path: Path) -> None:
    class Adamax(Middle):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adamax(self.parameters())

    module = Adamax()
    with pytest.raises(ValueError, match=r"Adamax keeps 'exp_inf' of 'net\.fc1\.lora_A'"):
        run(tmp_path, module=module, apply_ranks_at=6)
    assert len(module.losses) == 1


def test_a_step_beyond_the_run_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="apply_ranks_at=9, and the run ended after 8 optimizer steps"):
        _, monitor, *_ = run(tmp_path, apply_ranks_at=9)
    assert monitor.rank_change.step is None


def test_a_budget_that_layers_without_an_update_exceed_is_told(tmp_path: Path) -> None:
    class Still(Middle):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net.fc1.parameters(), "lr": 1e-2}, {"params": self.net.fc2.parameters(), "lr": 0.0}]
            return torch.optim.SGD(groups)

    with pytest.warns(UserWarning, match=r"After step 3 no rank changes: rank_budget=0.3: even the lowest ranks"):
        module, monitor, *_ = run(tmp_path, module=Still(), rank_budget=0.3)
    assert monitor.rank_change.step == 3 and {layer.rank for _, layer in lora_layers(module)} == {4}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"apply_ranks_at": 0}, "apply_ranks_at=0"),
        ({"apply_ranks_at": 2.5}, "apply_ranks_at=2.5"),
        ({"apply_ranks_at": 2, "rank_budget": 0}, "rank_budget=0"),
        ({"rank_budget": 2.0}, "give apply_ranks_at too"),
    ],
)
def test_wrong_arguments_are_refused(fields: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LoRAMonitor(**fields)


def test_without_a_lora_callback_it_is_refused(tmp_path: Path) -> None:
    from lightning_lora import apply_lora

    module = Middle()
    apply_lora(module, CONFIG)
    with pytest.raises(ValueError, match="apply_ranks_at=3: without LoRACallback"):
        trainer(tmp_path, LoRAMonitor(apply_ranks_at=3), max_epochs=1).fit(module)
