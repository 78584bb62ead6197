"""Give images one of several labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.tasks.flops import measured_positions
from lightning_lora.tasks.hf import load_image_processor
from lightning_lora.tasks.labels import LabelTask


class ImageClassificationTask(LabelTask):
    """A Hugging Face model that gives an image one of several labels (extra ``vision``). Arguments and metrics are those of `LabelTask`.

    Prediction gives the image's file, its most probable label, and that label's probability.

    Examples:
        >>> task = ImageClassificationTask("models/vit", learning_rate=1e-3)
        >>> trainer = L.Trainer(max_epochs=1, callbacks=[LoRACallback()])
        >>> trainer.fit(task, ImageClassificationDataModule("images"))
        >>> task.labels
        ['blue', 'red']
        >>> rows = trainer.predict(task, ImageClassificationDataModule(predict="images"))[0]
        >>> sorted(rows[0])
        ['image', 'label', 'score']
    """

    auto_class = "AutoModelForImageClassification"
    data_class = "lightning_lora.data.ImageClassificationDataModule"
    inputs = ("pixel_values",)

    @override
    def load_preprocessor(self) -> None:
        self._positions: dict[nn.Module, int] = {}  # per image
        self.processor = load_image_processor(self.hparams["model"])

    @override
    def load(self, **config: Any) -> None:
        super().load(**config)
        blank = self.processor(images=[torch.zeros(3, 8, 8, dtype=torch.uint8)], return_tensors="pt").to(self.model.device)
        self.model.eval()
        with torch.no_grad():
            self._positions = measured_positions(self.model, lambda: self(blank))
        self.model.train()

    @override
    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return the logits (B, C)."""
        return super().forward({"pixel_values": batch["pixel_values"].to(self.model.dtype)})

    @override
    def parts(self, batch: dict[str, Any]) -> Sequence[tuple[nn.Module, int]]:
        return [(layer, positions * len(batch["pixel_values"])) for layer, positions in self._positions.items()]

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Return each image's file with its label and the label's probability."""
        best = self.best(self(batch))
        return [{"image": file, "label": label, "score": score} for file, (label, score) in zip(batch["files"], best, strict=True)]
