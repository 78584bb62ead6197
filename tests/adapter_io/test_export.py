"""``export_merged``: what it refuses, what it holds in memory, models that are none of transformers', folders that are there already."""

from __future__ import annotations

import copy
import errno
import json
import os
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, apply_lora, disabled_lora, export_merged, get_lora_parameters, merge_lora, save_adapter
from lightning_lora.adapter_io.merged_weights import MergedWeights
from tests.adapter_io.folders import differences
from tests.conftest import adapted, same_bits, snapshot

IDS = torch.arange(8)[None]


@pytest.fixture
def model() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return adapted(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval(), target_modules="all-linear")


class Net(nn.Module):
    """Weights, a tie, a buffer, and state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.c.weight = self.b.weight
        self.register_buffer("scale", torch.full((8,), 2.0))
        self.register_buffer("scratch", torch.zeros(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x))) * self.scale


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 10_000], ids=["one file", "shards"])
@pytest.mark.parametrize("merged", [False, True])
def test_from_pretrained_reads_it(model: nn.Module, tmp_path: Path, merged: bool, shard_bytes: int) -> None:
    wanted = model(IDS).logits
    if merged:
        merge_lora(model)
    before = snapshot(model)
    folder = export_merged(model, tmp_path / "out", shard_bytes=shard_bytes)
    assert snapshot(model) == before
    assert (len(list(folder.glob("*.safetensors"))) == 1) == (shard_bytes > 1_000_000)
    assert not list(folder.glob(".*"))
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(IDS).logits, wanted, rtol=1e-4, atol=1e-5)


def test_no_more_than_one_file_is_in_memory(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every merged weight is counted from its computation until it is freed."""
    live, most, computed = 0, 0, 0
    read = MergedWeights.read

    def counted(self: MergedWeights, number: int) -> Tensor:
        nonlocal live, most, computed
        known = self._last is not None and self._last[0] == number
        value = read(self, number)
        if not known:
            size = value.nbytes
            value = value.clone()
            self._last = number, value
            live, computed = live + size, computed + size
            most = max(most, live)

            def freed() -> None:
                nonlocal live
                live -= size

            weakref.finalize(value, freed)
        return value

    monkeypatch.setattr(MergedWeights, "read", counted)
    export_merged(model, tmp_path / "out", shard_bytes=20_000)
    whole, largest = sum(p.nbytes for n, p in model.named_parameters() if "lora_" not in n), 64 * 32 * 4
    assert computed == whole and most <= 20_000 + 2 * largest < whole / 2


# Folders.


def test_a_folder_that_is_not_empty_is_refused(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="is not empty"):
        export_merged(model, tmp_path)
    export_merged(model, tmp_path, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_weights_of_an_earlier_export_go(model: nn.Module, tmp_path: Path) -> None:
    """``from_pretrained`` would read the single file before the new ones, or the old index beside the single file."""
    wanted = model(IDS).logits
    (tmp_path / "model_of_mine.safetensors").write_text("keep")
    for shard_bytes in (5_000_000_000, 10_000, 20_000, 5_000_000_000):
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        export_merged(model, tmp_path, overwrite=True, shard_bytes=shard_bytes)
        wanted = wanted * 2
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *("config.json", "generation_config.json", "merge_certificate.json", "model.safetensors", "model_of_mine.safetensors")
    ]


