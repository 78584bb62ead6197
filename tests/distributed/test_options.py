"""What Trainer options do under sharding: accumulation, clipping, precision, meta models, compilation, export."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.precision import TransformerEnginePrecision
from lightning.pytorch.strategies import FSDPStrategy
from safetensors.torch import load_file

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, export_merged, merge_lora
from lightning_lora.callbacks import block_modes
from lightning_lora.layers import lora_layers
from lightning_lora.model import offload
from lightning_lora.model.offload import offload_activations
from lightning_lora.strategies import arrange, check_equal, check_supported
from lightning_lora.utils.sharding import full_tensor
from tests.distributed import runs
from tests.distributed.nets import Block, fill_adapters, make_net
from tests.distributed.runs import LitShared, run
from tests.distributed.wrappers import wrapped_and_adapted

SHARDED = ["ddp", "fsdp full", "fsdp after", "fsdp2 full", "fsdp2 after", "lora_fsdp2", "lora_fsdp2 pulled", "tp"]


def run_with(name: str, folder: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    return run(name, folder, 2, **kwargs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same run in one process, made once for each set of options."""
    made: dict[str, dict[str, Any]] = {}

    def get(**kwargs: Any) -> dict[str, Any]:
        if str(kwargs) not in made:
            made[str(kwargs)] = run("single", str(tmp_path_factory.mktemp("alone")), 2, **kwargs)
        return made[str(kwargs)]

    return get


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.05}], ids=["accumulate", "clip by norm"])
@pytest.mark.parametrize("name", SHARDED)
def test_options_act_as_in_one_process(pool: Any, alone: Any, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    wanted, plain = alone(**options), alone()
    assert wanted["losses"] != plain["losses"]  # the option does something
    for rank in pool.run(run_with, name, str(tmp_path), options):
        assert rank["losses"] == pytest.approx(wanted["losses"], abs=1e-6)
        for key, tensor in rank["adapters"].items():
            torch.testing.assert_close(tensor, wanted["adapters"][key], rtol=0, atol=2e-6)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("name", [name for name in SHARDED if name != "tp"])
def test_adapters_and_moments_stay_fp32(pool: Any, alone: Any, tmp_path: Path, name: str, precision: str) -> None:
    for rank in pool.run(run_with, name, str(tmp_path), {"precision": precision}):
        assert rank["dtypes"] == {"torch.float32"}
        assert {tensor.dtype for tensor in rank["moments"].values()} == {torch.float32}
        if "after" not in name:  # a net that configure_model builds under bf16-true draws other numbers
            assert rank["losses"] == pytest.approx(alone(precision=precision)["losses"], abs=0.05)


def check_meta(strategy: str) -> dict[str, Any]:
    """A model built on the meta device, sharded, materialised by Lightning, its base loaded afterwards."""
    make_strategy, make_module = runs.STRATEGIES[strategy]

    class Meta(type(make_module())):  # type: ignore[misc]
        def on_fit_start(self) -> None:
            base = make_net().state_dict()
            with torch.no_grad():
                for name, parameter in self.net.named_parameters():
                    if "lora_" not in name:
                        full = base[name].to(parameter.dtype)
                        parameter.copy_(torch.distributed.tensor.distribute_tensor(full, parameter.device_mesh, parameter.placements))
            self.started = {name: full_tensor(p.detach()).clone() for name, p in self.net.named_parameters() if "lora_" in name}

    module = Meta(late=True)
    with torch.device("meta"):
        module.net = type(make_net())()
    config = LoRAConfig(rank=4, alpha=8, target_modules=["q", "v", "fc1", "fc2"])
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=make_strategy(), max_epochs=1, callbacks=[LoRACallback(config, merge_on_fit_end=False)],
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module)
    return {"started": module.started, "meta": any(p.is_meta for p in module.parameters()), "losses": module.losses}


@pytest.mark.parametrize("name", ["fsdp2 full", "lora_fsdp2", "lora_fsdp2 pulled"])
def test_meta_models_get_initialised_adapters(pool: Any, name: str) -> None:
    first, second = pool.run(check_meta, name)
    assert not first["meta"] and first["losses"][-1] < 10
    for key, tensor in first["started"].items():
        assert torch.equal(tensor, second["started"][key])
        assert (tensor == 0).all() if key.endswith("lora_B") else tensor.std() > 0
        bound = tensor.shape[1] ** -0.5
        assert tensor.abs().max() <= bound


def test_compiled_blocks_train_the_same(pool: Any, alone: Any, tmp_path: Path) -> None:
    for name in ("ddp", "fsdp2 full"):
        for rank in pool.run(run_compiled, name, str(tmp_path)):
            assert rank["losses"] == pytest.approx(alone()["losses"], abs=1e-5)


def test_offloaded_activations_train_the_same(pool: Any, alone: Any, tmp_path: Path) -> None:
    for name in ("ddp", "fsdp full", "fsdp2 full", "fsdp2 after"):
        for rank in pool.run(run_offloaded, name, str(tmp_path)):
            assert rank["losses"] == pytest.approx(alone()["losses"], abs=1e-6)
            assert rank["moved"] > 0


