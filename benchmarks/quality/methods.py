"""The ways to fine-tune that are compared: LoRA of this package, all weights, a head alone, and PEFT's prefix and prompt tuning.

Each prepares the task's model and returns the callbacks of its run. All of them then train through the same `Trainer`, task and data.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_lora import AdaLoRACallback, LoRACallback, LoRAConfig
from lightning_lora.ops.cross_entropy import IGNORE
from lightning_lora.optim import GaLoreConfig
from lightning_lora.tasks import CausalLMTask

HEADS = ("classifier", "score")  # names that transformers gives to a new head for labels


def lora(task: Any, config: dict[str, Any]) -> list[Callback]:
    """LoRA and its family. ``config["lora"]`` has fields of `LoRAConfig`, ``config["callback"]`` arguments of `LoRACallback`."""
    return [LoRACallback(LoRAConfig(**config.get("lora", {})), **{"merge_on_fit_end": False, **config.get("callback", {})})]


def adalora(task: Any, config: dict[str, Any]) -> list[Callback]:
    """LoRA whose ranks are allotted while it trains. ``config["callback"]`` has arguments of `AdaLoRACallback`."""
    return [AdaLoRACallback(LoRAConfig(**config["lora"]), **{"merge_on_fit_end": False, **config["callback"]})]


def full(task: Any, config: dict[str, Any]) -> list[Callback]:
    """Every parameter trains."""
    return []


def galore(task: Any, config: dict[str, Any]) -> list[Callback]:
    """Every parameter trains, with projected gradients. ``config["galore"]`` has fields of `GaLoreConfig`."""
    task.galore = GaLoreConfig(**config["galore"])
    return []


def probe(task: Any, config: dict[str, Any]) -> list[Callback]:
    """A linear probe: a new head on the frozen model. With ``config["pooling"] == "mean"`` it reads the mean of the last hidden states.

    That mean is what a sentence encoder was trained to give; the pooler that BERT's own head reads was not trained with it.
    """
    if config.get("pooling") == "mean":
        task.model = MeanProbe(task.model)
    for name, parameter in task.model.named_parameters():
        parameter.requires_grad_(name.partition(".")[0] in HEADS)
    return []


class MeanProbe(nn.Module):
    """A linear layer on the mean of an encoder's last hidden states. A row's mean is computed once a process, since nothing changes it."""

    means: ClassVar[dict[tuple[str, bytes], Tensor]] = {}  # folder and tokens of a row → its mean

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config, self.encoder = model.config, model.base_model.eval()
        self.classifier = nn.Linear(model.config.hidden_size, model.config.num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> Any:
        """Return an object whose ``logits`` are (B, C)."""
        lengths = attention_mask.sum(1).tolist()
        keys = [(self.config._name_or_path, ids[:length].numpy().tobytes()) for ids, length in zip(input_ids.cpu(), lengths, strict=True)]
        if any(key not in self.means for key in keys):
            with torch.inference_mode(False), torch.no_grad():  # training reads the means too
                hidden, mask = self.encoder(input_ids, attention_mask).last_hidden_state, attention_mask[..., None]
                self.means.update(zip(keys, (hidden * mask).sum(1) / mask.sum(1), strict=True))
        return SimpleNamespace(logits=self.classifier(torch.stack([self.means[key] for key in keys])))


def prefix(task: Any, config: dict[str, Any]) -> list[Callback]:
    """Prefix tuning (Li and Liang, arXiv:2101.00190): trained keys and values before the text, in every layer."""
    from peft import PrefixTuningConfig

    return _prompted(task, PrefixTuningConfig, config)


def prompt(task: Any, config: dict[str, Any]) -> list[Callback]:
    """Prompt tuning (Lester et al., arXiv:2104.08691): trained embeddings before the text."""
    from peft import PromptTuningConfig

    return _prompted(task, PromptTuningConfig, config)


def _prompted(task: Any, kind: Callable[..., Any], config: dict[str, Any]) -> list[Callback]:
    from peft import get_peft_model

    writes = isinstance(task, CausalLMTask)
    options = {"num_virtual_tokens": 20, **config.get("peft", {})}
    task.model = get_peft_model(task.model, kind(task_type="CAUSAL_LM" if writes else "SEQ_CLS", **options))
    task.model.train()
    return []


METHODS: dict[str, Callable[[Any, dict[str, Any]], list[Callback]]] = {
    "lora": lora,
    "adalora": adalora,
    "full": full,
    "galore": galore,
    "probe": probe,
    "prefix": prefix,
    "prompt": prompt,
}
PROMPTED = ("prefix", "prompt")


class PromptedLM(CausalLMTask):
    """A causal language model with trained positions before the text. PEFT adds them in ``forward``, so logits are cut from the end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, padding_free=False)
        self._needs_logits = "PEFT adds positions"

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits at the N positions that predict an answer token (N, V), and those tokens (N,), row by row."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=None).logits[:, -ids.shape[1] :]
        answers = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)  # (B, T): position t predicts token t + 1
        kept = answers != IGNORE
        return logits[kept], answers[kept]
