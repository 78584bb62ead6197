"""The table for those who come from PEFT: each row is run as written, in PEFT and here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lightning_lora
from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, load_adapter, save_adapter
from tests.docs.pages import batches, llama, table


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks transformers so
def test_the_same_logits_come_after_each_row(tmp_path: Path) -> None:
    """On models with the same adapter."""
    rows = [[re.findall("`(.+?)`", cell) for cell in (left, row["here"])] for left, row in table("coming-from", "PEFT").items()]
    assert len(rows) == 10
    filled = apply_lora(llama(), LoRAConfig(rank=8, alpha=16))
    for parameter in get_lora_parameters(filled):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(parameter)))
    adapter = save_adapter(filled, tmp_path / "adapter")
    for row, cells in enumerate(rows):
        logits = []
        for module, code in zip((peft, lightning_lora), cells, strict=True):
            names: dict[str, Any] = {name: getattr(module, name) for name in module.__all__} | {"batch": batches()[0]}
            names["folder"] = adapter if "from_pretrained" in cells[0][0] else tmp_path / f"{module.__name__}-{row}"
            make = peft.LoraConfig if module is peft else LoRAConfig
            names["config"] = make(target_modules=["q_proj", "v_proj"])
            names["model"] = llama().eval()
            if not re.search("get_peft_model|from_pretrained", cells[0][0]):  # others have an adapter already
                names["model"] = adapted_by(module, names["model"], adapter)
            for call in code:
                if call.startswith("with "):
                    exec(f"{call}\n    logits = model(**batch).logits", names)
                elif call.startswith("modules_to_save"):
                    assert list(make(target_modules=["q_proj"], **eval(f"dict({call})")).modules_to_save) == ["score"]
                elif isinstance(made := eval(call, names), torch.nn.Module):
                    names["model"] = made
            logits.append(names.get("logits", names["model"](**batches()[0]).logits))
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4, msg=f"{cells}")


def adapted_by(module: Any, model: Any, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(model, adapter) if module is peft else load_adapter(model, adapter)
