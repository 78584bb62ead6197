"""How a run computes the model's repeated blocks: compiled, recorded as CUDA graphs, with what they save in host memory."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_lora.callbacks.refusals import recordable
from lightning_lora.model.compile import begin_step, compile_layers, keep_gradients, uncompile_layers
from lightning_lora.model.offload import MINIMUM, Offloading, offload_activations


class BlockModes:
    """The modes of a callback's runs. Prediction takes none of them: generation would compile again for every token.

    Args:
        compiled: compile each block.
        recorded: record them as CUDA graphs too.
        offloaded: move what they save in training to host memory.
    """

    def __init__(self, *, compiled: bool, recorded: bool, offloaded: bool) -> None:
        self._settings = {"compiled": compiled, "recorded": recorded, "offloaded": offloaded}
        self._recorded = False
        self._compiled: nn.Module | None = None
        self._offloading: Offloading | None = None
        self._said = False

    def unused(self) -> BlockModes:
        """Return the same modes for other runs."""
        return BlockModes(**self._settings)

    def begin(self, target: nn.Module, trainer: Trainer) -> None:
        """Switch them on for a run.

        Raises:
            ValueError: the model has no repeated blocks, or CUDA graphs cannot be recorded under the trainer's strategy.
        """
        stage = trainer.state.fn
        if self._settings["compiled"] and stage != TrainerFn.PREDICTING:
            recorded = self._settings["recorded"] and recordable(trainer.strategy)
            compile_layers(target, cuda_graphs=recorded)
            self._compiled, self._recorded = target, recorded
        if self._settings["offloaded"] and stage == TrainerFn.FITTING:
            self._offloading, self._said = offload_activations(target), False

    def end(self) -> None:
        """Switch them off."""
        if self._compiled is not None:
            uncompile_layers(self._compiled)
        if self._offloading is not None:
            self._offloading.remove()
        self._compiled, self._offloading, self._recorded = None, None, False

    def before_batch(self) -> None:
        """Mark a batch as a step for recorded CUDA graphs."""
        if self._recorded:
            begin_step()

    def after_backward(self, module: LightningModule) -> None:
        """Copy the gradients out of memory that recorded CUDA graphs overwrite."""
        if self._recorded:
            keep_gradients(module.parameters())

    def after_batch(self) -> None:
        """Log once what a training batch moves to host memory."""
        if self._offloading is None or self._said:
            return
        self._said, moved, blocks = True, self._offloading.tensors, self._offloading.blocks
        if moved > 2 * blocks:
            rank_zero_warn(
                f"offload='activations' moved {moved} tensors of {blocks} blocks in one batch. Switch on gradient checkpointing, so that"
                " each block saves its input only."
            )
        amount = f"{self._offloading.bytes / 2**30:.2f} GiB of activations" if moved else f"no activation, as none has {MINIMUM:,} bytes,"
        rank_zero_info(f"offload: in the first batch {amount} went to host memory between the passes.")
