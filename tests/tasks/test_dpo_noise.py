"""What a model draws at random in training: DPO turns it off where a field says how much it is, and refuses the rest by name."""

import pytest
import torch
import torch.nn.functional as F

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.data import PreferenceDataModule
from lightning_lora.tasks import DPOTask, base
from tests import tiny_lm
from tests.tasks.tiny import trainer

CONFIG = LoRAConfig(rank=2, target_modules=["q_proj", "v_proj"])
PAIRS = [
    {"prompt": f"which colour is {thing}", "chosen": "blue sky", "rejected": "red"} for thing in ("the sky", "blood", "a pear", "grass")
]


def run(network, tmp_path, monkeypatch, **options):
    """The losses of an epoch of one batch, at a learning rate of nearly nothing, so that policy and reference stay equal."""
    monkeypatch.setattr(base, "load_model", lambda *args: network)
    monkeypatch.setattr(base, "load_tokenizer", lambda *args: tiny_lm.tokenizer())
    task = DPOTask("any", learning_rate=1e-12, **options)
    file = tiny_lm.write(tmp_path / "pairs.jsonl", PAIRS)
    fit = trainer(LoRACallback(CONFIG), max_epochs=1, limit_val_batches=0)
    fit.fit(task, PreferenceDataModule(file, batch_size=4))
    return task, fit.callback_metrics["train_loss"].item()


def noisy(rate):
    """A model whose first block drops with ``rate(module)``, a function of a module that reads it where it likes."""
    network = tiny_lm.llama()
    layer = network.model.layers[0].mlp
    layer.register_forward_hook(lambda module, args, output: F.dropout(output, rate(network), training=module.training))
    return network


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_rate_in_the_configuration_is_off_while_it_trains(checkpointing, tmp_path, monkeypatch):
    """Also where gradient checkpointing computes the block again, after the step's forward passes."""
    seen = []
    network = noisy(lambda model: seen.append(model.config.resid_pdrop) or model.config.resid_pdrop)
    network.config.resid_pdrop = 0.5
    task, loss = run(network, tmp_path, monkeypatch, gradient_checkpointing=checkpointing)
    assert loss == pytest.approx(0.6931472, abs=1e-6) and set(seen) == {0.0} and len(seen) >= 4 + checkpointing
    assert task.model.config.resid_pdrop == 0.5  # which is saved with the model


def test_a_routers_jitter_is_off(tmp_path, monkeypatch):
    network = tiny_lm.llama()
    layer = network.model.layers[0].mlp
    layer.jitter_noise = 0.5
    layer.register_forward_hook(lambda module, args, output: output * (1 + module.jitter_noise * torch.rand_like(output)))
    assert run(network, tmp_path, monkeypatch)[1] == pytest.approx(0.6931472, abs=1e-6)


def test_noise_that_no_field_sets_is_refused_before_a_step(tmp_path, monkeypatch):
    network = noisy(lambda model: 0.5)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM draws at random in training, even with its dropout at 0 \(.* by chance; take the noise"
    ):
        run(network, tmp_path, monkeypatch)
    after = network.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_check_draws_no_random_numbers(tmp_path, monkeypatch):
    states = []
    for checks in (True, False):
        torch.manual_seed(0)
        with monkeypatch.context() as patch:
            if not checks:
                patch.setattr(DPOTask, "_check_exact", lambda self, batch: None)
            run(tiny_lm.llama(), tmp_path, patch)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
