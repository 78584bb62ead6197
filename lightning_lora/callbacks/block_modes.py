"""How a run computes the model's repeated blocks: compiled, recorded as CUDA graphs, checkpointed, with what waits in host memory."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_lora.callbacks.refusals import check_one_device, recordable
from lightning_lora.model.checkpointing import Checkpointing, Keep, checkpoint_layers
from lightning_lora.model.compile import begin_step, compile_layers, keep_gradients, uncompile_layers
from lightning_lora.model.offload import MINIMUM, Offloading, offload_activations
from lightning_lora.model.offload_frozen import FrozenOffloading, offload_frozen
from lightning_lora.utils.messages import counted

KEPT: dict[str, Keep] = {"full": "inputs", "selective": "attention"}  # by each kind of checkpointing


class BlockModes:
    """The modes of a callback's runs. Prediction takes none of them: generation would compile again for every token.

    Args:
        compiled: compile each block.
        recorded: record them as CUDA graphs too.
        checkpointing: which checkpoints they run in while training.
        offloaded: what waits in host memory: "activations", what they save in training; "frozen", their frozen weights.
    """

    def __init__(
        self,
        *,
        compiled: bool,
        recorded: bool,
        checkpointing: Literal["full", "selective"] | None,
        offloaded: Collection[str],
    ) -> None:
        self.compiled, self.recorded, self.checkpointing, self.offloaded = compiled, recorded, checkpointing, offloaded
        self._recorded = False
        self._compiled: nn.Module | None = None
        self._offloading: Offloading | None = None
        self._checkpointing: Checkpointing | None = None
        self._frozen: FrozenOffloading | None = None
        self._said = False

    def unused(self) -> BlockModes:
        """Return the same modes for other runs."""
        return BlockModes(compiled=self.compiled, recorded=self.recorded, checkpointing=self.checkpointing, offloaded=self.offloaded)

    def begin(self, target: nn.Module, trainer: Trainer) -> None:
        """Switch on for a run what the model need not be adapted for.

        Raises:
            ValueError: the model has no repeated blocks; or CUDA graphs cannot be recorded, or weights offloaded, under the strategy.
        """
        stage = trainer.state.fn
        if "frozen" in self.offloaded:
            check_one_device(trainer.strategy)
        if self.compiled and stage != TrainerFn.PREDICTING:
            recorded = self.recorded and recordable(trainer.strategy)
            compile_layers(target, cuda_graphs=recorded)
            self._compiled, self._recorded = target, recorded
        if "activations" in self.offloaded and stage == TrainerFn.FITTING:
            self._offloading, self._said = offload_activations(target), False

    def begin_adapted(self, target: nn.Module, trainer: Trainer) -> None:
        """Switch on the rest, once the model is adapted: only then is known what is frozen, and the blocks' classes are their last.

        Raises:
            ValueError: the blocks are checkpointed already; or a weight cannot be offloaded.
        """
        if self.checkpointing is not None and trainer.state.fn == TrainerFn.FITTING:
            self._checkpointing = checkpoint_layers(target, keep=KEPT[self.checkpointing])
        if "frozen" in self.offloaded:
            self._frozen = offload_frozen(target, trainer.strategy.root_device)
            rank_zero_info(f"offload: {self._frozen.bytes / 2**30:.2f} GiB of frozen weights wait in host memory.")

    def before_merge(self) -> None:
        """Move offloaded weights to host memory, where the merge changes them."""
        if self._frozen is not None:
            self._frozen.rest()

    def end(self) -> None:
        """Switch them off. Offloaded weights stay in host memory."""
        if self._compiled is not None:
            uncompile_layers(self._compiled)
        for handle in (self._offloading, self._checkpointing, self._frozen):
            if handle is not None:
                handle.remove()
        self._compiled, self._recorded = None, False
        self._offloading = self._checkpointing = self._frozen = None

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
        if moved > 4 * blocks:  # a compiled block that is checkpointed selectively saves three
            rank_zero_warn(
                f"offload='activations' moved {counted(moved, 'tensor')} of {counted(blocks, 'block')} in one batch. Switch on gradient"
                " checkpointing (LoRACallback(checkpointing='selective')), so that each block saves its input only, or little more."
            )
        amount = f"{self._offloading.bytes / 2**30:.2f} GiB of activations" if moved else f"no activation, as none has {MINIMUM:,} bytes,"
        rank_zero_info(f"offload: in the first batch {amount} went to host memory between the passes.")
