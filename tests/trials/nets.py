"""Tiny modules whose trials can be computed together, or cannot, and their rows."""

import lightning
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora.tasks.joining import join_batches, owned_means


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


class Counting(nn.Module):
    """Its state is a new tensor in every step, by which nothing is computed yet."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen = self.seen + len(x)
        return x


MIDDLES = {
    "plain": (nn.Tanh, None),
    "dropout": (lambda: nn.Dropout(0.3), None),
    "batch norm": (lambda: nn.BatchNorm1d(8), "changes in every step"),
    "counting": (Counting, "1.seen changes in every step"),
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