def test_an_adapter_is_not_exported_over(model: nn.Module, tmp_path: Path) -> None:
    """``from_pretrained`` would load it on top of the merged weights."""
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="holds an adapter"):
        export_merged(model, tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        export_merged(model, tmp_path / "adapter_config.json")


@pytest.mark.parametrize("there", [False, True], ids=["new folder", "over another"])
def test_a_failure_leaves_the_folder_as_it_was(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    folder = tmp_path / "out"
    if there:
        export_merged(model, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()} if there else None

    def full(self: Any, number: int) -> Tensor:
        raise OSError("disk full")

    monkeypatch.setattr(MergedWeights, "read", full)
    with pytest.raises(OSError, match="disk full"):
        export_merged(model, folder, overwrite=True)
    assert ({file.name: file.read_bytes() for file in folder.iterdir()} if folder.exists() else None) == before


# What is refused.


def test_no_room_for_the_model_is_known_before_the_work(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    monkeypatch.setattr(MergedWeights, "read", None)
    with pytest.raises(ValueError, match=r"^folder='.*out' has no room for 0\.1 MB, as much as the merged model takes at least"):
        export_merged(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_spoilt_or_disabled_adapter_is_refused(model: nn.Module, tmp_path: Path) -> None:
    with disabled_lora(model), pytest.raises(ValueError, match=r"q_proj' cannot be exported: its adapter is disabled"):
        export_merged(model, tmp_path / "out")
    with torch.no_grad():
        get_lora_parameters(model)[0][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"q_proj' cannot be exported: lora_A holds NaN"):
        export_merged(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = apply_lora(Net(), LoRAConfig(rank=2, target_modules=["a"]))
    with pytest.raises(ValueError, match=r"'a' cannot be exported: weight is on the meta device"):
        export_merged(model, tmp_path / "out")


# Models that are none of transformers'.


def test_a_plain_module_is_written_as_its_state_dict(tmp_path: Path) -> None:
    model = adapted(Net(), rank=2, target_modules=["a"])
    x = torch.randn(3, 8)
    tensors = load_file(export_merged(model, tmp_path / "out") / "model.safetensors")
    assert tensors.keys() == Net().state_dict().keys() - {"c.weight"}  # tied, and once is enough
    plain = Net()
    plain.load_state_dict(tensors, strict=False)
    torch.testing.assert_close(plain(x), model(x))
    files = export_merged(model, tmp_path / "shards", shard_bytes=300).glob("model-*.safetensors")
    shards = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert shards.keys() == tensors.keys() and all(same_bits(shards[name], tensor) for name, tensor in tensors.items())


def test_a_tie_of_a_plain_module_cannot_be_said_in_a_file(tmp_path: Path) -> None:
    model = adapted(Net(), rank=2, target_modules=["b"])
    x = torch.randn(3, 8)
    wanted = model(x)
    with pytest.raises(ValueError, match=r"b.weight is tied to c.weight, .*merge_lora\(model, untie=True\) first"):
        export_merged(model, tmp_path / "out")
    merge_lora(model, untie=True)
    plain = Net()
    plain.c.weight = nn.Parameter(plain.c.weight.detach().clone())
    plain.load_state_dict(load_file(export_merged(model, tmp_path / "out") / "model.safetensors"))
    torch.testing.assert_close(plain(x), wanted)


def test_state_that_is_no_tensor_is_said_to_be_left_out(tmp_path: Path) -> None:
    class Fitted(Net):
        def get_extra_state(self) -> Any:
            return {"seen": 3}

        def set_extra_state(self, state: Any) -> None: ...

    with pytest.warns(UserWarning, match=r"'_extra_state' is of type dict, no tensor, and is not in the export"):
        export_merged(adapted(Fitted(), rank=2, target_modules=["a"]), tmp_path / "out")


class SavesItself(Net):
    """A class of another library, with a method of that name and one argument."""

    def save_pretrained(self, folder: Path) -> None:
        torch.save(self.state_dict(), Path(folder) / "weights.pt")


def test_a_model_that_saves_itself_does(tmp_path: Path) -> None:
    model = adapted(SavesItself(), rank=2, target_modules=["a"])
    state = torch.load(export_merged(model, tmp_path / "out") / "weights.pt")
    merged = merge_lora(copy.deepcopy(model)).state_dict()
    assert state.keys() == merged.keys() and all(same_bits(state[name], tensor) for name, tensor in merged.items())


def test_inside_a_lightning_module(tmp_path: Path, model: nn.Module) -> None:
    class Task(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def configure_optimizers(self) -> None: ...

    assert differences(export_merged(Task(), tmp_path / "task"), export_merged(model, tmp_path / "model")) == []


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_was_placed_or_compiled(tmp_path: Path, model: nn.Module) -> None:
    """A device map, even of the CPU alone, makes transformers look for offloaded weights."""
    wanted = model(IDS).logits
    model.hf_device_map = {"": "cpu"}
    for number, wrapped in enumerate((model, torch.compile(model, backend="eager"))):
        loaded = AutoModelForCausalLM.from_pretrained(export_merged(wrapped, tmp_path / str(number)))
        torch.testing.assert_close(loaded(IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    assert model.hf_device_map == {"": "cpu"}


def test_parameters_in_eight_bits_beside_packed_weights_are_refused(tmp_path: Path) -> None:
    from tests.quantized import packed_stack

    model = adapted(packed_stack("nf4"), rank=2, target_modules=["up"])
    model.norm.weight = nn.Parameter(model.norm.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"'norm' cannot be exported: weight is stored as torch.float8_e4m3fn"):
        export_merged(model, tmp_path / "out")


def test_layers_in_eight_bits_are_exported_dequantized_whether_adapted_or_not(model: nn.Module, tmp_path: Path) -> None:
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import FP8Linear

    plain = LlamaForCausalLM(model.config)
    plain.model.layers[0].mlp.down_proj = packed = FP8Linear(64, 32, block_size=(16, 16))
    with torch.no_grad():
        packed.weight.copy_(torch.randn(32, 64))
        packed.weight_scale_inv.uniform_()
    blocks = packed.weight_scale_inv.repeat_interleave(16, 0).repeat_interleave(16, 1)
    wanted = packed.weight.float() * blocks
    plain.config.quantization_config = FineGrainedFP8Config(weight_block_size=(16, 16))
    folder = export_merged(adapted(plain, rank=2, target_modules=["q_proj"]), tmp_path / "out")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.down_proj"
    torch.testing.assert_close(tensors[f"{name}.weight"].float(), wanted, rtol=2**-8, atol=0)
    assert f"{name}.weight_scale_inv" not in tensors
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_what_apply_lora_did_not_touch_is_the_same_to_the_bit(tmp_path: Path) -> None:
    plain = Net()
    base = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    tensors = load_file(export_merged(apply_lora(plain, LoRAConfig(rank=2, target_modules=["a"])), tmp_path / "out") / "model.safetensors")
    assert all(same_bits(tensor, base[name]) for name, tensor in tensors.items())
