"""Direct preference optimization (Rafailov et al., arXiv:2305.18290): learn from pairs of answers which one to prefer.

With the policy π, the reference π_ref and a pair of a better and a worse answer y_w, y_l to the prompt x, equation 7 is

    loss = -log σ(β·Δ),  Δ = log π(y_w|x)/π_ref(y_w|x) - log π(y_l|x)/π_ref(y_l|x)

The reference is the same model with its adapters off, so no second copy of the base is in memory. Both answers run as one batch. The
reference's forward pass keeps nothing for a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeFloat, PositiveFloat
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from typing_extensions import override

from lightning_lora.layers import lora_layers
from lightning_lora.model.disable import disabled_lora
from lightning_lora.model.merge import unmerge_lora
from lightning_lora.model.modes import evaluating
from lightning_lora.ops.cross_entropy import IGNORE
from lightning_lora.tasks.causal_lm import CausalLMTask, positions_of


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss of Δ (B,), β and the label smoothing ε.

    Attributes:
        value: Returns each pair's loss (B,).
        smooths: Whether it takes ε: the share of pairs whose order is taken to be wrong.
        per_token: Whether log-probabilities are means over an answer's tokens, not sums.
    """

    value: Callable[[Tensor, float, float], Tensor]
    smooths: bool = False
    per_token: bool = False


def sigmoid(delta: Tensor, beta: float, smoothing: float) -> Tensor:
    """Return equation 7's loss; with ε its expectation over orders that are wrong at that rate ("conservative" DPO)."""
    return -F.logsigmoid(beta * delta) * (1 - smoothing) - F.logsigmoid(-beta * delta) * smoothing


def robust(delta: Tensor, beta: float, smoothing: float) -> Tensor:
    """Return the loss without the bias of wrong orders (Chowdhury et al., arXiv:2403.00409, equation 13)."""
    return (F.logsigmoid(-beta * delta) * smoothing - F.logsigmoid(beta * delta) * (1 - smoothing)) / (1 - 2 * smoothing)


def hinge(delta: Tensor, beta: float, smoothing: float) -> Tensor:
    """Return the hinge loss of SLiC (Zhao et al., arXiv:2305.10425) on β·Δ."""
    return torch.relu(1 - beta * delta)


def ipo(delta: Tensor, beta: float, smoothing: float) -> Tensor:
    """Return the squared distance to the margin 1/(2β) (Azar et al., arXiv:2310.12036, equation 17)."""
    return (delta - 1 / (2 * beta)) ** 2


DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
SAME = 1e-2  # of which GPU kernels that add in any order stay below, and dropout does not
LOSSES = {  # under TRL's names
    "sigmoid": PreferenceLoss(sigmoid, smooths=True),
    "hinge": PreferenceLoss(hinge),
    "ipo": PreferenceLoss(ipo, per_token=True),
    "robust": PreferenceLoss(robust, smooths=True),
}


