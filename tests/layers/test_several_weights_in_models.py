"""A module with several weights in a whole model: files, exports, optimizers, reports and the Trainer."""

from __future__ import annotations

import copy
import json

import lightning as L
import pytest
import safetensors.torch
import torch

import lightning_lora as ll
from lightning_lora import apply_lora, load_adapter, merge_lora, save_adapter, unload_lora, unmerge_lora
from lightning_lora.adapter_io.fingerprint import base_identity
from lightning_lora.optim import galore_param_groups
from tests.adapter_io.folders import differences
from tests.conftest import base_bits, fill, same_bits
from tests.layers.experts import LoRAExperts, registered, tiny_qwen3_moe
from tests.layers.mixtures import CONFIG, FQN, IDS, MODELS, every_model, experts


@pytest.fixture(autouse=True)
def with_the_kind():
    with registered():
        yield


@every_model
def test_files_and_exports_hold_every_weight(model, tmp_path):
    make = MODELS[model]
    base, identity = base_bits(make()), base_identity(make())
    model = fill(apply_lora(make(), config=CONFIG))
    logits = model(IDS).logits
    assert base_identity(model) == identity
    ll.export_merged(model, tmp_path / "unmerged")
    merge_lora(model)
    assert base_identity(model) == identity  # of the base, not of what is in the weights now
    save_adapter(model, tmp_path / "adapter")
    ll.export_merged(model, tmp_path / "merged")
    files = [safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("unmerged", "merged")]
    assert files[0].keys() == files[1].keys() and all(same_bits(files[0][name], tensor) for name, tensor in files[1].items())
    unload_lora(copy.deepcopy(model), merged="keep").save_pretrained(tmp_path / "plain")
    assert differences(tmp_path / "merged", tmp_path / "plain") == []
    assert same_bits(type(model).from_pretrained(tmp_path / "merged").get_submodule(FQN).down_proj, experts(model).down_proj)

    loaded = load_adapter(make(), tmp_path / "adapter")
    assert same_bits(loaded(IDS).logits, logits)
    other = make()
    with torch.no_grad():
        experts(other).down_proj.add_(1)
    with pytest.raises(ValueError, match="was trained on another base"):
        load_adapter(other, tmp_path / "adapter")
    assert base_bits(unload_lora(unmerge_lora(model))) == base
    assert {type(module) for module in model.modules()} == {type(module) for module in make().modules()}


def test_peft_refuses_the_folder_aloud(tmp_path):
    from peft import PeftModel

    save_adapter(fill(apply_lora(tiny_qwen3_moe(), config=CONFIG)), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["experts"]
    with pytest.raises(ValueError, match="is not supported"):
        PeftModel.from_pretrained(tiny_qwen3_moe(), tmp_path)


def test_parameter_groups_have_the_factors_of_every_weight():
    model = apply_lora(tiny_qwen3_moe(), config=CONFIG)
    names = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
    groups = {group["name"]: group for group in ll.lora_param_groups(model, lr=1e-3, lora_plus_ratio=4)}
    assert {name: {names[id(p)] for p in group["params"]} for name, group in groups.items()} == {
        f"lora_{factor}": {f"lora_{factor}_{name}" for name in LoRAExperts.adapted} for factor in "AB"
    }
    assert (groups["lora_A"]["lr"], groups["lora_B"]["lr"]) == (1e-3, 4e-3)


def test_galore_names_the_weight_that_is_no_matrix():
    with pytest.raises(ValueError, match=r"experts.gate_up_proj has shape \(8, 32, 32\), and only matrices"):
        galore_param_groups(tiny_qwen3_moe(), lr=1e-3, rank=2, target_modules=["experts"])


def test_the_report_has_every_weight():
    report = ll.find_targets(tiny_qwen3_moe(), CONFIG)
    assert report.targets[0].shapes == [(8, 32, 32), (8, 32, 16)] and report.targets[0].shape == (8, 32, 32)
    assert "Qwen3MoeExperts  8×32×32, 8×32×16" in str(report)
    assert report.parameters == sum(p.numel() for p in ll.get_lora_parameters(apply_lora(tiny_qwen3_moe(), config=CONFIG)))


class LitMoE(L.LightningModule):
    """Two blocks of a mixture, trained on its own inputs."""

    def __init__(self):
        super().__init__()
        self.model, self.losses = tiny_qwen3_moe(), []

    def training_step(self, batch):
        loss = self.model(batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


def fit(folder, epochs, checkpoint=None, **options):
    torch.manual_seed(0)
    lit = LitMoE()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "default_root_dir": folder}
    trainer = L.Trainer(**quiet, max_epochs=epochs, callbacks=[ll.LoRACallback(CONFIG, **options)], enable_checkpointing=False)
    loader = torch.utils.data.DataLoader(torch.arange(48).reshape(4, 12), batch_size=2)
    trainer.fit(lit, loader, ckpt_path=checkpoint)
    return lit, trainer


def test_training_checkpoints_and_resumes_to_the_bit(tmp_path):
    whole, _ = fit(tmp_path, 2, merge_on_fit_end=False)
    half, trainer = fit(tmp_path, 1, merge_on_fit_end=False)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert len(state) == 8 and all(".experts.lora_" in name for name in state)
    resumed, _ = fit(tmp_path, 2, tmp_path / "half.ckpt", merge_on_fit_end=False)
    assert half.losses + resumed.losses == whole.losses and whole.losses[2] < whole.losses[0]  # the same batch
    assert all(same_bits(p, whole.get_parameter(name)) for name, p in resumed.named_parameters())
    loaded = load_adapter(LitMoE(), tmp_path / "half.ckpt")
    assert all(same_bits(p, half.get_parameter(name)) for name, p in loaded.named_parameters())


def test_the_callback_merges_every_weight_at_the_end(tmp_path):
    lit, _ = fit(tmp_path, 1)
    base, merged = experts(tiny_qwen3_moe()), experts(lit.model)
    assert merged.merged and all(not same_bits(merged._parameters[name], base._parameters[name]) for name in LoRAExperts.adapted)
    assert base_bits(unmerge_lora(lit.model)) == base_bits(tiny_qwen3_moe())
