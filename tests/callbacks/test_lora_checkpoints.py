"""LoRACallback's checkpoints: what they hold, exact resume, what a resume checks."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, load_adapter, save_adapter
from tests.callbacks.lora_runs import SCHEDULES, Resumable, checkpoint_in, fit
from tests.faults.kit import row
from tests.lit import CONFIG, LitNet, bits, make_net, trainer

# Lightning's advice to resume with the same callbacks and folder, which these tests do otherwise on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed", "ignore:Checkpoint directory"
)


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_hold_the_adapter_and_the_statistics_only(tmp_path: Path, weights_only: bool) -> None:
    run = fit(tmp_path, LitNet(), 1, callbacks=(checkpoint_in(tmp_path, save_weights_only=weights_only),))
    adapter = {f"net.{fc}.{part}" for fc in ("fc1", "fc2") for part in ("lora_A", "lora_B")}
    statistics = {"net.norm.running_mean", "net.norm.running_var", "net.norm.num_batches_tracked"}
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == adapter | statistics
    assert saved["lightning_lora"]["format_version"] == 1 and saved["lightning_lora"]["root"] == "net"
    assert ("optimizer_states" in saved) is not weights_only
    if not weights_only:
        assert set(saved["optimizer_states"][0]["state"]) == adapter
    # After the merge a save is still a resumable adapter checkpoint.
    run.save_checkpoint(tmp_path / "late.ckpt", weights_only=weights_only)
    late = torch.load(tmp_path / "late.ckpt", weights_only=True)
    assert set(late["state_dict"]) == adapter | statistics
    assert all(torch.equal(late["state_dict"][name], saved["state_dict"][name]) for name in adapter)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("merge", [False, True])
@row(33)
def test_resume_is_step_exact(tmp_path: Path, late: bool, merge: bool) -> None:
    def run(module: LitNet, folder: str, epochs: int, ckpt: Path | None = None) -> L.Trainer:
        torch.manual_seed(4)
        lora = LoRACallback(CONFIG, merge_on_fit_end=merge)
        return fit(tmp_path, module, epochs, ckpt, (checkpoint_in(tmp_path / folder),), lora=lora)

    whole, half, rest = (LitNet(late, SCHEDULES["Cosine"]) for _ in range(3))
    full = run(whole, "whole", 4)
    run(half, "half", 2)
    resumed = run(rest, "rest", 4, tmp_path / "half/last.ckpt")
    assert half.losses + rest.losses == whole.losses
    for name, tensor in bits(whole).items():
        assert torch.equal(tensor, bits(rest)[name]), name
    for mine, theirs in zip(full.optimizers[0].state.values(), resumed.optimizers[0].state.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in ("exp_avg", "exp_avg_sq", "step"))


def test_resume_in_the_middle_of_an_epoch_is_exact(tmp_path: Path) -> None:
    class Middle(LitNet):
        def train_dataloader(self) -> DataLoader:
            return Resumable(super().train_dataloader().dataset, batch_size=8)

    torch.manual_seed(4)
    whole, rest = Middle(), Middle()
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit(tmp_path, whole, 2, callbacks=(every,))
    fit(tmp_path, rest, 2, ckpt=tmp_path / "step=6.ckpt")
    assert rest.losses == whole.losses[6:]
    assert all(torch.equal(a, b) for a, b in zip(bits(whole).values(), bits(rest).values(), strict=True))


def test_resume_checks_config_base_and_kind_of_file(tmp_path: Path) -> None:
    fit(tmp_path, LitNet(), 1, callbacks=(checkpoint_in(tmp_path),))
    last = tmp_path / "last.ckpt"
    with pytest.raises(ValueError, match=r"another LoRA config .*alpha: 4\.0 != 8\.0"):
        fit(tmp_path, LitNet(), 2, ckpt=last, lora=LoRACallback(LoRAConfig(rank=2, alpha=8, target_modules=["fc1", "fc2"])))
    other = LitNet()
    other.net.embed.weight.data.mul_(2)
    with pytest.raises(ValueError, match="was trained on another base: fingerprint"):
        fit(tmp_path, other, 2, ckpt=last)
    fit(tmp_path, other, 2, ckpt=last, lora=LoRACallback(CONFIG, check_base=False))
    trainer(tmp_path, checkpoint_in(tmp_path / "full"), max_epochs=1).fit(LitNet())
    with pytest.raises(ValueError, match="was not written under LoRACallback"):
        fit(tmp_path, LitNet(), 2, ckpt=tmp_path / "full/last.ckpt")


def test_a_checkpoint_that_lacks_an_adapter_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, LitNet(), 1, callbacks=(checkpoint_in(tmp_path),))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del saved["state_dict"]["net.fc2.lora_B"]
    torch.save(saved, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"lacks 1 trained tensor: net\.fc2\.lora_B"):
        fit(tmp_path, LitNet(), 2, ckpt=tmp_path / "last.ckpt")


def test_load_adapter_reads_a_checkpoint(tmp_path: Path) -> None:
    module = LitNet()
    fit(tmp_path, module, 1, callbacks=(checkpoint_in(tmp_path),), lora=LoRACallback(CONFIG, merge_on_fit_end=False))
    module.eval()
    x = torch.randn(4, 8)
    for fresh in (make_net(), LitNet()):  # into the network alone, or into a module around one
        load_adapter(fresh, tmp_path / "last.ckpt").eval()
        torch.testing.assert_close(getattr(fresh, "net", fresh)(x), module.net(x), rtol=0, atol=0)
    save_adapter(module, tmp_path / "folder")
    torch.testing.assert_close(load_adapter(make_net(), tmp_path / "folder").eval()(x), module.net(x), rtol=0, atol=0)
