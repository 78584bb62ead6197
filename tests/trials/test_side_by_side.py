"""Trials side by side are each what they are alone; a model that does not keep rows apart is found, and they run one after another."""

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, get_lora_parameters
from lightning_lora.tasks.joining import join_batches, owned_means
from lightning_lora.trials import SideBySide, Trial


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, row):
        generator = torch.Generator().manual_seed(row)
        return {"pixel_values": torch.randn(6, generator=generator, dtype=torch.float64), "labels": torch.tensor(row % 3)}


class Mixing(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Drawing(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.3, self.training)


MIDDLES = {
    "plain": (nn.Tanh, None),
    "dropout": (lambda: nn.Dropout(0.3), None),
    "batch norm": (lambda: nn.BatchNorm1d(8), "changes in every step"),
    "mixing": (Mixing, "does not keep rows apart"),
    "drawing": (Drawing, "random numbers"),
}


class Net(lightning.LightningModule):
    def __init__(self, middle):
        super().__init__()
        torch.manual_seed(4)
        self.model = nn.Sequential(nn.Linear(6, 8), MIDDLES[middle][0](), nn.Linear(8, 3)).double()

    def losses(self, batch):
        return F.cross_entropy(self.model(batch["pixel_values"]), batch["labels"], reduction="none")

    def training_loss(self, batch):
        return self.losses(batch).mean()

    def losses_by_owner(self, batch, owner, trials):
        return owned_means(self.losses(batch), owner, torch.ones_like(owner), trials)

    join = staticmethod(join_batches)

    def training_step(self, batch, batch_idx):
        loss = self.training_loss(batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05, eps=1e-3)


class Own(Net):
    """As any LightningModule: it says nothing of joint steps."""

    losses_by_owner = None


def trial(number, middle, found, cls=Net, batch_size=4, **options):
    def make():
        lightning.seed_everything(number, workers=True)
        module = cls(middle)
        found[number] = module
        loader = torch.utils.data.DataLoader(Rows(), batch_size, shuffle=True)
        config = LoRAConfig(rank=1 + number % 2, dropout=0.2 * (number % 3), target_modules=["0", "2"])
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        callback = LoRACallback(config, **options)
        trainer = lightning.Trainer(accelerator="cpu", max_epochs=3, callbacks=[callback], **quiet)
        return trainer, module, lambda: trainer.fit(module, loader)

    return Trial(f"trial {number}", {"number": number}, make)


def trained(module):
    return [p.detach() for p in [*get_lora_parameters(module), *module.buffers()]]


def alone(number, *arguments, **options):
    found = {}
    SideBySide(1).run([trial(number, *arguments[:1], found, *arguments[1:], **options)])
    return trained(found[number])


@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_each_trial_is_what_it_is_alone(middle):
    found, runner = {}, SideBySide()
    trials = [trial(number, middle, found, batch_size=4 if number < 3 else 5) for number in range(4)]
    runner.run(trials)
    reason = MIDDLES[middle][1]
    assert (runner.reason is None) == (reason is None), runner.reason
    if reason is None:
        assert runner.joint.forwards == 9 + 4 and runner.joint.steps == 36
    else:
        assert any(part in runner.reason for part in reason.split("|"))
    for number in range(4):
        pairs = zip(trained(found[number]), alone(number, middle, Net, 4 if number < 3 else 5), strict=True)
        assert all(torch.allclose(*pair, rtol=1e-9, atol=1e-12) for pair in pairs), number
    assert [each.outcome.status for each in trials] == ["complete"] * 4 and trials[0].outcome.monitor == "train_loss"
    if reason is None:
        assert found[1].model[0].weight is found[0].model[0].weight, "one base in memory"


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_any_module_runs_one_after_another(caplog):
    found, runner = {}, SideBySide()
    runner.run([trial(number, "plain", found, Own) for number in range(2)])
    assert "Own does not say how the losses of several runs are computed together" in str(runner.reason)
    assert all(map(torch.equal, trained(found[1]), alone(1, "plain", Own)))


def test_a_refusal_names_the_reason_and_runs_nothing():
    found = {}
    with pytest.raises(ValueError, match=r"side_by_side=True: Own does not say"):
        SideBySide(side_by_side=True).run([trial(number, "plain", found, Own) for number in range(2)])
    with pytest.raises(ValueError, match="offload='frozen' moves the base"):
        SideBySide().run([trial(0, "plain", found, offload="frozen")])
    with pytest.raises(ValueError, match="at_once=0"):
        SideBySide(0)
