"""A checkpoint holds everything that training changed: as plain Lightning's, a fresh module tests from it as the trained one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from torch import nn

from lightning_lora import LoRACallback, load_adapter
from lightning_lora.strategies import changed_state
from tests.callbacks.changing_modules import CONFIG, KINDS, Beside, Codebook, Extra, InSetup, Lit, Statistics, X
from tests.lit import trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed"
)


def lora(cls: type[Lit], **kwargs: Any) -> LoRACallback:
    return LoRACallback(CONFIG, module=None if cls in (Statistics, Extra) else "backbone", **kwargs)


def fit(cls: type[Lit], folder: Path, epochs: int = 2, ckpt: Any = None, merge: bool = False, **kwargs: Any) -> tuple[Lit, L.Trainer]:
    module = cls()
    if hasattr(module, "prepare") and ckpt is None:
        module.prepare()
    last = ModelCheckpoint(folder, save_last=True, enable_version_counter=False, **kwargs)
    run = trainer(folder, lora(cls, merge_on_fit_end=merge), last, max_epochs=epochs)
    run.fit(module, ckpt_path=ckpt)
    return module, run


def loss(run: L.Trainer, module: Lit, ckpt: Any = None) -> float:
    return run.test(module, ckpt_path=ckpt, verbose=False)[0]["loss"]


# A base that `setup` writes into a merged weight once more, not by load_state_dict, cannot be told from one that the user changed.
@pytest.mark.parametrize("cls, merge", [(cls, merge) for cls in KINDS for merge in (False, True) if cls is not InSetup or not merge])
def test_a_fresh_module_tests_as_the_trained_one(tmp_path: Path, cls: type[Lit], merge: bool) -> None:
    module, run = fit(cls, tmp_path, merge=merge)
    here = loss(run, module)
    fresh = trainer(tmp_path, lora(cls))
    assert loss(fresh, cls(), tmp_path / "last.ckpt") == pytest.approx(here, rel=1e-5)
    assert loss(fresh, cls()) != pytest.approx(here, rel=1e-4)  # what was trained matters
    run.save_checkpoint(tmp_path / "late.ckpt")  # after a merge, too
    assert loss(fresh, cls(), tmp_path / "late.ckpt") == pytest.approx(here, rel=1e-5)


@pytest.mark.parametrize("cls", KINDS)
def test_resume_is_exact(tmp_path: Path, cls: type[Lit]) -> None:
    torch.manual_seed(3)
    whole, _ = fit(cls, tmp_path / "whole", epochs=4)
    torch.manual_seed(3)
    fit(cls, tmp_path / "half", epochs=2)
    rest, _ = fit(cls, tmp_path / "rest", epochs=4, ckpt=tmp_path / "half" / "last.ckpt")
    kept = {name: value for name, value in whole.state_dict().items() if isinstance(value, torch.Tensor)}
    assert kept
    for name, value in kept.items():
        assert torch.equal(value, rest.state_dict()[name]), name


def test_weights_only_checkpoints_hold_the_same(tmp_path: Path) -> None:
    for cls in (Codebook, Extra, Beside):
        fit(cls, tmp_path / cls.__name__)
        fit(cls, tmp_path / "weights", save_weights_only=True)
        names = [set(torch.load(tmp_path / f / "last.ckpt", weights_only=True)["state_dict"]) for f in (cls.__name__, "weights")]
        assert names[0] == names[1]


def test_what_does_none_of_this_stays_adapter_sized(tmp_path: Path) -> None:
    class Wide(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.backbone["wide"] = nn.Linear(512, 512)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return super().training_step(batch, index) + 0 * self.backbone["wide"].weight.sum()

    for merge in (False, True):
        _, run = fit(Wide, tmp_path / str(merge), merge=merge)
        run.save_checkpoint(tmp_path / str(merge) / "late.ckpt")
        for name in ("last", "late"):
            saved = torch.load(tmp_path / str(merge) / f"{name}.ckpt", weights_only=True)["state_dict"]
            assert set(saved) == {"backbone.up.lora_A", "backbone.up.lora_B"}
            assert (tmp_path / str(merge) / f"{name}.ckpt").stat().st_size < 20_000 < Wide().backbone["wide"].weight.nbytes


class Late(Codebook):
    """The codebook moves from the third epoch on."""

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return super().training_step(batch, index) if self.current_epoch > 1 else Lit.training_step(self, batch, index)


def test_loading_resets_what_a_checkpoint_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module = Late()
    run = trainer(tmp_path, lora(Late), every, max_epochs=4)
    run.fit(module)
    assert module.backbone["code"].weight.any()
    early, late = (torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"] for epoch in (0, 3))
    assert "backbone.code.weight" in late and "backbone.code.weight" not in early
    wanted = loss(trainer(tmp_path, lora(Late)), Late(), tmp_path / "epoch=0.ckpt")
    assert loss(run, module, tmp_path / "epoch=0.ckpt") == pytest.approx(wanted, rel=1e-6)
    assert not module.backbone["code"].weight.any()
    loss(run, module, tmp_path / "epoch=3.ckpt")
    assert module.backbone["code"].weight.any()

    monkeypatch.setattr(changed_state, "COPIES", 0)
    module = Late()
    run = trainer(tmp_path, lora(Late), max_epochs=4)
    run.fit(module)
    before = {name: p.clone() for name, p in module.named_parameters()}
    with pytest.raises(ValueError, match=r"written before 'backbone\.code\.weight' changed in training.*into a newly made module"):
        loss(run, module, tmp_path / "epoch=0.ckpt")
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lr_find_restores_what_it_moved(tmp_path: Path) -> None:
    class See(L.Callback):
        def on_train_start(self, run: L.Trainer, module: L.LightningModule) -> None:
            self.code = module.backbone["code"].weight.detach().clone()

    see = See()
    run = trainer(tmp_path, lora(Codebook), LearningRateFinder(num_training_steps=5), see, max_epochs=1)
    run.fit(Codebook())
    assert not see.code.any()


@pytest.mark.parametrize("cls", [Statistics, Extra, Codebook, Beside])
def test_load_adapter_reads_such_checkpoints(tmp_path: Path, cls: type[Lit]) -> None:
    module, _ = fit(cls, tmp_path)
    fresh, x = cls(), X[:4]
    if cls is Beside:  # the adapted part alone: what is beside it has no place there
        load_adapter(fresh.backbone, tmp_path / "last.ckpt")
        assert torch.equal(Lit.forward(fresh, x), Lit.forward(module, x))
    else:
        load_adapter(fresh, tmp_path / "last.ckpt").eval()
        assert torch.equal(fresh(x), module.eval()(x))


def test_another_base_is_still_refused(tmp_path: Path) -> None:
    fit(Lit, tmp_path)
    other = Lit()
    other.backbone["up"].weight.data.add_(1)
    with pytest.raises(ValueError, match="was trained on another base"):
        loss(trainer(tmp_path, lora(Lit)), other, tmp_path / "last.ckpt")
