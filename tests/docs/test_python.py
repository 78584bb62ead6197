"""The Python blocks of each page are run one after another, in a namespace and an empty folder of the page's own.

None can be skipped; pages of help are run by test_help.py. The names
that pages take for granted (`MyModule`, `model`, `batches`) are tiny stand-ins.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, save_adapter
from lightning_lora.layers import LoRALayer
from tests.docs.pages import ADVICE, HELP, PAGES, MyModule, batches, blocks, llama, pages_with, path_of
from tests.tasks import tiny

pytestmark = ADVICE

Names = dict[str, Any]


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Names]:
    """What is there after all Python blocks of a page have run, and the folder that they ran in (under `__folder__`)."""

    @cache
    def run(page: str) -> Names:
        with pytest.MonkeyPatch.context() as patch:
            folder = tmp_path_factory.mktemp(page)
            patch.chdir(folder)
            tiny.save(folder / "answerdotai" / "ModernBERT-base", "modernbert")
            (folder / "train.csv").write_text("text,label\n" + "which colour is the sky,sky\nblood is red,blood\n" * 10)
            llama().save_pretrained(folder / "base")
            for name in ("legal", "polite"):
                made = apply_lora(llama(), LoRAConfig())
                for parameter in get_lora_parameters(made):
                    torch.nn.init.normal_(parameter)
                save_adapter(made, folder / "runs" / name / "adapter")
            names: Names = {"MyModule": MyModule, "batches": batches(), "batch": batches()[0], "__folder__": folder}
            names |= {name: llama() for name in ("model", "base_model", "served_model")}
            for block in blocks(page, "python"):
                line = PAGES[page][: PAGES[page].index(block)].count("\n")
                exec(compile("\n" * line + block, str(path_of(page)), "exec"), names)
            return names

    return run


@pytest.mark.parametrize("page", [page for page in pages_with("python") if page not in HELP])
def test_the_blocks_of_a_page_run(after: Callable[[str], Names], page: str) -> None:
    assert after(page)


@pytest.mark.parametrize("page", ["README", "index", "callback"])
def test_the_callback_trains_merges_and_tests(after: Callable[[str], Names], page: str) -> None:
    """The base came through."""
    module, config = after(page)["module"], LoRAConfig(target_modules=["q_proj", "v_proj"])
    layers = [layer for layer in module.modules() if isinstance(layer, LoRALayer)]
    assert len(layers) == 2 * len(config.target_modules) and all(layer.merged for layer in layers)
    assert module.model.state_dict().keys() == llama().state_dict().keys()
    assert after(page)["trainer"].callback_metrics["test_loss"] < MyModule().model.eval()(**batches()[0]).loss


def test_the_sweep_trains_both_trials(after: Callable[[str], Names]) -> None:
    names = after("command-line")
    trials = {each.name: each for each in names["found"].outcomes}
    assert [(each.status, each.steps) for each in trials.values()] == [("complete", 4)] * 2
    assert all(len(list((names["__folder__"] / "runs" / "sweep" / name).rglob("*.ckpt"))) == 1 for name in trials)


def test_named_adapters_are_a_rows_own(after: Callable[[str], Names]) -> None:
    """The first row has an adapter, the second is the base's."""
    plain, names = llama()(**batches()[0]).logits, after("adapters")
    assert names["adapters"].active == "polite"
    torch.testing.assert_close(names["answers"][1], plain[1])
    assert (names["answers"][0] - plain[0]).abs().max() > 1e-2


def test_an_adapter_is_merged_elsewhere(after: Callable[[str], Names]) -> None:
    """Saved by one model, loaded by another, and written into the weights of a third."""
    folder = after("adapters")["__folder__"]
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert {"config.json", "merge_certificate.json", "model.safetensors"} <= {path.name for path in (folder / "merged").iterdir()}


def test_the_task_learns_the_labels_of_the_rows(after: Callable[[str], Names]) -> None:
    """With a new head beside the adapters."""
    task = after("data")["task"]
    assert task.labels == ["blood", "sky"] and task.trainer.callback_metrics.keys() >= {"val_loss", "val_accuracy", "val_f1"}
    assert task.model.classifier.weight.requires_grad and all(layer.merged for layer in task.modules() if isinstance(layer, LoRALayer))


def test_the_plain_loop_gives_the_base_back(after: Callable[[str], Names]) -> None:
    """It trained adapters on every linear but the head, saved them as PEFT does, and the base is back bit for bit."""
    names = after("loop")
    model = names["model"]
    assert len(get_lora_parameters(model)) == 2 * 7 * 2
    assert all(layer.lora_B.any() and not layer.merged for layer in model.modules() if isinstance(layer, LoRALayer))
    assert sorted(path.name for path in (names["__folder__"] / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    base = llama().state_dict()
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items() if ".lora_" not in name)


def test_the_reference_is_the_base(after: Callable[[str], Names]) -> None:
    """Logits of the base, by a model whose adapters are trained and on again."""
    names = after("loop")
    assert torch.equal(names["reference"], llama().train()(**names["batch"]).logits)
    assert not torch.equal(names["reference"], names["model"](**names["batch"]).logits)


def test_the_monitor_reports(after: Callable[[str], Names]) -> None:
    """And applies the ranks that it suggests."""
    names = after("diagnostics")
    reports = list(names["__folder__"].rglob("report.html"))
    assert len(reports) == 2
    assert all({path.name for path in report.parent.iterdir()} >= {"report.html", "layers.csv", "ranks.yaml"} for report in reports)
    assert any(before != now for before, now in names["monitor"].rank_change.ranks.values())


def test_weights_come_one_by_one(after: Callable[[str], Names]) -> None:
    """Quantized on the way; the adapters add nothing yet."""
    loaded, batch = after("strategies")["empty"].eval(), batches()[0]
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    torch.testing.assert_close(loaded(**batch).logits.float(), llama().eval()(**batch).logits, rtol=0, atol=0.05)