def test_selective_checkpoints_train_the_same(pool: Any, alone: Any, tmp_path: Path) -> None:
    for name, compiled in (("ddp", None), ("fsdp2 full", None), ("fsdp2 after", None), ("fsdp full", None), ("fsdp2 full", "layer")):
        for rank in pool.run(run_selective, name, str(tmp_path), compiled):
            assert rank["losses"] == pytest.approx(alone()["losses"], abs=1e-5 if compiled else 1e-6), name


def test_lightnings_activation_checkpointing(pool: Any, alone: Any, tmp_path: Path) -> None:
    for rank in pool.run(run_checkpointed, str(tmp_path)):
        assert rank["losses"] == pytest.approx(alone()["losses"], abs=1e-6)
        assert rank["saved"]["names"] == sorted(alone()["adapters"])  # without the wrapper's part in their names


def run_selective(name: str, folder: str, compiled: Any) -> dict[str, Any]:
    return run(name, folder, 2, callback_checkpointing="selective", compile=compiled)


def run_checkpointed(folder: str) -> dict[str, Any]:
    runs.STRATEGIES["fsdp checkpointed"] = (lambda: runs.fsdp1(activation_checkpointing_policy={Block}), LitShared)
    try:
        return run("fsdp checkpointed", folder, 2, save=True)
    finally:
        del runs.STRATEGIES["fsdp checkpointed"]


def run_offloaded(name: str, folder: str) -> dict[str, Any]:
    handles = []

    def keep(model: Any) -> Any:
        handles.append(offload_activations(model))
        return handles[-1]

    with patch.object(offload, "MINIMUM", 1), patch.object(block_modes, "offload_activations", keep):
        return run(name, folder, 2, checkpointing="non-reentrant", offload="activations") | {"moved": handles[0].tensors}


def run_compiled(name: str, folder: str) -> dict[str, Any]:
    strategy, make = runs.STRATEGIES[name]

    def compiled() -> LitShared:
        module = make()
        for layer in module.net.layers:
            layer.compile(backend="eager")
        return module

    runs.STRATEGIES[name] = (strategy, compiled)
    try:
        return run(name, folder, 2)
    finally:
        runs.STRATEGIES[name] = (strategy, make)


def diverge() -> str:
    model = apply_lora(make_net(), config=LoRAConfig(target_modules=["fc1"]))
    torch.manual_seed(3)
    next(lora_layers(model))[1].lora_B.data.normal_()
    check_equal(model)
    next(lora_layers(model))[1].lora_B.data.add_(dist.get_rank())
    with pytest.raises(RuntimeError, match=r"1 trained parameter differs between processes.*layers\.0\.fc1\.lora_B") as error:
        check_equal(model)
    return str(error.value)


def test_ranks_that_drifted_apart_are_an_error(pool: Any) -> None:
    assert all("not averaged" in message for message in pool.run(diverge))


def test_weight_averaging_is_refused(tmp_path: Path) -> None:
    for callbacks in ([WeightAveraging(), LoRACallback()], [LoRACallback(), WeightAveraging()]):
        trainer = L.Trainer(accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
        with pytest.raises(ValueError, match="WeightAveraging copies the whole model: before LoRACallback in the list"):
            check_supported(trainer)


def test_precision_plugins_that_replace_layers_are_refused(tmp_path: Path) -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.strategy.precision_plugin = TransformerEnginePrecision.__new__(TransformerEnginePrecision)
    with pytest.raises(ValueError, match="TransformerEnginePrecision replaces every linear layer"):
        check_supported(trainer)


def test_flat_parameters_are_refused() -> None:
    trainer = SimpleNamespace(strategy=FSDPStrategy(use_orig_params=False), callbacks=[], precision_plugin=None)
    with pytest.raises(ValueError, match="use_orig_params=False"):
        check_supported(trainer)


def meta_under_fsdp1() -> str:
    module = LitShared(late=True)
    with torch.device("meta"):
        module.net = type(make_net())()
    apply_lora(module.net, config=LoRAConfig(target_modules=["fc1"]))
    with pytest.raises(ValueError, match=r"meta device.*lora_fsdp2") as error:
        arrange(runs.fsdp1(), module)
    return str(error.value)


def test_meta_modules_under_fsdp1_are_refused(pool: Any) -> None:
    assert all(pool.run(meta_under_fsdp1))


# Export.


def export(name: str, folder: str) -> None:
    export_merged(wrapped_and_adapted(name, "before")[0], folder, shard_bytes=4000)


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2", "tp"])
def test_export_merges_tensor_by_tensor(pool: Any, tmp_path: Path, name: str) -> None:
    pool.run(export, name, str(tmp_path / "merged"))
    wanted = apply_lora(make_net(), config=LoRAConfig(rank=4, alpha=8, target_modules=["q", "v", "fc1", "fc2"]))
    fill_adapters(wanted)
    merge_lora(wanted)
    files = list((tmp_path / "merged").glob("model-*-of-*.safetensors"))
    assert len(files) > 2 and (tmp_path / "merged/model.safetensors.index.json").is_file()
    found = {key.replace("module.", ""): tensor for file in files for key, tensor in load_file(file).items()}
    assert found.keys() == wanted.state_dict().keys()
    for key, tensor in wanted.state_dict().items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)
