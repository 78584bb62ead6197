"""Every variant, start, optimizer and packed base of the family on one task, at the settings of PEFT's public comparison.

PEFT's MetaMathQA comparison trains q and v of Llama-3.2-3B at rank 32 and α = 64, all members at one learning rate. Here a sentence
encoder of 23M parameters tells the type of answer that a question asks for. Rank, α and targets are the same, a new head trains with each
member, and learning rates are chosen on the validation rows: each member's own, or that of the member which it differs from least (`like`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.quality.choice import Cell, Records, trials_of
from benchmarks.quality.trial import Trial

STEPS, BATCH, START = 200, 32, 5e-4
LORA = {"rank": 32, "alpha": 64, "target_modules": "qv"}
BF16, ALLOTTED = {"dtype": "bfloat16"}, {"init_rank": 64, "target_rank": 32}
PROJECTED = {"rank": 64, "update_proj_gap": 50, "scale": 1.0, "exclude_modules": ["classifier"]}  # of six rows, fewer than the rank


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
        like: name of the member whose chosen learning rate it takes; None for its own.
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
    like: str | None = None
    peft: float | None = None

    @property
    def cell(self) -> Cell:
        """What is compared."""
        parts: dict[str, Any] = {"callback": self.callback, "task": self.task, **self.more}
        if self.group != "full":
            parts["lora"] = LORA | self.lora
        config = {"member": self.name, "batch_size": BATCH} | {name: part for name, part in parts.items() if part}
        return Cell("family", "questions", "encoder", self.method, STEPS, self.factor * START, config)


def init(name: str, like: str | None = None, peft: float | None = None) -> Member:
    """Return plain LoRA with another start."""
    return Member(f"init {name}", "init", {"init": name}, like=like, peft=peft)


def packed(how: str) -> Member:
    """Return plain LoRA over a base that is packed."""
    return Member(f"base {how}", "base", callback={"quantize": how}, task=BF16, like="LoRA")


MEMBERS: tuple[Member, ...] = (
    Member("LoRA", "plain", peft=47.8),
    Member("full fine-tuning", "full", factor=1 / 2, method="full", peft=47.2),
    Member("base bf16", "base", task=BF16, like="LoRA"),
    packed("fp8"),
    Member("rsLoRA, r=64", "variant", {"rank": 64, "scaling": "rslora"}, factor=1 / 4, peft=51.3),
    Member("LoRA, r=64", "plain", {"rank": 64, "alpha": 128}, factor=1 / 2, peft=47.4),
    Member("LoRA on the MLP, r=10", "targets", {"rank": 10, "alpha": 20, "target_modules": "mlp"}, factor=3, peft=49.4),
    Member("LoRA on all linears, r=8", "targets", {"rank": 8, "alpha": 16, "target_modules": "all"}, factor=4),
    Member("DoRA", "variant", {"variant": "dora"}, peft=46.9),
    Member("AdaLoRA, 64 to 32", "variant", {"rank": 64, "variant": "adalora"}, ALLOTTED, factor=8, method="adalora", peft=37.3),
    Member("VeRA, r=256", "variant", {"rank": 256, "alpha": 16.0, "variant": "vera"}, factor=40, peft=36.8),
    Member("LoRA-FA", "variant", {"variant": "lora_fa"}),
    Member("LoRA-FA, preconditioned", "optimizer", {"variant": "lora_fa"}, {"precondition": "lora_fa"}, peft=40.4),
    Member("LoRA-XS", "variant", {"variant": "lora_xs"}),
    Member("LoRA with bias", "variant", {"variant": "lora_bias"}, like="LoRA"),
    Member("LoRA+, ratio 16", "optimizer", callback={"lora_plus_ratio": 16.0}, factor=1 / 8),
    Member("Riemannian", "optimizer", callback={"precondition": "riemannian"}, peft=46.2),
    packed("nf4"),
    Member("base nf4, init loftq", "base", {"init": "loftq"}, {"quantize": "nf4"}, BF16, like="LoRA"),
    packed("int8"),
    packed("torchao-nf4"),
    packed("torchao-int8"),
    init("pissa"),
    init("olora"),
    init("eva", "LoRA"),
    init("lora_ga"),
    init("corda"),
    init("mica", peft=43.1),
    init("gaussian", "LoRA"),
    init("orthogonal", "LoRA"),
    init("pissa_niter_4", "init pissa"),
    Member("GaLore", "full", more={"galore": PROJECTED}, factor=1 / 2, method="galore"),
)


def trials(records: Records) -> list[Trial]:
    """Return the trials that can be named so far, those of the first members first."""
    by_name = {member.name: member for member in MEMBERS}
    named = []
    for member in MEMBERS:
        found = trials_of(by_name[member.like or member.name].cell, records)
        reported = [trial for trial in found if trial.split == "test"]
        named += [member.cell.trial(seed=trial.seed, lr=trial.lr) for trial in reported] if member.like else found
    return named
