"""One Lightning run under a named strategy, and what it left: the piece that the strategy tests and ``make matrix`` share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.strategies.fsdp import _setup_activation_checkpointing
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, Dataset

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.callbacks import block_modes
from lightning_lora.layers import lora_layers
from lightning_lora.model.compile import compile_layers
from lightning_lora.strategies import LoRAFSDP2Strategy
from lightning_lora.utils.sharding import full_tensor, is_sharded
from tests.distributed.nets import CONFIG, Block, Net, adapter_tensors, make_data, make_net

ROWS, BATCHES = 8, 2  # of a global batch, whatever the world's size; of an epoch


class CPUFSDPStrategy(FSDPStrategy):
    """Lightning refuses its FSDP strategy on CPUs by type and by device id; nothing else differs here."""

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:
        if not any(isinstance(child, FullyShardedDataParallel) for child in model.modules()):
            model = FullyShardedDataParallel(
                model, mixed_precision=self.mixed_precision_config, device_id=torch.device("cpu"), **self.kwargs
            )
        _setup_activation_checkpointing(model, self._activation_checkpointing_kwargs)
        return model


class Share(Dataset):
    """This process's rows of each global batch."""

    def __init__(self, rank: int, world: int) -> None:
        x, y = make_data(BATCHES * ROWS)
        self.batches = [(a.chunk(world)[rank], b.chunk(world)[rank]) for a, b in zip(x.split(ROWS), y.split(ROWS), strict=True)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


class LitShared(L.LightningModule):
    """A module whose batches are the same global ones under every strategy."""

    tensor_parallel = False

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.net = None if late else make_net()
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.noted(F.cross_entropy(self.net(batch[0]), batch[1]))

    def noted(self, loss: torch.Tensor) -> torch.Tensor:
        """Keep the loss of the global batch."""
        shared = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(shared)
            shared /= dist.get_world_size()
        self.losses.append(shared.item())
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        # With eps=1e-8 Adam's first steps would be the sign of gradients that are rounding noise, which differs between CPUs.
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, eps=1e-3, foreach=False)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}

    def train_dataloader(self) -> DataLoader:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and not self.tensor_parallel else (0, 1)
        return DataLoader(Share(rank, world), batch_size=None)

    test_dataloader = train_dataloader


class LitFSDP2(LitShared):
    """Shards itself in ``configure_model``, as Lightning asks for; ``late`` builds the network there too."""

    def configure_model(self) -> None:
        if self.net is None:
            self.net = make_net()
        if any(is_sharded(p) for p in self.net.parameters()):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class LitTensorParallel(LitShared):
    tensor_parallel = True

    def configure_model(self) -> None:
        if self.net is None:
            self.net = make_net()
        if any(is_sharded(p) for p in self.net.parameters()):
            return
        for layer in self.net.layers:
            parallelize_module(layer, self.device_mesh["tensor_parallel"], {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})


class LitFSDP1(LitShared):
    """Wraps its blocks itself, so that LoRA comes after."""

    def configure_model(self) -> None:
        if self.net is not None:
            return
        self.net = make_net()
        for index, layer in enumerate(self.net.layers):
            self.net.layers[index] = FullyShardedDataParallel(layer, use_orig_params=True, device_id=torch.device("cpu"))
        self.net = FullyShardedDataParallel(self.net, use_orig_params=True, device_id=torch.device("cpu"))


def model_parallel(tensor: bool = False, shards: bool = False) -> Strategy:
    world = dist.get_world_size()
    return ModelParallelStrategy(
        data_parallel_size=1 if tensor else world,
        tensor_parallel_size=world if tensor else 1,
        save_distributed_checkpoint=shards,
        process_group_backend="gloo",
    )


def fsdp1(state: str = "full", **kwargs: Any) -> Strategy:
    return CPUFSDPStrategy(auto_wrap_policy=ModuleWrapPolicy({Block}), state_dict_type=state, process_group_backend="gloo", **kwargs)


# Name → how to make the strategy, and the module that goes with it.
STRATEGIES: dict[str, tuple[Callable[[], Any], Callable[[], LitShared]]] = {
    "single": (lambda: "auto", LitShared),
    "ddp": (lambda: DDPStrategy(process_group_backend="gloo"), LitShared),
    "fsdp full": (fsdp1, LitShared),
    "fsdp sharded": (lambda: fsdp1("sharded"), LitShared),
    "fsdp after": (lambda: CPUFSDPStrategy(process_group_backend="gloo"), lambda: LitFSDP1(late=True)),
    "fsdp2 full": (model_parallel, LitFSDP2),
    "fsdp2 DCP": (lambda: model_parallel(shards=True), LitFSDP2),
    "fsdp2 after": (model_parallel, lambda: LitFSDP2(late=True)),
    "lora_fsdp2": (lambda: LoRAFSDP2Strategy(process_group_backend="gloo"), LitShared),
    "lora_fsdp2 pulled": (lambda: LoRAFSDP2Strategy(process_group_backend="gloo", pull_frozen=True), LitShared),
    "tp": (lambda: model_parallel(tensor=True), LitTensorParallel),
    "tp after": (lambda: model_parallel(tensor=True), lambda: LitTensorParallel(late=True)),
}