class DPOTask(CausalLMTask):
    """A Hugging Face causal language model, trained to prefer the better of two answers.

    Log for training, validation and test the ``_loss``, the ``_accuracy`` (how often the better answer has the higher reward), the
    ``_margin`` between the two rewards, and the ``_chosen_reward`` and ``_rejected_reward``: β times the log-ratio to the reference, in
    nats. Prediction answers the prompts.

    It needs adapters and nothing else that trains, because the reference is the model without them.

    Args:
        model: A hub id or a local folder.
        beta: β: how strongly the policy is held to the reference.
        loss_type: The loss, under TRL's name.
        label_smoothing: Share of the pairs whose order is taken to be wrong, below 0.5; for "sigmoid" and "robust".
        learning_rate: AdamW's learning rate after the warm-up; "auto" as for `HFTask`, a fortieth of what answers take.
        **shared: See `CausalLMTask`.

    Raises:
        ValueError: ``label_smoothing`` is too large, or the loss has none.

    Examples:
        >>> task = DPOTask("models/llama", beta=0.1)
        >>> trainer = L.Trainer(max_epochs=1, callbacks=[LoRACallback(LoRAConfig(target_modules="all-linear"))])
        >>> trainer.fit(task, PreferenceDataModule("rows/pairs.jsonl", batch_size=2))
        >>> 0 <= float(trainer.callback_metrics["train_accuracy"]) <= 1
        True
    """

    data_class = "lightning_lora.data.PreferenceDataModule"
    losses_by_owner = None  # type: ignore[assignment]  # the reference would be computed per trial: trials run one after another
    rate_share = (1 / 40, "TRL's DPO takes 5e-6 under LoRA where its SFT takes 2e-4")

    def __init__(
        self,
        model: str,
        beta: PositiveFloat = 0.1,
        loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid",
        label_smoothing: NonNegativeFloat = 0.0,
        learning_rate: PositiveFloat | Literal["auto"] = 5e-6,
        **shared: Any,
    ) -> None:
        if loss_type not in LOSSES:
            raise ValueError(f"loss_type={loss_type!r} is not known; it is one of {', '.join(LOSSES)}")
        if label_smoothing and (label_smoothing >= 0.5 or not LOSSES[loss_type].smooths):
            smooth = [name for name, loss in LOSSES.items() if loss.smooths]
            raise ValueError(f"label_smoothing={label_smoothing}: give less than 0.5, and only for loss_type {' or '.join(smooth)}")
        super().__init__(model, learning_rate=learning_rate, **shared)
        for module in self.model.modules():
            if isinstance(module, DROPOUTS):
                module.p = 0.0
            for name in _rates(module):  # which a module gives to a function, such as `attention_dropout`
                setattr(module, name, 0.0)
        configs = _configs(self.model.config)
        self._config_rates = [(config, name, value) for config in configs for name, value in _rates(config).items()]
        self._exact = False  # the base was seen to draw nothing at random
        self._draw_nothing(True)

    def _draw_nothing(self, on: bool) -> None:
        """Set the rates in the model's configuration, which some forwards read, to zero, or back to what they were."""
        for config, name, value in self._config_rates:
            setattr(config, name, 0.0 if on else value)

    @override
    def teardown(self, stage: str) -> None:
        self._draw_nothing(False)  # the configuration is saved with the model

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._draw_nothing(True)
        if stage == "predict":
            return
        if next(lora_layers(self.model), None) is None:
            raise ValueError(
                "DPOTask has no reference: it is the model with its adapters off, and this one has none; add a LoRACallback, and leave "
                "full_finetuning out"
            )
        if any(layer.merged for _, layer in lora_layers(self.model)):
            rank_zero_info("The model is unmerged, because the reference is the model without its adapters.")
            unmerge_lora(self.model)
        with disabled_lora(self.model):  # refuses a model whose base is not there any more
            pass

    def rewards(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return each pair's loss (B,), and the rewards (2, B) of its better and its worse answer."""
        loss = LOSSES[self.hparams["loss_type"]]
        self.settle(batch)
        if self.training and not self._exact:
            self._check_exact(batch)
        with torch.no_grad(), disabled_lora(self.model), evaluating(self.model):
            reference = self._log_probs(batch, loss.per_token)
        ratios = (self._log_probs(batch, loss.per_token) - reference).view(2, -1)
        beta = self.hparams["beta"]
        return loss.value(ratios[0] - ratios[1], beta, self.hparams["label_smoothing"]), beta * ratios.detach()

    def _check_exact(self, batch: dict[str, Tensor]) -> None:
        """Refuse a base that computes something else each time, as it would with dropout that no field sets.

        Raises:
            ValueError: It does. The message names the model.
        """
        counted = self._flops
        with torch.no_grad(), disabled_lora(self.model):
            first, second = (self._log_probs(batch, per_token=True) for _ in range(2))
        self._flops = counted  # of the step alone
        if not torch.allclose(first, second, rtol=SAME, atol=SAME):
            raise ValueError(
                f"{type(self.model).__name__} draws at random in training, even with its dropout at 0 (log-probabilities per token differ"
                f" by {(first - second).abs().max():.2g}), so DPO's policy and reference would differ by chance; take the noise out of its"
                " forward"
            )
        self._exact = True

    def _log_probs(self, batch: dict[str, Tensor], per_token: bool) -> Tensor:
        """Return the log-probability of each row's answer (2B,)."""
        tokens = -self.answer_loss(batch, reduction="none")  # (N,), row by row
        labels = batch["labels"]
        rows = tokens.new_zeros(len(labels)).index_add(0, positions_of(batch) // labels.shape[1], tokens)
        return rows / (labels[:, 1:] != IGNORE).sum(dim=1) if per_token else rows

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        losses, rewards = self.rewards(batch)
        loss, rows = losses.mean(), len(losses)
        self.log("train_loss", loss, prog_bar=True, batch_size=rows)
        self.log_dict({f"train_{name}": value.mean() for name, value in _seen(rewards).items()}, batch_size=rows)
        return loss

    @override
    def make_metrics(self) -> dict[str, Metric]:
        return {name: MeanMetric() for name in ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")}

    @override
    def evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        losses, rewards = self.rewards(batch)
        for name, values in {"loss": losses, **_seen(rewards)}.items():
            self.measure(stage, name, values, rows=len(losses))


def _configs(config: Any) -> list[Any]:
    """Return a model's configuration and those inside it."""
    found = [config]
    for each in found:  # the loop appends to it
        found += [value for value in vars(each).values() if hasattr(value, "to_dict") and value not in found]
    return found


def _rates(thing: Any) -> dict[str, float]:
    """Return the attributes of a module or configuration that say how much it draws at random in training: dropout and routers' jitter."""
    return {name: value for name, value in vars(thing).items() if ("drop" in name or "jitter" in name) and isinstance(value, float)}


def _seen(rewards: Tensor) -> dict[str, Tensor]:
    """Return what is logged of the rewards (2, B), pair by pair."""
    chosen, rejected = rewards
    return {
        "accuracy": (chosen > rejected).to(chosen.dtype),
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }
