"""LoRA-FA beyond what `make family` checks: the frozen factor is the random one, and no checkpoint, file or process loses it."""

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, get_lora_parameters, load_adapter, lora_param_groups, save_adapter
from tests.conftest import TinyModel, fill, same_bits
from tests.layers.kinds import CASES
from tests.lit import CONFIG, LitNet, bits, make_net, trainer
from tests.parity.models import close, read_by_peft

FA = LoRAConfig(**{**CONFIG.to_dict(), "variant": "lora_fa"})


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_the_factor_that_starts_at_random_is_frozen(kind, init):
    layer = CASES[kind].layer(filled=False, variant="lora_fa", init=init)
    random, zero = layer.lora_factors()
    assert random.count_nonzero() and not zero.count_nonzero()
    assert not random.requires_grad and zero.requires_grad
    layer(CASES[kind].x()).square().sum().backward()
    assert random.grad is None and zero.grad.count_nonzero()


def test_training_moves_b_as_plain_lora_does_at_the_first_step(make, ids):
    """With A the same, B's first gradient is plain LoRA's."""
    grads = []
    for variant in ("plain", "lora_fa"):
        torch.manual_seed(1)
        model = apply_lora(make(TinyModel), config=LoRAConfig(rank=2, target_modules=["q_proj"], variant=variant))
        model(ids).square().sum().backward()
        grads.append(model.layers[0].attn.q_proj.lora_B.grad)
    assert same_bits(*grads)


def test_half_of_the_adapter_is_in_no_group(make):
    model = apply_lora(make(TinyModel), config=LoRAConfig(rank=2, target_modules=["q_proj"], variant="lora_fa"))
    assert [group["name"] for group in lora_param_groups(model, lr=1e-3)] == ["lora_B"]
    assert len(get_lora_parameters(model)) == 4  # both factors are the adapter's


def test_folders_hold_a_and_are_plain_lora_to_peft(make, ids, tmp_path):
    model = fill(apply_lora(make(TinyModel), config=LoRAConfig(rank=2, target_modules=["q_proj", "embed"], variant="lora_fa"))).eval()
    save_adapter(model, tmp_path)
    expected = model(ids)
    loaded = load_adapter(make(TinyModel), tmp_path)
    assert same_bits(loaded.eval()(ids), expected)
    assert [p.requires_grad for p in get_lora_parameters(loaded)] == [p.requires_grad for p in get_lora_parameters(model)]
    close(read_by_peft(make(TinyModel), tmp_path)(ids), expected)


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory", "ignore:Be aware that when using")
@pytest.mark.parametrize("late", [False, True])
def test_resume_brings_a_back_whatever_was_drawn(tmp_path, late):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(module, epochs, seed, ckpt=None):
        torch.manual_seed(seed)  # another A is drawn when the seed is another
        saver = ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
        trainer(tmp_path, LoRACallback(FA, merge_on_fit_end=False), saver, max_epochs=epochs).fit(module, ckpt_path=ckpt)

    whole, half, rest = LitNet(late), LitNet(late), LitNet(late)
    run(whole, 2, 4)
    start = whole.net.fc1.lora_A.detach().clone()
    run(half, 1, 4)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {f"net.{fc}.{part}" for fc in ("fc1", "fc2") for part in ("lora_A", "lora_B")} <= saved.keys()
    assert not any(name.endswith("weight") for name in saved)
    run(rest, 2, 9, tmp_path / "last.ckpt")
    assert half.losses + rest.losses == whole.losses
    for name, tensor in bits(whole).items():
        assert torch.equal(tensor, bits(rest)[name]), name
    assert same_bits(rest.net.fc1.lora_A, start)
    x = torch.randn(6, 8)
    assert same_bits(load_adapter(make_net(), tmp_path / "last.ckpt").eval()(x), rest.net.eval()(x))


def test_a_checkpoint_without_a_is_refused(tmp_path):
    module = LitNet()
    run = trainer(tmp_path, LoRACallback(FA, merge_on_fit_end=False), max_epochs=1, enable_checkpointing=False)
    run.fit(module)
    run.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del checkpoint["state_dict"]["net.fc1.lora_A"]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    again = trainer(tmp_path, LoRACallback(FA), max_epochs=2, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"lacks 1 trained tensor: net\.fc1\.lora_A"):
        again.fit(LitNet(), ckpt_path=tmp_path / "a.ckpt")


def test_materialised_it_stays_frozen():
    with torch.device("meta"):
        model = apply_lora(nn.Sequential(nn.Linear(4, 4)), config=LoRAConfig(rank=2, variant="lora_fa", target_modules=["0"]))
    model.to_empty(device="cpu")[0].reset_parameters()
    assert not model[0].lora_A.requires_grad and model[0].lora_A.count_nonzero() == 8
