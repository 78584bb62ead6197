"""What a quantized weight was before it was quantized, and when that no longer counts."""

from __future__ import annotations

import pytest

from lightning_lora import LoRAConfig, apply_lora, merge_lora, quantize_base, unload_lora, unmerge_lora
from lightning_lora.adapter_io.fingerprint import base_identity
from tests.conftest import fill
from tests.layers.experts import tiny_qwen3_moe


@pytest.mark.parametrize("how", ["fp8", "nf4"])
@pytest.mark.parametrize("targets", [["experts"], ["q_proj", "v_proj"]], ids=["experts", "linears"])
def test_a_merge_that_stays_makes_another_base(how: str, targets: list[str]) -> None:
    """The packed weight with the update in it is not the base's; as long as it can be unmerged, its base is."""
    model = quantize_base(tiny_qwen3_moe(), how, targets=targets)
    before = base_identity(model)
    merge_lora(fill(apply_lora(model, LoRAConfig(rank=2, target_modules=targets)), std=0.3), quantized="requantize")
    assert base_identity(model) == before
    unmerge_lora(model)
    assert base_identity(model) == before
    merge_lora(model, quantized="requantize")
    assert base_identity(unload_lora(model, merged="keep"))["fingerprint"] != before["fingerprint"]
