"""LoRACallback on models with more than adapters: Hugging Face models, new heads, frozen teachers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, unload_lora
from tests.callbacks.lora_runs import checkpoint_in, fit
from tests.lit import CONFIG, LitNet, bits, make_net

# Lightning's advice to resume with the same callbacks and folder, which these tests do otherwise on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed", "ignore:Checkpoint directory"
)


# Hugging Face models.


@pytest.fixture
def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3)
    return BertForSequenceClassification(config)


class LitBert(LitNet):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model  # type: ignore[assignment]

    def step(self, batch: Any) -> torch.Tensor:
        return self.net(input_ids=batch[0].abs().long().clamp(max=31), labels=batch[1] % 3).loss


def test_a_fresh_classification_head_trains_and_is_kept(tmp_path: Path, bert: nn.Module) -> None:
    config = LoRAConfig(rank=2, target_modules=["query", "value"])
    module = LitBert(bert)
    before = bits(module)
    lora = LoRACallback(config, merge_on_fit_end=False)
    fit(tmp_path, module, 1, callbacks=(checkpoint_in(tmp_path),), lora=lora)
    assert "trained in full: net.classifier" in str(lora.report)
    assert not torch.equal(module.net.classifier.weight, before["net.classifier.weight"])
    assert torch.equal(bits(module)["net.bert.pooler.dense.weight"], before["net.bert.pooler.dense.weight"])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {name for name in saved if "lora_" not in name} == {"net.classifier.weight", "net.classifier.bias"}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True, None])
def test_gradient_checkpointing(tmp_path: Path, bert: nn.Module, reentrant: bool | None) -> None:
    if reentrant is not None:
        bert.gradient_checkpointing_enable({"use_reentrant": reentrant})
    module = LitBert(bert)
    torch.manual_seed(1)
    fit(tmp_path, module, 1, lora=LoRACallback(LoRAConfig(rank=2, target_modules=["query", "value"]), merge_on_fit_end=False))
    assert module.net.bert.encoder.layer[0].attention.self.query.lora_B.abs().sum() > 0


@pytest.mark.parametrize("refused", [False, True])
def test_the_model_around_an_adapted_part_does_not_save_it_as_the_base(tmp_path: Path, bert: nn.Module, refused: bool) -> None:
    module = LitBert(bert)
    lora = LoRACallback(LoRAConfig(rank=2, target_modules=["query", "value"]), module="net.bert", merge_on_fit_end=False)
    if refused:  # once the module has been adapted
        other = LoRACallback(LoRAConfig(rank=2, target_modules=["nowhere"]), module="net.classifier")
        with pytest.raises(ValueError, match="nowhere"):
            fit(tmp_path, module, callbacks=(other,), lora=lora)
        assert not any("save_pretrained" in part.__dict__ for part in module.modules())
        return
    fit(tmp_path, module, 1, lora=lora)
    with pytest.raises(ValueError, match=r"save_pretrained.*'bert\.encoder.*adapters that are not merged"):
        module.net.save_pretrained(tmp_path / "out")
    unload_lora(module)
    assert not any("save_pretrained" in part.__dict__ for part in module.modules())


# What LoRA freezes beside what it adapts.


class Distilled(LitNet):
    """A student that learns a frozen teacher's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = make_net().requires_grad_(False)
        self.teacher.fc1.weight.mul_(2)

    def step(self, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), self.teacher(batch[0]) + 1)


def test_a_frozen_teacher_is_not_adapted(tmp_path: Path) -> None:
    module = Distilled()
    before = bits(module)
    with pytest.raises(ValueError, match=r"in 'teacher', which is frozen as a whole, and 'net.fc1', which trains: .*module='net'"):
        fit(tmp_path, module)
    assert all(torch.equal(value, before[name]) for name, value in bits(module).items())
    fit(tmp_path, module, lora=LoRACallback(CONFIG, module="net"))
    assert all(torch.equal(p, before[f"teacher.{name}"]) for name, p in module.teacher.named_parameters())


class Headed(LitNet):
    """A network that is adapted, a new head and a parameter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.temperature = nn.Linear(4, 4), nn.Parameter(torch.ones(()))

    def step(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.net(batch[0])) * self.temperature, batch[1])


def test_a_new_head_that_stays_random_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("lightning.pytorch").propagate = True
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"), pytest.warns(UserWarning, match="LoRA freezes"):
        fit(tmp_path, Headed(), 1)
    assert "frozen, without an adapter: temperature, head\n" in caplog.text


def test_a_new_head_that_stays_random_is_told_at_the_start(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    def moved(module: Headed, **fields: Any) -> set[str]:
        before = bits(module)
        config = LoRAConfig(rank=2, alpha=4, target_modules=["fc1", "fc2"], **fields)
        fit(tmp_path, module, lora=LoRACallback(config, module=part, merge_on_fit_end=False))
        return {name.partition(".")[0] for name, value in bits(module).items() if name in before and not torch.equal(value, before[name])}

    part = None
    with pytest.warns(UserWarning, match=r"LoRA freezes what has no adapter: temperature, head\. .*LoRACallback\(module=\.\.\.\)"):
        assert moved(Headed()) == {"net"}  # its running statistics
    with pytest.warns(UserWarning, match="LoRA freezes what has no adapter: temperature\\."):
        assert moved(Headed(), modules_to_save=["head"]) == {"net", "head"}
    module = Headed()  # what is frozen already needs no word
    module.head.requires_grad_(False)
    module.temperature.requires_grad_(False)
    recwarn.clear()
    assert moved(module) == {"net"}
    assert moved(Headed(), modules_to_save=[]) == {"net"}
    part = "net"
    assert moved(Headed()) == {"net", "head", "temperature"}
    assert not [w for w in recwarn if "LoRA freezes" in str(w.message)]


def test_the_new_head_inside_a_vision_model_is_told_too(tmp_path: Path) -> None:
    """Models of timm and torchvision have it beside their blocks, which are adapted, under a name that no other child of theirs has."""

    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.fc = nn.ModuleDict({"attn": nn.Linear(8, 8), "fc": nn.Linear(8, 8)}), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.features["fc"](self.features["attn"](x)))

    Vision.__module__ = "timm.models.tiny"
    module = LitNet()
    module.net = Vision()  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"LoRA freezes what has no adapter: net\.fc\. "):
        fit(tmp_path, module, 1, lora=LoRACallback(LoRAConfig(rank=2, target_modules=["attn"]), merge_on_fit_end=False))
