"""``LoRAMonitor`` in short fits: what it measures, logs, keeps over a resume, and writes."""

from __future__ import annotations

import csv
import pickle
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import lightning as L
import monitor_step
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from lightning_lora import LoRACallback, LoRAConfig, LoRAMonitor, apply_lora, lora_layers
from lightning_lora.callbacks.monitor_history import KEPT, QUANTITIES, History
from tests import processes
from tests.callbacks.lora_runs import checkpoint_in, fit
from tests.lit import CONFIG, LitNet, make_net, trainer

LAYERS = ["net.fc1", "net.fc2"]


class Noted(L.Callback):
    """The dense update and gradients before each step, in float64."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.rows.append(
            {
                name: (
                    float(layer.lora_delta().detach().double().norm()),
                    float(layer.weight.norm()),
                    *(float(p.grad.norm()) for p in pair if p.grad is not None),
                )
                for name, layer in lora_layers(pl_module)
                for pair in [(layer.lora_A, layer.lora_B)]
                if all(p.grad is not None for p in pair)
            }
        )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LoRAMonitor, Noted]:
    folder, monitor, noted = tmp_path_factory.mktemp("run"), LoRAMonitor(every_n_steps=2), Noted()
    run = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        callbacks=[LoRACallback(CONFIG), monitor, noted],
        logger=CSVLogger(folder, name="", version="logs"),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    run.fit(LitNet())
    return folder / "logs", monitor, noted


def test_numbers_are_those_of_the_dense_update_and_the_gradients(ran: Any) -> None:
    _, monitor, noted = ran
    assert monitor.history.steps == [0, 2, 4, 6, 8] and monitor.history.names == LAYERS
    for at, step in enumerate(monitor.history.steps[:-1]):
        for i, name in enumerate(LAYERS):
            update, weight, A, B = noted.rows[step][name]
            row = dict(zip(QUANTITIES, monitor.history.rows[at][i].tolist(), strict=True))
            wanted = {"update_ratio": update / weight, "update_norm": update, "grad_A": A, "grad_B": B}
            assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    assert monitor.history.of("grad").isnan().all(1).tolist() == [False] * 4 + [True], "after the last step there are no gradients"


def test_did_it_train(ran: Any) -> None:
    found = ran[1].findings
    assert [row.moved for row in found.rows] == [("lora_A", "lora_B")] * 2
    assert not found.changed_base and not found.others and found.steps == 8


def test_loggers_get_medians_and_layers(ran: Any) -> None:
    with (ran[0] / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("lora/update_ratio")]
    assert len(rows) == 5
    values = [float(rows[-1][f"lora/update_ratio/{name}"]) for name in LAYERS]
    assert float(rows[-1]["lora/update_ratio"]) == pytest.approx(min(values)), "the lower of the two in the middle"


class Tags(HTMLParser):
    """Tags that are opened and closed, and what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href")] + [tag] * (tag in ("script", "link"))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_whole_and_needs_no_network(ran: Any) -> None:
    folder = ran[0] / "lora_monitor"
    text = (folder / "report.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert not tags.open and not tags.fetched and text.count('class="hint ') == 7
    pictures = [ElementTree.fromstring("<svg" + part.partition("</svg>")[0] + "</svg>") for part in text.split("<svg")[1:]]
    assert len(pictures) == 4
    tips = [title.text for title in pictures[0].iter("{http://www.w3.org/2000/svg}title")]
    assert len(tips) == 5 * 2 and tips[0] == "net.fc1, step 0: 0"
    with (folder / "layers.csv").open(newline="") as file:
        assert [row["layer"] for row in csv.DictReader(file)] == LAYERS


def test_ranks_are_a_config(ran: Any) -> None:
    found = yaml.safe_load((ran[0] / "lora_monitor" / "ranks.yaml").read_text())
    model = apply_lora(make_net(), LoRAConfig(rank=2, alpha=4, target_modules=["fc1", "fc2"], **found))
    assert {f"net.{name}": layer.rank for name, layer in lora_layers(model)} == {row.name: row.suggested for row in ran[1].findings.rows}


def fitted(folder: Path, *args: Any, **kwargs: Any) -> LitNet:
    torch.manual_seed(5)
    module = LitNet()
    fit(folder, module, *args, **kwargs)
    return module


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_keeps_the_history(tmp_path: Path) -> None:
    first = LoRAMonitor(every_n_steps=3, report=False)
    fitted(tmp_path, 1, callbacks=(first, checkpoint_in(tmp_path / "first")))
    assert first.history is not None and first.history.steps == [0, 3, 4]
    second, whole = LoRAMonitor(every_n_steps=3, report=False), LoRAMonitor(every_n_steps=3, report=False)
    fitted(tmp_path, 2, tmp_path / "first" / "last.ckpt", callbacks=(second, checkpoint_in(tmp_path / "second")))
    fitted(tmp_path, 2, callbacks=(whole,))
    assert second.history is not None and whole.history is not None
    assert second.history.steps == whole.history.steps == [0, 3, 6, 8]
    for mine, theirs in zip(second.history.rows, whole.history.rows, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_training_is_the_same_with_it(tmp_path: Path) -> None:
    with_it, without = fitted(tmp_path, 2, callbacks=(LoRAMonitor(every_n_steps=1),)), fitted(tmp_path, 2)
    assert with_it.losses == without.losses


class Writes(L.Callback):
    """Changes a frozen parameter, as a faulty callback would."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        pl_module.net.embed.weight.data[0, 0] += 1


def test_a_base_that_changes_is_told(tmp_path: Path) -> None:
    monitor = LoRAMonitor()
    fit(tmp_path, LitNet(), 1, callbacks=(monitor, Writes()))
    assert monitor.findings is not None and list(monitor.findings.changed_base) == ["net.embed.weight"]
    assert "look here.</b> 1 frozen parameters changed: net.embed.weight" in (tmp_path / "lora_monitor" / "report.html").read_text()


def test_a_history_stays_small() -> None:
    history = History(["a"])
    for step in range(3 * KEPT):
        history.add(step, [[float(step)] * len(QUANTITIES)])
    assert len(history.steps) <= KEPT and history.steps == history.of("grad")[:, 0].tolist()
    assert history.steps[0] == 0 and history.steps[-1] == 3 * KEPT - 1
    assert pickle.loads(pickle.dumps(history)).steps == history.steps


@pytest.mark.parametrize(("fields", "said"), [({"every_n_steps": 0}, "every_n_steps=0"), ({"energy": 1.5}, "energy=1.5")])
def test_wrong_arguments_are_refused(fields: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LoRAMonitor(**fields)


def test_a_report_that_cannot_be_written_is_known_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    module = LitNet()
    with pytest.raises(ValueError, match=r"LoRAMonitor's dirpath='.*file': .*file is no folder; choose another"):
        fit(tmp_path, module, callbacks=(LoRAMonitor(dirpath=tmp_path / "file"),))
    assert not module.losses and not list(lora_layers(module))
    fit(tmp_path, module, 1, callbacks=(LoRAMonitor(dirpath=tmp_path / "file", report=False),))


def test_without_an_adapter_it_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapted layer in LitNet: add LoRACallback"):
        trainer(tmp_path, LoRAMonitor(), max_epochs=1).fit(LitNet())


def test_the_benchmark_counts_what_is_measured() -> None:
    said = processes.printed(monitor_step.main, ["--hidden", "64", "--layers", "1", "--rank", "2", "--length", "32", "--steps", "2"])
    sides = 4 * 64 + 2 * (64 + 16) + 3 * (64 + 192)  # in + out of q and o, k and v, the MLP's three
    assert "% of the time" in said and f"measurement {2 * 2**2 * sides + 7 * 4 * 2**3:.3e}" in said
