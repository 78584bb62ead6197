"""What a merge keeps: against float64 by hand, layer by layer; what is refused; what stands in the file."""

from __future__ import annotations

import copy
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, export_merged, load_adapter, merge_certificate, merge_lora, merge_report, save_adapter
from lightning_lora.adapter_io.certificate import CERTIFICATE
from lightning_lora.adapter_io.files import read_adapter
from lightning_lora.adapter_io.fingerprint import base_identity
from lightning_lora.layers import lora_layers
from tests.conftest import ALL, DTYPES, ConvNet, Task, TinyModel, adapted, base_bits, fill, snapshot
from tests.layers.experts import tiny_qwen3_moe
from tests.layers.mixtures import CONFIG as EXPERTS
from tests.quantized import packed_stack

#: Name → an adapted model in bf16, and a batch for it.
IDS = torch.tensor([[1, 2, 3], [4, 5, 10]])
MODELS: dict[str, Any] = {
    "linears, embedding": lambda: (adapted(TinyModel().bfloat16(), **ALL), IDS),
    "dora": lambda: (adapted(TinyModel().bfloat16(), **ALL, variant="dora"), IDS),
    "convolution": lambda: (adapted(ConvNet().bfloat16(), target_modules=["conv", "head"], rank=2), torch.randn(2, 3, 5, 5).bfloat16()),
    "experts": lambda: (fill(apply_lora(tiny_qwen3_moe(torch.bfloat16), EXPERTS), std=0.1), {"input_ids": IDS}),
    "nf4": lambda: (adapted(packed_stack("nf4", torch.bfloat16), target_modules=["up", "down"]), torch.randn(3, 128).bfloat16()),
}
every_model = pytest.mark.parametrize("name", MODELS)


def by_hand(base: nn.Module, merged: nn.Module) -> dict[str, tuple[float, int, int]]:
    """Name → share lost, unchanged and all entries, from the weights before and after a merge, in float64. Widens the base's adapter."""
    found = {}
    for fqn, layer in lora_layers(base):
        for name, part in layer.by_weight().items():
            with torch.no_grad():
                before, after = part.base_weight().double(), merged.get_submodule(fqn).by_weight()[name].base_weight().double()
                part._parameters.update({key: nn.Parameter(p.double()) for key, p in part.lora_parameters().items()})
                update, scale = part._merge_parts()
                exact = before + update if scale is None else (before + update) * scale
            lost = (after - exact).norm() / (exact - before).norm()
            found[fqn if len(layer.adapted) == 1 else f"{fqn}.{name}"] = (lost.item(), int((before == after).sum()), before.numel())
    return found


@every_model
def test_every_layer_against_float64(name: str) -> None:
    model, _ = MODELS[name]()
    before = snapshot(model)
    certificate = merge_certificate(model)
    assert snapshot(model) == before
    base = copy.deepcopy(model)
    merge_lora(model, quantized="dequantize")
    wanted = by_hand(base, model)
    assert certificate.layers.keys() == wanted.keys()
    for fqn, (lost, unchanged, entries) in wanted.items():
        found = certificate.layers[fqn]
        assert found is not None and found.entries == entries and found.dtype == "bfloat16"
        assert found.lost == pytest.approx(lost, rel=0.02) and 0 < lost < 0.5  # a few sums fall next to the middle of two bf16 numbers
        assert abs(found.unchanged - unchanged) <= 0.01 * entries and found.survives == 1 - found.lost
    again = merge_certificate(model)
    assert again.layers.keys() == wanted.keys() and again.probe is None
    for fqn, rounding in again.layers.items():
        assert rounding is not None and rounding.lost == pytest.approx(certificate.layers[fqn].lost, rel=1e-3)  # type: ignore[union-attr]
    assert max(merge_report(model).values()) == max(r.lost for r in again.layers.values() if r)


