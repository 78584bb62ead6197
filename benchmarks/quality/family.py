"""Every variant, start, optimizer and packed base of the family on one task, at the settings of PEFT's public comparison.

PEFT's MetaMathQA comparison trains q and v of Llama-3.2-3B at rank 32 and α = 64, all members at one learning rate. Here a 135M model names
the type of answer to a question, at the same rank, α and targets, and each member's learning rate is chosen on the validation rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.quality.choice import Cell, Records, all_trials
from benchmarks.quality.trial import Trial

STEPS, BATCH, START = 100, 16, 1e-3
LORA = {"rank": 32, "alpha": 64, "target_modules": "qv"}
BF16 = {"dtype": "bfloat16"}
MLP = ["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Member:
    """One way to adapt.

    Attributes:
        name: its row.
        group: "plain", "variant", "init", "optimizer", "targets", "base" or "full".
        lora: fields of `LoRAConfig` that differ from `LORA`.
        callback: arguments of `LoRACallback`.
        task: arguments of the package's task.
        more: other parts of a trial's config.
        factor: of `START`, the middle of the first three learning rates, where the method is known to want another.
        method: name in `methods.METHODS`.
        peft: test accuracy of the same method in PEFT's comparison (``published.md``), in percent.
    """

    name: str
    group: str
    lora: dict[str, Any] = field(default_factory=dict)
    callback: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    factor: float = 1.0
    method: str = "lora"
    peft: float | None = None

    @property
    def cell(self) -> Cell:
        """What is compared."""
        parts: dict[str, Any] = {"callback": self.callback, "task": self.task, **self.more}
        if self.group != "full":
            parts["lora"] = LORA | self.lora
        config = {"member": self.name, "batch_size": BATCH} | {name: part for name, part in parts.items() if part}
        return Cell("family", "questions", "decoder", self.method, STEPS, self.factor * START, config)


def init(name: str, peft: float | None = None, **options: Any) -> Member:
    """Return plain LoRA with another start."""
    return Member(f"init {name}", "init", {"init": name, **options}, peft=peft)


def packed(how: str, **options: Any) -> Member:
    """Return plain LoRA over a base that is packed."""
    return Member(f"base {how}", "base", callback={"quantize": how}, task=BF16, **options)


MEMBERS: tuple[Member, ...] = (
    Member("LoRA", "plain", peft=47.8),
    Member("rsLoRA, r=64", "variant", {"rank": 64, "scaling": "rslora"}, factor=1 / 4, peft=51.3),
    Member("LoRA, r=64", "plain", {"rank": 64, "alpha": 128}, peft=47.4),
    Member("LoRA on the MLP, r=10", "targets", {"rank": 10, "alpha": 20, "target_modules": "mlp"}, peft=49.4),
    Member("LoRA on all linears, r=8", "targets", {"rank": 8, "alpha": 16, "target_modules": "all"}),
    Member("DoRA", "variant", {"variant": "dora"}, peft=46.9),
    Member(
        "AdaLoRA, 64 to 32",
        "variant",
        {"rank": 64, "variant": "adalora"},
        {"init_rank": 64, "target_rank": 32},
        factor=8,
        method="adalora",
        peft=37.3,
    ),
    Member("VeRA, r=256", "variant", {"rank": 256, "alpha": 16.0, "variant": "vera"}, factor=10, peft=36.8),
    Member("LoRA-FA", "variant", {"variant": "lora_fa"}),
    Member("LoRA-FA, preconditioned", "optimizer", {"variant": "lora_fa"}, {"precondition": "lora_fa"}, peft=40.4),
    Member("LoRA-XS", "variant", {"variant": "lora_xs"}),
    Member("LoRA with bias", "variant", {"variant": "lora_bias"}),
    Member("LoRA+, ratio 16", "optimizer", callback={"lora_plus_ratio": 16.0}, factor=1 / 8),
    Member("Riemannian", "optimizer", callback={"precondition": "riemannian"}, peft=46.2),
    init("gaussian"),
    init("orthogonal"),
    init("pissa"),
    init("pissa_niter_4"),
    init("olora"),
    init("mica", peft=43.1),
    init("eva"),
    init("lora_ga"),
    init("corda"),
    Member("base bf16", "base", task=BF16),
    packed("fp8"),
    packed("nf4"),
    Member("base nf4, init loftq", "base", {"init": "loftq"}, {"quantize": "nf4"}, BF16),
    packed("int8"),
    packed("torchao-int8"),
    # Its blocks of 16,384 do not fit the 576-wide projections of the attention, which stay as they are.
    Member("base torchao-nf4, MLP only", "base", task=BF16, more={"packed": {"how": "torchao-nf4", "targets": MLP}}),
    Member("GaLore", "full", more={"galore": {"rank": 64, "update_proj_gap": 50, "scale": 1.0}}, factor=1 / 10, method="galore"),
    Member("full fine-tuning", "full", factor=1 / 10, method="full", peft=47.2),
)


def trials(records: Records) -> list[Trial]:
    return all_trials([member.cell for member in MEMBERS], records)
