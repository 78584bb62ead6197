"""Patterns that name a LightningModule's own attribute: names in files are relative to the one module inside it."""

import warnings

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, load_adapter, lora_layers, save_adapter
from tests.conftest import fill
from tests.layers.experts import tiny_qwen3_moe
from tests.layers.fused import MODELS


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


class Language(nn.Module):
    """An embedding and a head of its own, which rows and modules_to_save may name."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(9, 6), nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.score, self.lm_head = nn.Linear(6, 3), nn.Linear(6, 9, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return torch.cat([self.lm_head(x), self.score(x)], -1)


class Around(Inside):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        del self.layers
        self.model = make()

    def forward(self, ids):
        out = self.model(ids)
        return out if isinstance(out, torch.Tensor) else out.logits


def phi3():
    model = MODELS["phi3"]()
    model.set_attn_implementation("eager")
    return model


Q = "model.model.layers.0.self_attn"
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
BOTH = ["shared_outer", "rank_over_active"]
NAMED = {
    "rows": (Language, {"target_modules": ["layers.1"], "trainable_token_indices": {"model.embed": [3, 4], "model.lm_head": [3]}}),
    "rows by regex": (Language, {"target_modules": [r"^model\.layers\.1$"], "trainable_token_indices": {r"^model\.embed$": [3]}}),
    "a list of rows": (Language, {"target_modules": ["model.layers.1"], "trainable_token_indices": [3]}),
    "a head": (Language, {"target_modules": ["layers.1"], "modules_to_save": ["model.score"]}),
    "a head by regex": (Language, {"target_modules": ["1"], "modules_to_save": [r"^model\.score$"], "rank_pattern": {"model.layers.1": 2}}),
    "a head's bias": (Language, {"target_modules": ["model.layers.1"], "modules_to_save": ["model.score.bias"]}),
    "a head, unmatched allowed": (Language, {"target_modules": ["1"], "modules_to_save": ["model.score"], "allow_unmatched": True}),
    "exclusion and layers": (Language, {"target_modules": "all-linear", "exclude_modules": ["model.score"], "layers": [1]}),
    "slices": (phi3, {"target_modules": [f"{Q}.q_proj", "model.model.layers.1.mlp.up_proj"]}),
    "slices but one": (phi3, {"target_modules": "all-linear", "exclude_modules": [f"{Q}.k_proj"]}),
    "slices' rank": (phi3, {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {f"{Q}.qkv_proj": 2}}),
    "experts": (
        tiny_qwen3_moe,
        {"target_modules": [r"^model\.model\.layers\.1\.mlp\.experts$"], "kind_options": {"experts": dict.fromkeys(BOTH, True)}},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "fields"), NAMED.values(), ids=NAMED)
def test_all_that_a_config_names_is_found_below(make, fields, tmp_path):
    """In folders, in checkpoints, and in a run that starts from a checkpoint."""

    def fitted(**options):
        module = Around(make)
        trainer = L.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            enable_checkpointing=False, callbacks=[LoRACallback(merge_on_fit_end=False, check_gradients=False, **options)],
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(IDS, batch_size=1))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module.eval()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "target_modules='all-linear' leaves out|.*does not have many workers")
        module = fitted(config=LoRAConfig(**{"rank": 4, **fields}))
        folder = save_adapter(module, tmp_path / "adapter")
        for file in (folder, tmp_path / "last.ckpt"):
            for base in (Around(make), Around(make).model):
                found = load_adapter(base, file).eval()
                out = found(IDS)
                torch.testing.assert_close(out if isinstance(out, torch.Tensor) else out.logits, module(IDS), rtol=1e-5, atol=1e-5)
        load_adapter(module, folder)
        started = fitted(start_from=tmp_path / "last.ckpt")
    trained, again = ({name: p.shape for name, p in each.named_parameters() if p.requires_grad} for each in (module, started))
    assert again == trained


class Nested(nn.Module):
    """The same pattern means one layer here, and another in a module around it."""

    def __init__(self):
        super().__init__()
        self.model, self.fc = nn.Sequential(), nn.Linear(6, 6)
        self.model.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(self.model.fc(x).tanh())


def test_a_reading_that_finds_other_layers_is_not_taken(tmp_path):
    module = Around(Nested)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        enable_checkpointing=False, callbacks=[LoRACallback(LoRAConfig(rank=2, target_modules=[r"model\.fc"]), merge_on_fit_end=False)],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.stack([X[0]] * 4), batch_size=2))
    assert [name for name, _ in lora_layers(module)] == ["model.fc"]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for file in (tmp_path / "last.ckpt", save_adapter(module, tmp_path / "adapter")):
        torch.testing.assert_close(load_adapter(Around(Nested), file)(X), module(X), rtol=1e-5, atol=1e-5)
