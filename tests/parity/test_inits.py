"""Inits that take A and B from the weight, against PEFT, which changes the base for them: the same training, and a file that PEFT reads."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lightning_lora import LoRAConfig, apply_lora, load_adapter, save_adapter
from tests.parity.models import DEPRECATED_BY_PEFT, base, batch, close, logits, read_by_peft

pytestmark = pytest.mark.filterwarnings(DEPRECATED_BY_PEFT)
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
STEPS = 4


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize(("name", "init"), [("llama", "pissa"), ("gpt2", "pissa"), ("llama", "olora")])
def test_it_trains_as_pefts_does_and_peft_reads_it(name: str, init: str, scaling: str, tmp_path: Path) -> None:
    rslora = scaling == "rslora"
    ours = apply_lora(base(name), LoRAConfig(rank=4, alpha=6, scaling=scaling, target_modules=TARGETS[name], init=init, modules_to_save=[]))
    fields = {"fan_in_fan_out": name == "gpt2", "use_rslora": rslora, "init_lora_weights": init}
    theirs = get_peft_model(base(name), LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[name], **fields)).eval()
    start = logits(base(name), name)
    assert torch.equal(logits(ours, name), start)
    theirs.save_pretrained(tmp_path / "start")
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(**batch(name)).loss.backward()
            optimizer.step()
    after = logits(ours, name)
    assert (after - start).abs().max() > 1e-2
    close(after, logits(theirs, name), 2e-5)  # the base that PEFT changed is rounded to float32

    read = read_by_peft(base(name), save_adapter(ours, tmp_path / "ours"))
    assert read.peft_config["default"].r == 8
    close(logits(read, name), after)

    # PEFT's own conversion is the same adapter.
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    close(logits(load_adapter(base(name), tmp_path / "converted"), name), after, 2e-5)


@pytest.mark.parametrize("init", ["orthogonal", "mica", "gaussian"])
def test_what_leaves_the_base_alone_in_peft_is_read(init: str, tmp_path: Path) -> None:
    other = get_peft_model(base("llama"), LoraConfig(r=4, target_modules=TARGETS["llama"], init_lora_weights=init)).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    other.save_pretrained(tmp_path)
    close(logits(load_adapter(base("llama"), tmp_path), "llama"), logits(other, "llama"))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_what_changed_the_base_in_peft_is_refused(init: str, tmp_path: Path) -> None:
    other = get_peft_model(base("llama"), LoraConfig(r=4, target_modules=TARGETS["llama"], init_lora_weights=init))
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' trains on a base changed at the start"):
        load_adapter(base("llama"), tmp_path)


def test_mica_trains_as_pefts_does(tmp_path: Path) -> None:
    ours = apply_lora(base("llama"), LoRAConfig(rank=4, alpha=6, target_modules=TARGETS["llama"], init="mica", modules_to_save=[]))
    theirs = get_peft_model(base("llama"), LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS["llama"], init_lora_weights="mica")).eval()
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(**batch("llama")).loss.backward()
            optimizer.step()
    after = logits(ours, "llama")
    assert (after - logits(base("llama"), "llama")).abs().max() > 1e-3
    close(after, logits(theirs, "llama"), 2e-5)
    close(logits(read_by_peft(base("llama"), save_adapter(ours, tmp_path / "ours")), "llama"), after)