@every_model
def test_the_probe_compares_outputs_and_changes_nothing(name: str) -> None:
    model, batch = MODELS[name]()
    model.train()

    def outputs() -> torch.Tensor:
        with torch.no_grad():
            output = model(**batch) if isinstance(batch, dict) else model(batch)
        return (output.logits if isinstance(batch, dict) else output).double()

    before = snapshot(model)
    certificate = merge_certificate(model, probe=batch)
    assert snapshot(model) == before
    model.eval()
    unmerged = outputs()
    merge_lora(model, quantized="dequantize")
    merged = outputs()
    difference = (merged - unmerged).abs()
    assert certificate.probe is not None
    found = certificate.probe["logits" if isinstance(batch, dict) else "output"]
    assert found.max_abs == pytest.approx(difference.max().item(), rel=1e-5)
    assert found.max_relative == pytest.approx((difference.max() / unmerged.abs().max()).item(), rel=1e-5)
    assert found.mean_relative == pytest.approx((difference.mean() / unmerged.abs().mean()).item(), rel=1e-5)
    assert 0 < found.mean_relative < 0.05
    before = base_bits(model)
    assert merge_certificate(model, probe=batch).probe == certificate.probe  # unmerged in between, and merged again
    assert base_bits(model) == before and all(layer.merged for _, layer in lora_layers(model))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "survives"), [(1.0, 1.0), (1e-9, 0.0)])
def test_what_survives_in_each_dtype(dtype: torch.dtype, size: float, survives: float) -> None:
    """All of an update as large as the weight; nothing of one far below its last digit, and every entry is as before."""
    layer = adapted(nn.Sequential(nn.Linear(16, 16)).to(dtype), target_modules=["0"], rank=2)
    with torch.no_grad():
        layer[0].weight.uniform_(1, 2)
        layer[0].lora_B.mul_(size)
    (found,) = merge_certificate(layer).layers.values()
    assert found is not None and found.entries == 256
    if dtype == torch.float64:
        survives = 1.0
    assert found.survives == pytest.approx(survives, abs=0.02)
    assert found.unchanged == 256 if survives == 0 else found.unchanged < 10


def test_the_file(make: Any, tmp_path: Path) -> None:
    model = adapted(make(TinyModel).bfloat16(), **ALL)
    folder = export_merged(model, tmp_path / "merged", probe=IDS)
    content = json.loads((folder / CERTIFICATE).read_text())
    assert content == merge_certificate(model, probe=IDS).to_dict()
    assert content["format_version"] == 1 and content["dtype"] == "bfloat16" and content["versions"]["torch"] == version("torch")
    assert content["base"] == base_identity(make(TinyModel))
    assert content["adapter"]["checksum"] == read_adapter(save_adapter(model, tmp_path / "adapter")).checksum()
    assert content["layers"].keys() == {name for name, _ in lora_layers(model)}
    assert content["layers"]["embed"].keys() == {"dtype", "survives", "lost", "unchanged", "entries"}
    assert content["probe"]["output"].keys() == {"max_abs", "max_relative", "mean_relative"}


@pytest.mark.parametrize(
    "fields",
    [{}, {"variant": "dora"}, {"variant": "vera"}, {"init": "pissa"}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}],
    ids=["lora", "dora", "vera", "pissa", "bias", "head"],
)
@pytest.mark.filterwarnings("ignore")
def test_the_adapters_checksum_is_that_of_its_folder(make: Any, tmp_path: Path, fields: Any) -> None:
    """Before it is saved, merged, loaded again, from a LightningModule; another adapter has another."""
    model = adapted(make(TinyModel), target_modules=["q_proj", "mlp"], rank=2, **fields)
    checksum = read_adapter(save_adapter(model, tmp_path)).checksum()
    assert merge_certificate(model).adapter == merge_certificate(Task(model)).adapter == checksum
    assert merge_certificate(load_adapter(make(TinyModel), tmp_path)).adapter == checksum
    assert merge_certificate(merge_lora(model)).adapter == checksum
    other = load_adapter(make(TinyModel), tmp_path)
    with torch.no_grad():
        next(lora_layers(other))[1].lora_parameters().popitem()[1].mul_(1.0001)
    assert merge_certificate(other).adapter != checksum


