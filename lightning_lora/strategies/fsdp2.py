"""``strategy="lora_fsdp2"``: FSDP2 and tensor parallelism for any model, without a ``configure_model`` of the user's.

Lightning's ``ModelParallelStrategy`` asks the user to shard the model by hand. The model says enough itself: its repeated blocks
are what FSDP2 shards one by one, and Hugging Face models carry a plan for tensor parallelism. Sharding happens after LoRA is
injected, so that adapters are sharded with their block and cost no all-gather, or with ``pull_frozen`` stay whole.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from typing_extensions import override

from lightning_lora.experimental import check_torch
from lightning_lora.model.parallel import place_adapters
from lightning_lora.quantization.formats import format_of
from lightning_lora.strategies.lightning_private import set_data_parallel_size
from lightning_lora.utils.blocks import BLOCKS, repeated_blocks
from lightning_lora.utils.sharding import is_sharded
from lightning_lora.utils.transformers_conventions import tensor_parallel_plan

# The styles of Hugging Face's plans that torch has as they are. Others (gathered outputs, embeddings, experts) leave the module whole,
# which is right, if less memory is saved.
_STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


class LoRAFSDP2Strategy(ModelParallelStrategy):
    """FSDP2 over a model's blocks; with ``tensor_parallel_size`` above 1 also its own tensor-parallel plan.

    Args:
        data_parallel_size: processes that share the batch; "auto": all that ``tensor_parallel_size`` leaves.
        tensor_parallel_size: processes that share each layer.
        save_distributed_checkpoint: checkpoints as folders of shards instead of one portable file.
        process_group_backend: default by device.
        timeout: of collectives.
        reshard_after_forward: drop a block's gathered weights after the forward pass, and gather them again for the backward pass. False
            keeps them in between: half the traffic, and at the peak the memory of a model that is not sharded.
        pull_frozen: **experimental**: it builds on private parts of FSDP2, and is refused on a torch that it was not tested with. Read
            frozen weights from the other GPUs' memory, by the copy engines, where FSDP2 gathers them through NCCL, and keep adapters whole
            on every GPU (:mod:`lightning_lora.experimental.pull_frozen`): faster, the same results. For processes of one host whose GPUs
            reach each other's memory. Who writes to a frozen weight through ``.data`` between steps has to call ``reshard()`` on the
            modules.

    Raises:
        ValueError: the model has no repeated blocks, or tensor parallelism is asked for and it has no plan; an option about sharding
            is given and the model is sharded already, or ``pull_frozen`` on several hosts or another torch.
    """

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
        pull_frozen: bool = False,
    ) -> None:
        if pull_frozen:
            check_torch()
        super().__init__(data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout)
        self.reshard_after_forward, self.pull_frozen = reshard_after_forward, pull_frozen

    @override
    def setup_environment(self) -> None:
        if self.pull_frozen and self.num_nodes > 1:
            raise ValueError(f"pull_frozen=True reads other GPUs' memory, within one host; num_nodes is {self.num_nodes}. Leave it out.")
        set_data_parallel_size(self, self.num_nodes * self.num_processes)
        super().setup_environment()

    @override
    def setup(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        how = (self.reshard_after_forward, self.pull_frozen)
        if not any(is_sharded(parameter) for parameter in module.parameters()):
            if self.device_mesh["tensor_parallel"].size() > 1:
                tensor_parallel(module, self.device_mesh["tensor_parallel"])
            # The mesh over which LightningModules shard; of size 1 where all processes share each layer.
            shard_blocks(module, self.device_mesh["data_parallel"], *how)
            module._lora_sharded = how  # type: ignore[assignment]
        elif how != getattr(module, "_lora_sharded", (True, False)):
            raise ValueError(
                f"reshard_after_forward={how[0]}, pull_frozen={how[1]}: {type(module).__name__} is sharded already, in another way. Leave"
                " them out, or leave out the sharding in configure_model, or give the Trainer a new module."
            )
        # Lightning wants configure_model overridden here, since that is where others shard.
        module.configure_model = lambda: None  # type: ignore[method-assign]
        try:
            super().setup(trainer)
        finally:
            del module.configure_model
        if self.pull_frozen and self.device_mesh["data_parallel"].size() > 1:  # now that parameters are those that will train
            from lightning_lora.experimental.pull_frozen import average

            average(module, self.device_mesh["data_parallel"].get_group())

    @override
    def teardown(self) -> None:
        super().teardown()  # moves the module
        if self.pull_frozen and self.lightning_module is not None:
            from lightning_lora.experimental.pull_frozen import release

            release(self.lightning_module)


def shard_blocks(model: nn.Module, mesh: DeviceMesh, reshard_after_forward: bool = True, pull_frozen: bool = False) -> None:
    """``fully_shard`` every repeated block, then each child of the LightningModule that has parameters, as its root.

    Args:
        model: a LightningModule, or another parent of what is to be sharded.
        mesh: of one dimension.
        reshard_after_forward, pull_frozen: as :class:`LoRAFSDP2Strategy` has them. What trains inside the blocks is then in no unit:
            :func:`lightning_lora.experimental.pull_frozen.average` has to be called once it has storage.

    Raises:
        ValueError: there are no blocks, or one of them has nothing frozen to pull, or ``pull_frozen`` is not known to work on this torch.
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
                # Who does not ask for it does not depend on FSDP2's insides.
                from lightning_lora.experimental.pull_frozen import pull

                pull(child, inside)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split layers as the plan of the Hugging Face models inside says.

    Raises:
        ValueError: none of them has a plan, or a layer is quantized.
    """
    packed = [name for name, module in model.named_modules() if format_of(module) is not None]
    if packed:
        raise ValueError(f"tensor_parallel_size > 1: {packed[0]!r} is quantized and cannot be split by rows or columns; use 1.")
    planned = [module for module in model.modules() if tensor_parallel_plan(module)]
    if not planned:
        raise ValueError(f"{type(model).__name__} has no model with a tensor-parallel plan (_tp_plan); use tensor_parallel_size=1.")
    top = planned[0]
    plan = {name: _STYLES[style]() for name, style in tensor_parallel_plan(top).items() if style in _STYLES}
    parallelize_module(top, mesh, plan)
    # torch cuts every parameter of a linear as it cuts the weight; an adapter cut along r would send its products around.
    place_adapters(top)


StrategyRegistry.register(
    LoRAFSDP2Strategy.strategy_name, LoRAFSDP2Strategy, description="FSDP2 over a model's own blocks, adapters and all"
)

__all__ = ["LoRAFSDP2Strategy", "shard_blocks", "tensor_parallel"]
