"""A sharded model's certificate is that of one process: one layer at a time is whole, and rounding is summed over the shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import apply_lora, export_merged, load_adapter, merge_certificate, merge_lora, merge_report
from lightning_lora.adapter_io.certificate import CERTIFICATE
from tests.distributed.nets import CONFIG, fill_adapters, make_data, make_net
from tests.distributed.wrappers import WRAPPERS, weights_of, wrapped_and_adapted


def reference() -> nn.Module:
    model = apply_lora(make_net().bfloat16(), config=CONFIG)
    fill_adapters(model)
    return model


def sharded(name: str) -> nn.Module:
    model = WRAPPERS[name][0](apply_lora(make_net().bfloat16(), config=CONFIG))
    fill_adapters(model)
    return model


def comparable(certificate: Any) -> Any:
    content = certificate if isinstance(certificate, dict) else certificate.to_dict()
    return {name: value for name, value in content.items() if name != "layers"}, {
        name: (each["unchanged"], each["entries"], each["lost"]) for name, each in content["layers"].items()
    }


def certified(name: str) -> Any:
    model = sharded(name)
    before = weights_of(model)
    x = make_data()[0].bfloat16()
    unmerged, probed = merge_certificate(model), merge_certificate(model, probe=x)
    assert all(torch.equal(weight, before[key]) for key, weight in weights_of(model).items())
    assert probed.probe is not None and unmerged.layers == probed.layers
    with pytest.raises(ValueError, match=r"more than max_lost=0\.001"):
        merge_lora(model, max_lost=0.001)
    assert all(torch.equal(weight, before[key]) for key, weight in weights_of(model).items())
    merged = merge_certificate(merge_lora(model))
    assert max(each.lost for each in merged.layers.values() if each) == max(merge_report(model).values())
    return comparable(unmerged), comparable(merged), probed.probe["output"].max_relative


@pytest.mark.parametrize("name", ["fsdp2", "fsdp1", "tp"])
def test_it_is_that_of_one_process(pool: Any, name: str) -> None:
    model = reference()
    wanted = comparable(merge_certificate(model))
    probe = merge_certificate(model, probe=make_data()[0].bfloat16()).probe
    assert probe is not None
    for unmerged, merged, difference in pool.run(certified, name):
        for found in (unmerged, merged):
            assert found[0] == wanted[0]
            assert found[1].keys() == wanted[1].keys()
            for fqn, (unchanged, entries, lost) in found[1].items():
                assert (unchanged, entries) == wanted[1][fqn][:2] and lost == pytest.approx(wanted[1][fqn][2], rel=1e-4)
        assert 0 < difference < 2 * probe["output"].max_relative + 0.01


def exported(name: str, folder: str) -> str:
    model = sharded(name)
    with pytest.raises(ValueError, match=r"more than max_lost=0\.001") as error:
        export_merged(model, Path(folder, "refused"), max_lost=0.001)
    export_merged(model, Path(folder, "merged"), probe=make_data()[0].bfloat16(), max_lost=0.9)
    return str(error.value)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp1"])
def test_an_export_has_it(pool: Any, name: str, tmp_path: Path) -> None:
    """Refused on every process, or written once."""
    assert len(set(pool.run(exported, name, str(tmp_path)))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    found = json.loads((tmp_path / "merged" / CERTIFICATE).read_text())
    wanted = json.loads(json.dumps(merge_certificate(reference()).to_dict()))
    assert found["base"] == wanted["base"] and found["adapter"] == wanted["adapter"] and found["probe"]["output"]["max_abs"] > 0


def checksum(name: str, order: str) -> str:
    return merge_certificate(wrapped_and_adapted(name, order)[0]).adapter


@pytest.mark.parametrize(("name", "order"), [("fsdp2", "after"), ("tp", "after"), ("ddp", "before")])
def test_the_adapters_checksum_is_the_same(pool: Any, name: str, order: str) -> None:
    model = apply_lora(make_net(), config=CONFIG)
    fill_adapters(model)
    assert set(pool.run(checksum, name, order)) == {merge_certificate(model).adapter}


def test_the_reference_loads(tmp_path: Path) -> None:
    from lightning_lora import save_adapter

    model = reference()
    save_adapter(model, tmp_path)
    assert merge_certificate(load_adapter(make_net().bfloat16(), tmp_path)).to_dict() == merge_certificate(model).to_dict()
