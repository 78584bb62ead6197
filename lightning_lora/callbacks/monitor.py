"""``LoRAMonitor``: what the adapters do while they train, with ``Trainer(callbacks=[LoRACallback(config), LoRAMonitor()])``.

Every ``every_n_steps`` optimizer steps it reads A, B and their gradients, when these are complete, averaged over processes and not yet
clipped. The frozen base is read twice: at the start for ``‖W‖``, and at both ends for a checksum of each frozen parameter.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_lora.callbacks.monitor_hints import Findings, LayerRow, hints
from lightning_lora.callbacks.monitor_history import QUANTITIES, History
from lightning_lora.callbacks.monitor_ranks import RankChange
from lightning_lora.callbacks.monitor_report import RANKS, write_report
from lightning_lora.layers.base import PREFIX, LoRALayer, lora_layers
from lightning_lora.model.layer_statistics import gradient_norms, low_rank_layers, owners_of, spectra, weight_norms
from lightning_lora.model.rank_advice import advise_ranks, patterns
from lightning_lora.ops.low_rank_svd import check_energy
from lightning_lora.quantization.formats import format_of
from lightning_lora.storage.room import check_room
from lightning_lora.strategies.changed_bits import changed_since, digests
from lightning_lora.strategies.lightning_private import logged_step
from lightning_lora.strategies.namespaces import twins
from lightning_lora.utils.names import clean_name, parameters_by_name
from lightning_lora.utils.sharding import is_first_rank, is_flattened, is_sharded, on_first_rank, reshard
from lightning_lora.utils.torch_private import unscales_itself


class LoRAMonitor(Callback):
    """Measures each adapted layer while it trains, logs the numbers, and writes a report when training ends.

    Per layer: ``‖ΔW‖/‖W‖``, stable and effective rank of ΔW, norms of the gradients of A and B. ΔW is ``scaling · B·A``, minus the start
    for inits that keep one; it is never built. Layers without A and B (trained token rows) are not measured. Nor is FSDP1, which flattens A
    and B: there the callback warns and does nothing. ``‖W‖`` of a quantized weight that is sharded cannot be read, so the ratio is missing.

    Every logger of the trainer gets ``lora/update_ratio``, ``lora/effective_rank`` …: the median over the layers; and with ``log_layers``
    ``lora/update_ratio/<layer>`` … The report is three files in ``lora_monitor`` in the run's folder: ``report.html`` (heat maps,
    spectra, hints), ``layers.csv``, and ``ranks.yaml``, a ``rank_pattern``. A resumed run continues the measurements.

    With ``apply_ranks_at`` the layers get the suggested ranks once, in the middle of the run: those that need less shrink, those that use
    all of their rank grow, the optimizer's state stays (:func:`~lightning_lora.resize_ranks`). Checkpoints hold the new ranks, and the same
    config resumes them, and those from before. It works in one process and under DDP.

    Args:
        every_n_steps: optimizer steps from one measurement to the next.
        log_layers: log each layer's numbers too, not only medians.
        energy: share of ``‖ΔW‖²`` that a suggested rank keeps, in (0, 1].
        dirpath: where the report's folder goes. Default: the logger's folder, or ``default_root_dir``.
        report: write the report.
        apply_ranks_at: number of optimizer steps after which the suggested ranks are applied. Default: never.
        rank_budget: how many parameters A and B may have then, as a share of what they have.

    Attributes:
        history: all measurements; set when training starts.
        rank_change: at which step ranks were applied, and which.
        findings: what the report is made of; set on the first process when training ends.

    Raises:
        ValueError: an argument is out of range; or, when training starts, the module has no adapter, or ranks are to be applied to layers
            that cannot take others (as :func:`~lightning_lora.resize_ranks`; sharded ones too). Nothing has trained then.

    Examples:
        >>> monitor = LoRAMonitor(every_n_steps=2)
        >>> trainer = L.Trainer(max_epochs=1, callbacks=[LoRACallback(), monitor])
        >>> trainer.fit(MyModule())
        >>> len(monitor.history.steps) > 1
        True
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 100,
        log_layers: bool = True,
        energy: float = 0.99,
        dirpath: str | Path | None = None,
        report: bool = True,
        apply_ranks_at: int | None = None,
        rank_budget: float = 1.0,
    ) -> None:
        if type(every_n_steps) is not int or every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps!r}: give a whole number ≥ 1, such as 100.")
        check_energy(energy)
        self.every_n_steps, self.log_layers, self.energy, self.report = every_n_steps, log_layers, energy, report
        self.dirpath = None if dirpath is None else str(dirpath)
        self.apply_ranks_at, self.rank_budget = apply_ranks_at, rank_budget
        self.rank_change = RankChange(apply_ranks_at, energy, rank_budget)
        self.history: History | None = None
        self.findings: Findings | None = None
        self._active = self._joins = False  # measures at all; on this process
        self._weights: dict[str, float] = {}
        self._start: dict[str, tuple[str, torch.dtype]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise ValueError if the report's folder cannot be written to."""
        if stage == "fit" and self._reports(trainer) and "://" not in (folder := self.dirpath or _run_folder(trainer)):
            on_first_rank(lambda: check_room(folder, 0, "LoRAMonitor's dirpath", "the report takes"))

    def _reports(self, trainer: Trainer) -> bool:
        return self.report and not trainer.fast_dev_run  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read ‖W‖ and the checksums."""
        self._active = not is_flattened(trainer.strategy.model or pl_module)
        if not self._active and self.apply_ranks_at is not None:
            raise ValueError(f"apply_ranks_at={self.apply_ranks_at}: FSDP1 has flattened A and B: use one process or strategy='ddp'.")
        if not self._active:
            rank_zero_warn("LoRAMonitor measures nothing under FSDP1, which flattens A and B: use strategy='lora_fsdp2'.")
            return
        layers = low_rank_layers(pl_module)
        if not any(True for _ in lora_layers(pl_module)):
            raise ValueError(f"LoRAMonitor found no adapted layer in {type(pl_module).__name__}: add LoRACallback(config) before it.")
        self.rank_change.begin(trainer, pl_module)
        reshard(pl_module)
        self._joins = is_first_rank() or any(is_sharded(p) for p in pl_module.parameters())
        if self.history is not None and self.history.names != list(layers):
            rank_zero_warn("LoRAMonitor drops its earlier measurements: they are of other layers.")
            self.history = None
        self.history = self.history or History(list(layers))
        self.history.forget_after(trainer.global_step)
        if self._joins:
            self._weights, self._start = weight_norms(layers), digests(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure if it is time, and the optimizer holds an adapter."""
        if not self._active or self.history is None or not self._joins:
            return
        last = self.history.steps[-1] if self.history.steps else -self.every_n_steps
        if trainer.global_step < (last // self.every_n_steps + 1) * self.every_n_steps:
            return
        layers = low_rank_layers(pl_module)
        mine = {id(p) for layer in layers.values() for p in layer.lora_parameters().values()}
        if mine.isdisjoint(id(p) for group in optimizer.param_groups for p in group["params"]):
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scaled = scaler is not None and unscales_itself(optimizer)
        self._measure(trainer, layers, 1 / scaler.get_scale() if scaled else 1.0)  # type: ignore[union-attr]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Apply the suggested ranks if it is time."""
        if self._active:
            self.rank_change.after_batch(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the losses that were logged."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if self.history is not None and self._active and self._joins and fitting:
            logged = {name: float(v) for name, v in trainer.callback_metrics.items() if "loss" in name and v.numel() == 1}
            if logged:
                self.history.losses.append((trainer.global_step, logged))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure once more, and write the report."""
        if not self._active or self.history is None:
            return
        self.rank_change.finish(trainer)
        folder = Path(self.dirpath or _run_folder(trainer))
        if self._joins:
            reshard(pl_module)
            layers = low_rank_layers(pl_module)
            values = self._measure(trainer, layers, None)
            changed = changed_since(self._start, pl_module)
            if is_first_rank():
                self.findings = self._found(trainer, pl_module, layers, values, changed)
        if self._reports(trainer):
            on_first_rank(lambda: self._write(folder / "lora_monitor"))

    def state_dict(self) -> dict[str, Any]:
        """Return the measurements for a checkpoint."""
        return {} if self.history is None else {**self.history.state_dict(), "rank_change": self.rank_change.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the measurements of the run that is resumed."""
        if state_dict:
            self.history = History.from_state(state_dict)
            self.rank_change.load_state_dict(state_dict.get("rank_change", RankChange.NONE))

    def _measure(self, trainer: Trainer, layers: dict[str, LoRALayer], factor: float | None) -> dict[str, Tensor]:
        """Add a measurement and log it. Return each layer's spectrum.

        Args:
            trainer: the trainer.
            layers: name → layer.
            factor: what gradients are multiplied by; None after the last step, when there are none.
        """
        assert self.history is not None
        updates = spectra(layers)
        norms = gradient_norms(layers, factor) if factor is not None else {}
        none = (math.nan, math.nan, math.nan)
        rows = [
            (u.norm / w if (w := self._weights[name]) > 0 else math.nan, u.norm, u.stable_rank, u.effective_rank, *norms.get(name, none))
            for name, u in updates.items()
        ]
        self.history.add(trainer.global_step, rows)
        if is_first_rank() and layers:
            self._log(trainer)
        return {name: update.values for name, update in updates.items()}

    def _log(self, trainer: Trainer) -> None:
        assert self.history is not None
        row = self.history.rows[-1]
        logged: dict[str, float] = {}
        for number, quantity in enumerate(QUANTITIES):
            column = row[:, number]
            if column.isnan().all():
                continue
            logged[f"lora/{quantity}"] = float(column.nanmedian())
            if self.log_layers:
                named = zip(self.history.names, column.tolist(), strict=True)
                logged |= {f"lora/{quantity}/{name}": value for name, value in named if not math.isnan(value)}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=logged_step(trainer))

    def _found(
        self, trainer: Trainer, pl_module: LightningModule, layers: dict[str, LoRALayer], values: dict[str, Tensor], changed: set[str]
    ) -> Findings:
        assert self.history is not None
        advised = advise_ranks(pl_module, values, self.energy)
        names = {id(p): clean_name(name) for name, p in pl_module.named_parameters()}
        owners = owners_of(pl_module)
        rows = []
        for (name, layer), row in zip(layers.items(), self.history.rows[-1].tolist(), strict=True):
            ratio, norm, stable, effective, *_ = row
            moved = tuple(short for short, p in layer.lora_parameters().items() if names[id(p)] in changed)
            dtype = None if format_of(layer) is not None else layer.weight.dtype
            suggested, change = advised.get(owners[name]), self.rank_change.ranks.get(owners[name])
            weight = self._weights[name]
            spectrum = tuple(values[name].tolist())
            measured = (weight, norm, ratio, stable, effective, spectrum)
            rows.append(LayerRow(name, layer.rank, layer.scaling, dtype, *measured, suggested, moved, change and change[0]))
        trains = {name: p.requires_grad for name, p in parameters_by_name(pl_module).items()}
        adapters = {name for name in trains if name.rpartition(".")[2].startswith(PREFIX)}
        return Findings(
            rows,
            self.history,
            changed_base=sorted(name for name in changed if not trains[name] and name not in adapters),
            others=sorted(name for name, train in trains.items() if train and name not in adapters),
            unmeasured=[clean_name(name) for name, layer in lora_layers(pl_module) if not layer.low_rank],
            patterns=patterns(pl_module, advised),
            strategy=type(trainer.strategy).__name__,
            processes=trainer.world_size,
            steps=trainer.global_step,
            applied_at=self.rank_change.step,
        )

    def _write(self, folder: Path) -> None:
        assert self.findings is not None
        path = write_report(folder, self.findings, self.energy)
        seen = [f"- {hint.title}: {hint.text}" for hint in hints(self.findings) if hint.look]
        ranks = [(row.suggested, row.rank) for row in self.findings.rows if row.suggested is not None]
        less, more = sum(new < now for new, now in ranks), sum(new > now for new, now in ranks)
        rank_zero_info(
            "\n".join([f"LoRAMonitor: {path}", *seen, f"Suggested ranks, {less} lower and {more} higher: {path.parent / RANKS}"])
        )


def _run_folder(trainer: Trainer) -> str:
    """Return the folder of a run, as Lightning's checkpoints have it. Every process has to ask, because Lightning broadcasts it."""
    folder = trainer.log_dir or trainer.default_root_dir
    if not trainer.loggers or isinstance(trainer.loggers[0], twins(TensorBoardLogger, CSVLogger)):  # whose folder is one run's
        return folder
    name, version = trainer.loggers[0].name, trainer.loggers[0].version
    return os.path.join(folder, str(name or ""), version if isinstance(version, str) else f"version_{version}")
