"""Give texts one of several labels: the topic of a message, the sentiment of a review."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_lora.tasks.labels import LabelTask


class SequenceClassificationTask(LabelTask):
    """A Hugging Face model that gives a text one of several labels. Arguments and metrics are those of `LabelTask`.

    Prediction gives the text, its most probable label, and that label's probability.

    Examples:
        >>> task = SequenceClassificationTask("models/bert", learning_rate=1e-3)
        >>> trainer = L.Trainer(max_epochs=1, callbacks=[LoRACallback(LoRAConfig(target_modules="all-linear"))])
        >>> trainer.fit(task, ClassificationDataModule("rows/labels.jsonl"))
        >>> rows = trainer.predict(task, ClassificationDataModule(predict="rows/labels.jsonl"))[0]
        >>> rows[0]["text"], rows[0]["label"] in task.labels
        ('which colour is the sky', True)
    """

    auto_class = "AutoModelForSequenceClassification"
    data_class = "lightning_lora.data.ClassificationDataModule"
    inputs = ("input_ids", "attention_mask", "token_type_ids")

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Return each text with its label and the label's probability."""
        best = self.best(self(batch))
        return [{"text": text, "label": label, "score": score} for text, (label, score) in zip(batch["texts"], best, strict=True)]