# Strategy flag → what the refusal says, all in one process: they are refused before any process starts or communicates.
REFUSED = {
    "ddp_spawn": "start method 'spawn'",
    "ddp_fork": "start method 'fork'",
    "ddp_notebook": "start method 'fork'",
    "deepspeed": "DeepSpeed",
}


def refuse(name: str, folder: str) -> None:
    """Check that a strategy is refused by name, with the way out."""
    from lightning_lora.strategies import check_supported

    if name == "deepspeed":  # not installed here: its class is what the check goes by
        from lightning.pytorch.strategies import DeepSpeedStrategy

        strategy: Any = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
        trainer: Any = SimpleNamespace(strategy=strategy, callbacks=[], precision_plugin=None)
    else:
        trainer = L.Trainer(accelerator="cpu", devices=2, strategy=name, default_root_dir=folder, logger=False, enable_checkpointing=False)
    try:
        check_supported(trainer)
    except ValueError as error:
        assert REFUSED[name] in str(error) and "use strategy=" in str(error), error
        return
    raise AssertionError(f"{name} was not refused")


def run(
    name: str,
    folder: str,
    epochs: int = 2,
    ckpt: str | None = None,
    save: bool = False,
    merge: bool = False,
    test: bool = False,
    config: LoRAConfig = CONFIG,
    weights_only: bool = False,
    checkpointing: str | None = None,
    compile: Literal["layer"] | None = None,
    lora_plus_ratio: float = 1.0,
    quantize: str | None = None,
    start_from: str | None = None,
    offload: Literal["activations"] | None = None,
    callback_checkpointing: Literal["full", "selective"] | None = None,
    precondition: Literal["riemannian", "lora_fa"] | None = None,
    weights: Callable[[str], torch.Tensor] | None = None,
    seed: int = 7,
    more: tuple[L.Callback, ...] = (),
    **trainer_kwargs: Any,
) -> dict[str, Any]:
    """Fit under a strategy; with ``weights``, a module that is built on the meta device.

    Returns:
        losses, adapters and moments by name (whole), what the checkpoint file has, test losses: plain and comparable.
    """
    if dist.is_initialized():  # a worker's: quiet
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    strategy, make = STRATEGIES[name]
    torch.manual_seed(seed)
    Net.checkpointing = checkpointing
    with torch.device("meta") if weights is not None else nullcontext():
        module = make()
    options: dict[str, Any] = {"compile": compile, "lora_plus_ratio": lora_plus_ratio, "quantize": quantize, "start_from": start_from}
    options |= {"offload": offload, "checkpointing": callback_checkpointing, "precondition": precondition, "weights": weights}
    callback = LoRACallback(config, merge_on_fit_end=merge, **options)
    callbacks: list[L.Callback] = [callback, *more]
    if save:
        callbacks.append(ModelCheckpoint(folder, filename="last", enable_version_counter=False, save_weights_only=weights_only))
    devices = dist.get_world_size() if dist.is_initialized() else 1
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy(),
        max_epochs=epochs,
        callbacks=callbacks,
        default_root_dir=folder,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        **quiet,
        **trainer_kwargs,
    )
    with patch.object(block_modes, "compile_layers", partial(compile_layers, backend="eager")):
        trainer.fit(module, ckpt_path=ckpt)
    names = {id(p): n for n, p in clean_parameters(module)}
    optimizer = trainer.optimizers[0]
    result: dict[str, Any] = {
        "losses": module.losses,
        "adapters": adapter_tensors(module),
        "moments": {names[id(p)]: full_tensor(s["exp_avg"]).clone() for p, s in optimizer.state.items()},
        "trained": sorted(names[id(p)] for group in optimizer.param_groups for p in group["params"]),
        "merged": all(layer.merged for _, layer in lora_layers(module)),
        "dtypes": {str(p.dtype) for _, layer in lora_layers(module) for p in layer.lora_parameters().values()},
    }
    if merge:
        with FullyShardedDataParallel.summon_full_params(trainer.strategy.model) if "fsdp" in name and "2" not in name else nullcontext():
            result["base"] = {n: full_tensor(p).detach().clone() for n, p in clean_parameters(module) if "lora_" not in n}
    if test:
        result["test"] = trainer.test(module, verbose=False)[0]["test"]
    if save:
        result["saved"] = saved_content(Path(folder) / "last.ckpt")
    return result


def clean_parameters(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    from lightning_lora.utils.names import clean_name

    return [(clean_name(name), parameter) for name, parameter in module.named_parameters()]


def saved_content(path: Path) -> dict[str, Any]:
    """Names of a checkpoint's model tensors, and how many elements all its tensors have."""
    if path.is_dir():
        from torch.distributed.checkpoint import FileSystemReader

        known = FileSystemReader(path).read_metadata().state_dict_metadata
        names = [name.removeprefix("state_dict/") for name in known if name.startswith("state_dict/")]
        return {"names": sorted(names), "elements": sum(meta.size.numel() for meta in known.values())}
    checkpoint = torch.load(path, weights_only=True)
    moments = [v for o in checkpoint.get("optimizer_states", ()) for s in o["state"].values() for v in s.values()]
    tensors = [t for t in [*checkpoint["state_dict"].values(), *moments] if isinstance(t, torch.Tensor)]
    return {"names": sorted(checkpoint["state_dict"]), "elements": sum(t.numel() for t in tensors)}
