"""Train an existing adapter further, from a folder of PEFT's or ours: the run starts from its values and resumes as any other."""

import lightning as L
import pytest
import torch

from lightning_lora import LoRACallback, LoRAConfig, get_lora_parameters, load_adapter, save_adapter

from .models import DEPRECATED_BY_PEFT, base, batch, randomise, theirs

pytestmark = pytest.mark.filterwarnings(DEPRECATED_BY_PEFT, "ignore:The dirpath has changed")


class Task(L.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model.train()

    def training_step(self, step, index):
        return self.model(**step).loss

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader([batch("llama", seed) for seed in range(2)], batch_size=None)


def adapter(module):
    return [p.detach().clone() for p in get_lora_parameters(module)]


def fit(module, folder, epochs, **kwargs):
    """Train; return the adapter as it was at the start of the first epoch."""
    starts = []

    class Start(L.Callback):
        def on_train_start(self, trainer, task):
            starts.append(adapter(task))

    callbacks = [LoRACallback(LoRAConfig(rank=4, alpha=8)), Start()]
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, default_root_dir=folder, **options)
    trainer.fit(module, **kwargs)
    return starts[0], trainer.checkpoint_callback.best_model_path


@pytest.mark.parametrize("whose", ["theirs", "ours"])
@pytest.mark.parametrize("inner", [True, False], ids=["model", "task"])
def test_the_run_starts_from_the_folder_and_resumes(whose, inner, tmp_path):
    other = theirs(base("llama"), target_modules=["v_proj", "q_proj"], r=4, lora_alpha=8)
    randomise(other)
    other.save_pretrained(tmp_path / "theirs")
    save_adapter(load_adapter(base("llama"), tmp_path / "theirs"), tmp_path / "ours")

    def loaded():
        task = Task(base("llama"))
        load_adapter(task.model if inner else task, tmp_path / whose)
        return task

    task, before = loaded(), adapter(loaded())
    start, checkpoint = fit(task, tmp_path / "one", 1)
    assert all(map(torch.equal, start, before))
    assert not any(map(torch.equal, adapter(task), before))
    resumed, whole = loaded(), loaded()
    fit(resumed, tmp_path / "two", 2, ckpt_path=checkpoint)
    fit(whole, tmp_path / "three", 2)
    assert all(map(torch.equal, adapter(resumed), adapter(whole)))
