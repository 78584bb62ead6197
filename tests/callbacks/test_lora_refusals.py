"""What must not go wrong in silence under LoRACallback."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, apply_lora, find_targets, lora_layers
from tests.callbacks.lora_runs import Early, fit
from tests.lit import CONFIG, LitNet, trainer

# Lightning's advice to resume with the same callbacks and folder, which these tests do otherwise on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed", "ignore:Checkpoint directory"
)


def test_an_optimizer_built_too_early_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"4 parameters that should train are in no optimizer: net\.fc1\.lora_A.*configure_optimizers"):
        fit(tmp_path, Early(), 1)


class EarlyAdamW(Early):
    optimizer = torch.optim.AdamW


class Late(LitNet):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_torchs_own_optimizer_built_too_early_takes_the_adapters(tmp_path: Path) -> None:
    """As LightningCLI's ``--optimizer`` is."""
    early, late = EarlyAdamW(), Late()
    for module in (early, late):
        torch.manual_seed(0)
        fit(tmp_path, module, 2)
    assert early.losses == late.losses and len(set(early.losses)) > 1


class Partial(LitNet):
    def configure_optimizers(self) -> Any:
        assert self.net is not None
        return torch.optim.SGD(self.net.fc1.parameters(), lr=0.1)


def test_an_optimizer_of_some_layers_is_an_error_that_names_the_others(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 parameters .*: net\.fc2\.lora_A.*exclude_modules=\['net\.fc2'\]\)\.$"):
        fit(tmp_path, Partial(), 1)
    fit(tmp_path, Partial(), 1, lora=LoRACallback(dataclasses.replace(CONFIG, exclude_modules=["net.fc2"])))


class Bypass(LitNet):
    def step(self, batch: Any) -> torch.Tensor:
        hidden = self.net.fc1(self.net.embed(batch[0])).relu()
        weights = [weight for name, weight in self.net.named_parameters() if name == "fc2.weight"]
        return nn.functional.cross_entropy(nn.functional.linear(hidden, *weights), batch[1])


def test_an_adapter_without_a_gradient_is_an_error_unless_told_otherwise(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"1 of 2 adapted layers got no gradient in 4 batches: net\.fc2\. .*exclude_modules=\['net\.fc2'\]"
    ):
        fit(tmp_path, Bypass(), 1)
    fit(tmp_path, Bypass(), 1, lora=LoRACallback(CONFIG, check_gradients=False))


def test_every_adapter_has_a_gradient_after_the_first_backward(tmp_path: Path) -> None:
    class Look(L.Callback):
        missing: list[str] | None = None

        def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if self.missing is None:
                self.missing = [name for name, p in pl_module.named_parameters() if "lora_" in name and p.grad is None]

    look = Look()
    fit(tmp_path, LitNet(), 1, callbacks=(look,))
    assert look.missing == []


def test_a_wrong_submodule_name_lists_the_right_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="module='nett' is no submodule of LitNet; its children are net"):
        fit(tmp_path, LitNet(), 1, lora=LoRACallback(CONFIG, module="nett"))


@pytest.mark.parametrize("through", ["object", "memory"])
def test_tied_weights_are_refused_at_the_start_not_after_the_training(through: str, tmp_path: Path) -> None:
    module = LitNet()
    module.net.tied = nn.Linear(16, 32)
    if through == "object":
        module.net.tied.weight = module.net.fc1.weight
    else:
        module.net.tied.weight.data = module.net.fc1.weight.data
    with pytest.raises(ValueError, match=r"net\.fc1\.weight is tied to net\.tied\.weight.*merge_on_fit_end=False"):
        fit(tmp_path, module, 1)
    assert module.losses == []
    trainer(tmp_path, LoRACallback(CONFIG)).test(module, verbose=False)  # no merge is due there


@pytest.mark.filterwarnings("ignore:.*`LightningModule` that was compiled")
def test_the_module_stays_picklable_and_free_of_patches(tmp_path: Path) -> None:
    module = LitNet(late=True)
    fit(tmp_path, module, 1)
    assert "configure_model" not in module.__dict__
    x = torch.randn(4, 8)
    twin = pickle.loads(pickle.dumps(module.net))
    module.eval()
    torch.testing.assert_close(twin.eval()(x), module.net(x))
    assert copy.deepcopy(module.net).fc1.merged


@pytest.mark.parametrize("apply", [apply_lora, find_targets, lambda _, config: LoRACallback(config)])
def test_a_config_of_another_type_is_refused(apply: Any) -> None:
    module = LitNet()
    with pytest.raises(ValueError, match=r"^config=\{'rank': 4\}: give LoRAConfig\(\*\*config\)\.$"):
        apply(module, {"rank": 4})
    with pytest.raises(ValueError, match=r"^config='all-linear': give a LoRAConfig, such as"):
        apply(module, "all-linear")
    assert not any(lora_layers(module))


@pytest.mark.parametrize("name", ["merge_on_fit_end", "check_base", "check_gradients", "allow_nonfinite", "cuda_graphs", "tune_loop"])
def test_text_is_no_flag(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}='no': give True or False"):
        LoRACallback(CONFIG, **{name: "no"})


def test_weights_that_nothing_reads_are_said(tmp_path: Path) -> None:
    """A module that is not on the meta device has weights already, maybe random ones."""
    lora = LoRACallback(CONFIG, weights="base")
    with pytest.warns(UserWarning, match=r"weights='base' is not read: LitNet has weights already\. Build it on the meta device"):
        fit(tmp_path, LitNet(), 1, lora=lora)


@pytest.mark.parametrize("option", [{"checkpointing": "full"}, {"offload": "activations"}, {"offload": "frozen"}])
def test_an_option_for_blocks_is_refused_with_its_name(option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"has no repeated blocks .*: leave {next(iter(option))} out"):
        fit(tmp_path, LitNet(), 1, lora=LoRACallback(CONFIG, **option))
