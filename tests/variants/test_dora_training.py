"""DoRA under a Trainer: groups, exact resume, merging at the end, and its benchmark."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, load_adapter, lora_param_groups, merge_lora
from tests.conftest import same_bits
from tests.lit import CONFIG, LitNet, bits, make_net, trainer


def test_magnitudes_do_not_decay():
    model = apply_lora(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4)), config=LoRAConfig(rank=2, variant="dora", target_modules=["0", "1"])
    )
    groups = {group["name"]: group for group in lora_param_groups(model, lr=1e-3, weight_decay=0.1)}
    assert {id(p) for p in groups["no_decay"]["params"]} == {id(layer.lora_magnitude_vector) for layer in model}
    assert groups["no_decay"]["weight_decay"] == 0


def lora(**fields):
    return LoRACallback(LoRAConfig(**{**CONFIG.to_dict(), "variant": "dora", **fields}), merge_on_fit_end=False)


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory", "ignore:Be aware that when using")
def test_under_the_callback_resume_is_step_exact_and_the_merge_is_the_model(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(module, epochs, ckpt=None, **fields):
        torch.manual_seed(4)
        saver = ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
        trainer(tmp_path, lora(**fields), saver, max_epochs=epochs).fit(module, ckpt_path=ckpt)

    whole, half, rest = LitNet(), LitNet(), LitNet()
    run(whole, 2)
    run(half, 1)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {"net.fc1.lora_magnitude_vector", "net.fc2.lora_A"} < saved.keys() and "net.fc1.weight" not in saved
    run(rest, 2, tmp_path / "last.ckpt")
    assert half.losses + rest.losses == whole.losses
    for name, tensor in bits(whole).items():
        assert torch.equal(tensor, bits(rest)[name]), name
    assert not torch.equal(whole.net.fc1.lora_magnitude_vector, whole.net.fc1.weight.norm(dim=1))
    twin = load_adapter(make_net(), tmp_path / "last.ckpt").eval()
    x = torch.randn(6, 8)
    expected = rest.net.eval()(x)
    assert same_bits(twin(x), expected)
    torch.testing.assert_close(merge_lora(rest.net)(x), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_benchmark_measures(monkeypatch, capsys):
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    script = runpy.run_path(str(folder / "dora_step.py"))
    ratios = script["main"](["--hidden", "64", "--layers", "1", "--seq", "8", "--batch", "1", "--steps", "2", "--bias"])
    assert ratios["plain"] == 1 and all(ratio > 0 for ratio in ratios.values())
    assert "saved for backward" in capsys.readouterr().out
