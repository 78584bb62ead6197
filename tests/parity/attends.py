"""A model with one ``nn.MultiheadAttention``."""

from torch import Tensor, nn


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.attention(x, x, x)[0])
        return out