def test_a_model_without_an_adapter_gets_no_file(make: Any, tmp_path: Path) -> None:
    export_merged(adapted(make(TinyModel), **ALL), tmp_path)
    assert (tmp_path / CERTIFICATE).is_file()
    export_merged(make(TinyModel), tmp_path, overwrite=True)
    assert not (tmp_path / CERTIFICATE).exists()  # the old one is of other weights
    for call in (merge_certificate, lambda model, **asked: export_merged(model, tmp_path / "other", **asked)):
        with pytest.raises(ValueError, match="TinyModel has no LoRA layers to certify"):
            call(make(TinyModel), probe=IDS)


@pytest.mark.parametrize("merged", [False, True])
def test_a_limit_refuses_and_writes_nothing(make: Any, tmp_path: Path, merged: bool) -> None:
    model = adapted(make(TinyModel).bfloat16(), **ALL)
    with torch.no_grad():
        model.layers[1].mlp.lora_B.mul_(1e-4)
    merge_lora(model) if merged else None
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'layers.1.mlp' loses 9\d\.\d+% of its update by rounding, more than max_lost=0\.5 \(1 of 7"):
        export_merged(model, tmp_path / "merged", max_lost=0.5)
    assert snapshot(model) == before and not any(tmp_path.iterdir())
    export_merged(model, tmp_path / "merged", max_lost=1.1)


@pytest.mark.parametrize("max_lost", [-0.1, float("nan"), "0.1", True])
def test_a_limit_is_a_number(make: Any, tmp_path: Path, max_lost: Any) -> None:
    with pytest.raises(ValueError, match=r"max_lost=.* must be a share of an update"):
        export_merged(make(TinyModel), tmp_path, max_lost=max_lost)
    with pytest.raises(ValueError, match=r"max_lost=.* must be a share of an update"):
        merge_lora(adapted(make(TinyModel), **ALL), max_lost=max_lost)


def test_a_sum_that_does_not_fit_is_refused(make: Any, tmp_path: Path) -> None:
    model = adapted(make(TinyModel).half(), target_modules=["q_proj"])
    with torch.no_grad():
        model.layers[0].attn.q_proj.weight[0, 0] = 65000
        model.layers[0].attn.q_proj.lora_B.mul_(1e5)
    with pytest.raises(ValueError, match=r"'layers.0.attn.q_proj': its merged weight does not fit float16: load the base in bfloat16"):
        export_merged(model, tmp_path / "merged")
    assert not any(tmp_path.iterdir())


def test_what_other_code_merged_is_not_certified(make: Any) -> None:
    model = adapted(make(TinyModel), target_modules=["q_proj"])
    model.layers[0].attn.q_proj.merged = True
    certificate = merge_certificate(model)
    assert certificate.layers["layers.0.attn.q_proj"] is certificate.to_dict()["layers"]["layers.0.attn.q_proj"] is None
    assert str(certificate).startswith("rounding loses at most 0.00% of an update (layers.1.attn.q_proj)")
    with pytest.raises(ValueError, match=r"'layers.0.attn.q_proj' was merged by other code.*max_lost=0\.1 cannot be checked"):
        certificate.check(0.1)


def test_an_adapter_that_cannot_be_merged_is_named(make: Any) -> None:
    model = adapted(make(TinyModel), target_modules=["q_proj"])
    with torch.no_grad():
        model.layers[1].attn.q_proj.lora_A[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"'layers.1.attn.q_proj' cannot be merged: lora_A holds NaN"):
        merge_certificate(model, probe=IDS)


def test_tied_weights_are_certified(make: Any) -> None:
    model = adapted(make(TinyModel, tied=True), target_modules=["embed"], rank=2)
    before = snapshot(model)
    certificate = merge_certificate(model, probe=IDS)
    assert snapshot(model) == before and certificate.probe is not None and certificate.probe["output"].max_relative < 1e-5


def test_the_config_is_part_of_the_adapter(make: Any) -> None:
    first, second = (fill(apply_lora(make(TinyModel), LoRAConfig(target_modules=["mlp"], alpha=alpha))) for alpha in (8, 16))
    assert merge_certificate(first).adapter != merge_certificate(second).adapter
