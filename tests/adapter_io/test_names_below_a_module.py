"""Patterns that name a LightningModule's own attribute: names in files are relative to the one module inside it."""

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, load_adapter, lora_layers, save_adapter
from tests.conftest import fill


class Inside(L.LightningModule):
    """One child, whose name is part of every name here and of none in a file."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Linear(6, 6))

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, index):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
FIELDS = {
    "name": {"target_modules": ["layers.2"]},
    "regex": {"target_modules": r".*layers\.2"},
    "patterns": {"target_modules": "all-linear", "rank_pattern": {"layers.2": 3}, "alpha_pattern": {"layers.3": 2}},
    "exclusion": {"target_modules": "all-linear", "exclude_modules": ["layers.0"]},
    "init": {"target_modules": ["layers.2", "layers.3"], "rank_pattern": {"layers.3": 2}, "rank": 3, "init": "pissa"},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_what_is_saved_loads(fields, tmp_path):
    model = fill(apply_lora(Inside(), LoRAConfig(**{"rank": 4, **fields})))
    folder = save_adapter(model, tmp_path / "adapter")
    for base in (Inside(), Inside().layers):  # the module, and what is inside
        found = load_adapter(base, folder)
        torch.testing.assert_close(found(X), model(X), rtol=1e-5, atol=1e-5)
        again = load_adapter(Inside(), save_adapter(found, tmp_path / type(base).__name__))
        torch.testing.assert_close(again(X), model(X), rtol=1e-5, atol=1e-5)


def test_names_that_fit_are_kept(tmp_path):
    model = apply_lora(Inside(), LoRAConfig(rank=4, target_modules=["2"]))
    (_, layer), *others = lora_layers(load_adapter(Inside(), save_adapter(model, tmp_path / "adapter")))
    assert not others and layer.lora_config.target_modules == ("2",)


@pytest.mark.parametrize("fields", [each for name, each in FIELDS.items() if name != "init"], ids=str)
def test_a_checkpoint_loads(fields, tmp_path):
    module = Inside()
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[LoRACallback(LoRAConfig(rank=4, **fields), merge_on_fit_end=False)],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.stack([X[0]] * 4), batch_size=2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for base in (Inside(), Inside().layers):
        torch.testing.assert_close(load_adapter(base, tmp_path / "last.ckpt")(X), module(X), rtol=1e-5, atol=1e-5)
