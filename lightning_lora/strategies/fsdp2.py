"""``strategy="lora_fsdp2"``: FSDP2 and tensor parallelism for any model, without a user's ``configure_model``.

Lightning's ``ModelParallelStrategy`` asks the user to shard the model in ``configure_model``. The model has all that is needed: FSDP2
shards its repeated blocks one by one, and Hugging Face models have a tensor-parallel plan. Sharding happens after LoRA is injected. So
adapters are sharded with their block and need no all-gather of their own. Where frozen weights are pulled, adapters are replicated.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from typing_extensions import override

from lightning_lora.experimental import check_torch
from lightning_lora.experimental.trial import reason_against
from lightning_lora.layers.replaced_rows import Rows
from lightning_lora.model.parallel import place_adapters
from lightning_lora.model.weights import materialize, on_meta
from lightning_lora.quantization.formats import format_of
from lightning_lora.strategies.lightning_private import set_data_parallel_size
from lightning_lora.strategies.namespaces import loaded, twins
from lightning_lora.utils.blocks import BLOCKS, repeated_blocks
from lightning_lora.utils.messages import counted
from lightning_lora.utils.sharding import is_sharded
from lightning_lora.utils.transformers_conventions import tensor_parallel_plan

# The styles of Hugging Face's plans that torch has too. Modules with other styles (gathered outputs, embeddings, experts) are replicated:
# the results are the same, but less memory is saved.
_STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}

if TYPE_CHECKING:
    _Base = ModelParallelStrategy
else:
    _Base = object


class OwnBlocks(_Base):
    """Implement ``lora_fsdp2`` for the ``ModelParallelStrategy`` of either package of Lightning's."""

    strategy_name = "lora_fsdp2"

    def __init__(
        self,
        *,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        reshard_after_forward: bool = True,
        pull_frozen: bool | Literal["auto"] = "auto",
    ) -> None:
        if pull_frozen not in (True, False, "auto"):
            raise ValueError(f"pull_frozen={pull_frozen!r} is not known; it is True, False or 'auto'.")
        if pull_frozen is True:
            check_torch()
        super().__init__(data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout)
        self.reshard_after_forward = reshard_after_forward
        self.pull_frozen: bool | Literal["auto"] = pull_frozen

    @override
    def setup_environment(self) -> None:
        if self.pull_frozen is True and self.num_nodes > 1:
            raise ValueError(f"pull_frozen=True reads other GPUs' memory, within one host; num_nodes is {self.num_nodes}. Leave it out.")
        set_data_parallel_size(self, self.num_nodes * self.num_processes)
        super().setup_environment()

    @override
    def setup(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        if not any(is_sharded(parameter) for parameter in module.parameters()):
            if self.device_mesh["tensor_parallel"].size() > 1:
                tensor_parallel(module, self.device_mesh["tensor_parallel"])
            # Lightning's mesh for sharding. Its size is 1 if all processes split each layer.
            how = (self.reshard_after_forward, self._pulls(module))
            shard_blocks(module, self.device_mesh["data_parallel"], *how)
            module._lora_sharded = how  # type: ignore[assignment]
        else:
            there: Any = getattr(module, "_lora_sharded", (True, False))
            how = (self.reshard_after_forward, there[1] if self.pull_frozen == "auto" else self.pull_frozen)
            if how != there:
                raise ValueError(
                    f"reshard_after_forward={how[0]}, pull_frozen={how[1]}: {type(module).__name__} is sharded already, with other options."
                    " Leave these out, or remove the sharding in configure_model, or give the Trainer a new module."
                )
        if on_meta(module):  # Lightning would drop the values of what is not on the meta device, and leave norms without any
            empty = materialize(module, self.root_device)
            if empty and not self._loads:
                rank_zero_warn(
                    f"{counted(len(empty), 'module', 'were')} on the meta device and got no values: {', '.join(empty[:4])}. Name the"
                    " model's folder in LoRACallback(weights=...), or load them in on_fit_start."
                )
        # Lightning raises unless configure_model is overridden, since its users shard there.
        module.configure_model = lambda: None  # type: ignore[method-assign]
        try:
            super().setup(trainer)
        finally:
            del module.configure_model
        if how[1] and self.device_mesh["data_parallel"].size() > 1:  # only now are the parameters those that will train
            self._begin_to_pull(module)

    @property
    def _loads(self) -> bool:
        """True if the base's weights are loaded after ``setup``."""
        hooks = getattr(self, "_lora_hooks", None)
        return hooks is not None and any(part.after_setup is not None for part in hooks.parts.values())

    def _pulls(self, module: nn.Module) -> bool:
        """Return whether frozen weights are to be pulled. Log what "auto" chose. A collective."""
        if self.pull_frozen != "auto" or self.device_mesh["data_parallel"].size() == 1:
            return self.pull_frozen is True
        reason = reason_against(module, repeated_blocks(module), self.root_device, self.num_nodes)
        if reason is not None:
            rank_zero_info(f"Frozen weights are gathered, not pulled: {reason} (pull_frozen: auto).")
        return reason is None

    def _begin_to_pull(self, module: nn.Module) -> None:
        """Average what trains. Under "auto" share the frozen weights now; if that fails, let FSDP2 gather them, and log why."""
        from lightning_lora.experimental.pull_frozen import average, share, stop

        average(module, self.device_mesh["data_parallel"].get_group())
        if self.pull_frozen is True:
            return
        try:
            share(module)
        except RuntimeError as error:
            stop(module)
            module._lora_sharded = (self.reshard_after_forward, False)  # type: ignore[assignment]
            rank_zero_info(f"Frozen weights are gathered, not pulled: {error} (pull_frozen: auto).")
        else:
            rank_zero_info("Frozen weights are pulled: read from the other GPUs' memory (pull_frozen: auto).")

    @override
    def teardown(self) -> None:
        super().teardown()  # first: it moves the module
        module: Any = self.lightning_module
        if module is not None and getattr(module, "_lora_sharded", (True, False))[1]:
            from lightning_lora.experimental.pull_frozen import release

            release(module)


class LoRAFSDP2Strategy(OwnBlocks, ModelParallelStrategy):
    """FSDP2 over a model's blocks; with ``tensor_parallel_size`` above 1 also the model's own tensor-parallel plan.

    Args:
        data_parallel_size: number of processes that split the batch; "auto": all processes divided by ``tensor_parallel_size``.
        tensor_parallel_size: number of processes that split each layer.
        save_distributed_checkpoint: write checkpoints as folders of shards instead of one portable file.
        process_group_backend: backend of the collectives; by default chosen by device.
        timeout: of collectives.
        reshard_after_forward: free a block's gathered weights after the forward pass, and gather them again for the backward pass. False
            keeps them in between: half the traffic, but at the peak the memory of a model that is not sharded.
        pull_frozen: **experimental**: it builds on private parts of FSDP2. Copy engines read frozen weights from the other GPUs' memory,
            where FSDP2 gathers them through NCCL. Adapters are replicated on every GPU (:mod:`lightning_lora.experimental.pull_frozen`).
            Faster, with the same results. For processes of one host whose GPUs can access each other's memory. "auto" pulls where that was
            tested and a trial before training succeeds (:mod:`lightning_lora.experimental.trial`); elsewhere FSDP2 gathers, and the log
            says why. True raises there. False always gathers. After writing to a frozen weight through ``.data`` between steps, call
            ``reshard()`` on the modules.

    A module on the meta device gets memory once it is sharded, on each process for its own pieces. Its weights then come from
    ``LoRACallback(weights=...)``, or from the module's own ``on_fit_start`` (:func:`~lightning_lora.load_base`).

    Raises:
        ValueError: the model has no repeated blocks; or tensor parallelism is asked for, and it has no plan; or a sharding option is
            given, and the model is sharded already; or ``pull_frozen`` is True on several hosts, or on an untested torch.

    Examples:
        >>> strategy = LoRAFSDP2Strategy(save_distributed_checkpoint=True)  # strategy="lora_fsdp2" has the defaults
        >>> trainer = L.Trainer(strategy=strategy, callbacks=[LoRACallback()])
    """


def shard_blocks(model: nn.Module, mesh: DeviceMesh, reshard_after_forward: bool = True, pull_frozen: bool = False) -> None:
    """Call ``fully_shard`` on every repeated block, then on each child of the LightningModule that has parameters, as the root unit.

    Args:
        model: a LightningModule, or another parent of the modules to shard.
        mesh: one-dimensional.
        reshard_after_forward: as in :class:`LoRAFSDP2Strategy`.
        pull_frozen: as in :class:`LoRAFSDP2Strategy`. Trainable parameters inside the blocks are then in no unit: call
            :func:`lightning_lora.experimental.pull_frozen.average` once they have storage.

    Raises:
        ValueError: there are no blocks; or ``pull_frozen`` is set, and a block has no frozen parameters, or this torch is untested.
    """
    blocks = repeated_blocks(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no repeated blocks to shard ({BLOCKS}): use ModelParallelStrategy and shard it in configure_model."
        )
    bare = next((fqn for fqn, block in blocks if all(parameter.requires_grad for parameter in block.parameters())), None)
    if pull_frozen and bare is not None:
        raise ValueError(f"pull_frozen=True, but nothing in {bare!r} is frozen: apply LoRA, which freezes the base, before sharding.")
    if pull_frozen:
        check_torch()
    pull_frozen = pull_frozen and mesh.size() > 1
    for _, block in blocks:
        trained = {parameter for parameter in block.parameters() if parameter.requires_grad and pull_frozen}
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward, ignored_params=trained)
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
            inside = [block for _, block in blocks if block in set(child.modules())]
            if pull_frozen and inside:
                # Imported lazily, so that only `pull_frozen=True` depends on private FSDP2 APIs.
                from lightning_lora.experimental.pull_frozen import pull

                pull(child, inside)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Parallelize layers by the tensor-parallel plan of the Hugging Face model inside.

    Args:
        model: a LightningModule, or another parent of the model.
        mesh: one-dimensional.

    Raises:
        ValueError: no module has a plan, a layer is quantized, or rows of an embedding train.
    """
    packed = [name for name, module in model.named_modules() if format_of(module) is not None]
    if packed:
        raise ValueError(f"tensor_parallel_size > 1: {packed[0]!r} is quantized and cannot be split by rows or columns; use 1.")
    rows = [name for name, module in model.named_modules() if isinstance(module, Rows)]
    if rows:
        raise ValueError(
            f"tensor_parallel_size > 1: {rows[0]!r} has rows that train (trainable_token_indices), which cannot be split; use 1."
        )
    planned = [module for module in model.modules() if tensor_parallel_plan(module)]
    if not planned:
        raise ValueError(f"{type(model).__name__} has no model with a tensor-parallel plan (_tp_plan); use tensor_parallel_size=1.")
    top = planned[0]
    plan = {name: _STYLES[style]() for name, style in tensor_parallel_plan(top).items() if style in _STYLES}
    parallelize_module(top, mesh, plan)
    # torch shards every parameter of a linear like its weight. An adapter sharded along r would need extra collectives.
    place_adapters(top)


def offer_to_others() -> None:
    """Let a Trainer of ``pytorch_lightning`` know ``strategy="lora_fsdp2"`` too, where that package is loaded.

    Its strategies have another base class, and a registry of their own.
    """
    name, others = LoRAFSDP2Strategy.strategy_name, twins(ModelParallelStrategy)[1:]
    for base, home in zip(others, loaded("lightning.pytorch.strategies")[1:], strict=True):
        registry: Any = home.StrategyRegistry
        if name not in registry:
            registry.register(name, type(LoRAFSDP2Strategy.__name__, (OwnBlocks, base), {"__module__": __name__}), _DESCRIPTION)


_DESCRIPTION = "FSDP2 over a model's own blocks, with their adapters"
StrategyRegistry.register(LoRAFSDP2Strategy.strategy_name, LoRAFSDP2Strategy, _DESCRIPTION)

__all__ = ["LoRAFSDP2Strategy", "offer_to_others", "shard_blocks", "tensor_parallel"]
