"""Each example of its own runs, and what it prints is so. The two that need several processes are in ``test_two_processes.py``."""

import copy
import importlib
import json
import re
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_lora import LoRACallback, apply_lora, get_lora_parameters

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = ["own_module", "vision", "plain_loop", "fabric_loop", "several_gpus", "many_adapters", "token_rows"]


@pytest.fixture(scope="module")
def base():
    """The model that counts, trained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module("counting").pretrained()


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path, base):
    """Examples import each other by name, and write below the working directory unless they are told otherwise."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(importlib.import_module("counting"), "pretrained", lambda: copy.deepcopy(base))
    monkeypatch.chdir(tmp_path)


def run(name, *arguments):
    return importlib.import_module(name).main(list(arguments))


def test_a_classifier_of_ones_own_learns():
    found = run("own_module")
    assert found["after"] > 0.85 > 0.7 > found["before"]


def test_a_vision_model_is_mended_and_merged():
    found = run("vision", "--images=512", "--epochs=5")
    assert found["after"] > found["before"] + 0.25 and found["merged"]


def test_adapters_take_turns_and_share_a_batch():
    found = run("many_adapters", "--batches=60")
    assert found == {"twos": [15] * 3, "threes": [20] * 3, "None": [10] * 3, "rows": [15, 20, 10]}


def test_only_the_rows_of_the_markers_train():
    found = run("token_rows", "--batches=100")
    assert found["after"] == found["loaded"] > 0.9 > found["before"] and found["same"]


def test_the_plain_loop_saves_merges_and_loads():
    found = run("plain_loop", "--batches=160")
    assert found["after"] == found["merged"] == found["loaded"] > 0.9 > found["before"] and found["last"] < 0.2 * found["first"]


def test_fabric_on_one_process():
    found = run("fabric_loop", "--accelerator=cpu", "--batches=60")
    assert found["after"] > 0.9 and found["last"] < 0.1 * found["first"]


class Lit(L.LightningModule):
    """The plain loop's model, optimizer and schedule, as a LightningModule has them."""

    def __init__(self, model, plain_loop):
        super().__init__()
        self.model, self.plain_loop, self.losses = model, plain_loop, []

    def training_step(self, ids, batch_idx):
        loss = self.model(input_ids=ids, labels=ids).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer, schedule = self.plain_loop.optimizer_of(self.model)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_the_plain_loop_has_the_losses_of_the_callback(tmp_path):
    """Dropout, LoRA+, accumulation, clipping and the warm-up included: the same seeds and batches, in float64."""
    counting, plain_loop = (importlib.import_module(name) for name in ("counting", "plain_loop"))
    batches = counting.batches(step=2, count=16 * 30)
    torch.manual_seed(0)
    model = apply_lora(counting.pretrained().double(), plain_loop.CONFIG)
    mine = plain_loop.train(model, batches)

    torch.manual_seed(0)
    module = Lit(counting.pretrained().double().train(), plain_loop)
    L.Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        accumulate_grad_batches=plain_loop.ACCUMULATE,
        gradient_clip_val=plain_loop.CLIP,
        callbacks=[LoRACallback(plain_loop.CONFIG, lora_plus_ratio=plain_loop.RATIO, merge_on_fit_end=False)],
        precision="64-true",
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, batches)
    assert len(mine) == 30 and mine[-1] < 0.9 * mine[0]
    assert module.losses == pytest.approx(mine, rel=1e-9)
    for ours, theirs in zip(get_lora_parameters(model), get_lora_parameters(module), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-12)


def test_the_plain_loop_is_short():
    assert len((EXAMPLES / "plain_loop.py").read_text().splitlines()) < 150


def test_the_notebook_runs_in_order():
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text())
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] >= 5 and notebook["metadata"]["language_info"]["name"] == "python"
    cells = notebook["cells"]
    names = [cell["id"] for cell in cells]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in names)
    assert {cell["cell_type"] for cell in cells} == {"markdown", "code"}
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)  # nothing stale is committed
    space: dict = {"__name__": "__main__"}
    for cell in code:
        exec(compile("".join(cell["source"]), f"notebook.ipynb, cell {cell['id']}", "exec"), space)
    assert space["after"] < 0.1 * space["before"] and space["base_error"] < 0.05
    assert space["merged_error"] == pytest.approx(space["after"], rel=1e-3)
    assert space["loaded_error"] == space["after"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_says_what_it_shows_and_how_to_run_it(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(name, "--help")
    said = capsys.readouterr().out
    assert f"examples/{name}.py" in said and len(said.strip().splitlines()) > 8


def test_the_page_lists_each():
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert {f"{name}.py" for name in SCRIPTS} | {"notebook.ipynb"} == files - {"counting.py", "question_types.py", "quickstart.py"}
    assert not [name for name in SCRIPTS if f"examples/{name}.py" not in page] and "examples/notebook.ipynb" in page
