"""Inits that read data, against PEFT: the same start from the same batches, and the same ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn

from lightning_lora import LoRAConfig, apply_lora, initialize_from_data, load_adapter, lora_layers, save_adapter
from lightning_lora.inits.eva import InputComponents
from tests.parity.models import DEPRECATED_BY_PEFT, base, batch, close, logits, read_by_peft

pytestmark = [
    pytest.mark.filterwarnings(DEPRECATED_BY_PEFT),
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]
TARGETS = {"llama": ["q_proj", "o_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}  # each reads an input of its own
RANK = 8  # so that randomized decompositions of matrices as small as these are exact


def masked(name: str) -> dict[str, Tensor]:
    """A batch with padding, and with labels for some of the tokens only."""
    found = {**batch(name)}
    found["attention_mask"] = torch.ones_like(found["input_ids"])
    found["attention_mask"][0, -3:] = 0
    found["labels"] = found["input_ids"].clone()
    found["labels"][:, :2] = -100
    return found


def ours(name: str, batches: list[Any], rank: int = RANK, **fields: Any) -> nn.Module:
    config = LoRAConfig(rank=rank, alpha=6, target_modules=TARGETS[name], modules_to_save=[], **fields)
    return initialize_from_data(apply_lora(base(name), config), batches)


def layers_of_peft(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    found = {fqn.removeprefix("base_model.model."): m for fqn, m in model.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}
    return {
        fqn: (m.lora_A["default"].weight.detach(), m.lora_B["default"].weight.detach(), m.scaling["default"]) for fqn, m in found.items()
    }


def assert_same_start(mine: nn.Module, theirs: nn.Module, tolerance: float, of_B: dict[str, float] | None = None) -> None:
    """A and B are PEFT's, up to the signs of their rows and columns."""
    layers = dict(lora_layers(mine))
    wanted = layers_of_peft(theirs)
    assert layers.keys() == wanted.keys()
    for fqn, (A, B, scaling) in wanted.items():
        layer, B = layers[fqn], B * (of_B or {}).get(fqn, 1)
        assert layer.scaling == pytest.approx(scaling) and layer.rank == len(A), fqn
        signs = [(layer.lora_A.detach() * A).sum(1).sign()[:, None], (layer.lora_B.detach() * B).sum(0).sign()]
        for found, value, sign in ((layer.lora_A, A, signs[0]), (layer.lora_B, B, signs[1])):
            found = found * sign
            torch.testing.assert_close(found.detach(), value, rtol=0, atol=tolerance * float(value.abs().max().clamp_min(1e-9)), msg=fqn)


@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_eva(name: str, rho: float, tmp_path: Path) -> None:
    fields = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=rho), "fan_in_fan_out": name == "gpt2"}
    rank = 2 * RANK if rho == 1 else RANK  # of both, 16 components at the most
    theirs = get_peft_model(base(name), LoraConfig(r=rank, lora_alpha=6, target_modules=TARGETS[name], **fields))
    initialize_lora_eva_weights(theirs, dataloader=[masked(name)], show_progress_bar=False)
    mine = ours(name, [masked(name)], rank, init="eva", init_options={"rho": rho})
    assert_same_start(mine, theirs, 2e-3)
    ranks = {fqn: layer.rank for fqn, layer in lora_layers(mine)}
    assert (len({*ranks.values()}) > 1) == (rho > 1 and name == "llama") and sum(ranks.values()) == rank * len(ranks)
    assert torch.equal(logits(mine, name), logits(base(name), name))
    with torch.no_grad():
        for parameter in [p for model in (mine, theirs) for key, p in model.named_parameters() if "lora_B" in key]:
            parameter.add_(0.05)
    theirs.save_pretrained(tmp_path / "theirs")
    close(logits(load_adapter(base(name), tmp_path / "theirs"), name), logits(theirs.eval(), name))
    read = read_by_peft(base(name), save_adapter(mine, tmp_path / "mine"))
    close(logits(read, name), logits(mine, name))
    assert sorted(read.peft_config["default"].rank_pattern.values()) == sorted(r for r in ranks.values() if r != rank)


@pytest.mark.parametrize("fields", [{"init_lora_weights": "loftq"}, {"init_lora_weights": True, "loftq_config": {"loftq_bits": 4}}])
def test_pefts_folders_of_loftq_are_refused_with_the_reason(fields: dict[str, Any], tmp_path: Path) -> None:
    """They belong to a base that only PEFT's run had."""
    get_peft_model(base("llama"), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=r"base (that was )?changed at the start"):
        load_adapter(base("llama"), tmp_path)


def test_eva_over_several_batches_is_pefts_incremental_pca() -> None:
    """PEFT repeats the batches until nothing changes, and stops layer by layer; its decomposition is the same step."""
    layer = apply_lora(nn.Sequential(nn.Linear(20, 30)).double(), LoRAConfig(rank=5, init="eva", target_modules=["0"]))[0]
    pca, mine = IncrementalPCA(n_components=10), InputComponents(layer)
    torch.manual_seed(1)
    for rows in (12, 30, 14):
        x = torch.randn(rows, 20, dtype=torch.float64) * torch.linspace(1, 3, 20) + torch.linspace(-2, 2, 20)
        pca.partial_fit(x)
        mine.take(x)
    assert mine.found is not None
    torch.testing.assert_close(mine.found.S, pca.singular_values_, rtol=1e-10, atol=0)
    torch.testing.assert_close(mine.found.S.square() / mine.found.spread, pca.explained_variance_ratio_, rtol=1e-10, atol=0)
    A, B = mine.factors(10)
    torch.testing.assert_close(A * (A * pca.components_).sum(1).sign()[:, None], pca.components_, rtol=0, atol=1e-10)
    assert not B.any()


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_corda(name: str, mode: str, tmp_path: Path) -> None:
    batches = [{"input_ids": batch(name, seed)["input_ids"][:1]} for seed in range(3)]  # PEFT takes one row at a time
    config = LoraConfig(
        r=RANK,
        lora_alpha=6,
        target_modules=TARGETS[name],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
        fan_in_fan_out=name == "gpt2",
    )
    model = base(name)
    preprocess_corda(model, config, run_model=lambda: [model(**each) for each in batches] and None)
    theirs = get_peft_model(model, config)
    mine = ours(name, batches, init="corda", init_options={"mode": mode})
    assert_same_product(mine, theirs, 2e-3)
    assert torch.equal(logits(mine, name), logits(base(name), name))
    _refused_as_pefts_own(theirs, name, "corda", tmp_path)
    _trained_and_read_by_peft(mine, name, tmp_path)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora_ga(name: str, direction: str, tmp_path: Path) -> None:
    batches = [batch(name, seed) for seed in range(2)]
    config = LoraConfig(
        r=RANK,
        lora_alpha=6,
        target_modules=TARGETS[name],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction=direction, scale="stable", stable_gamma=9),
        fan_in_fan_out=name == "gpt2",
    )
    model = base(name)

    def train_step() -> None:
        for each in batches:
            model(**each).loss.backward()

    preprocess_loraga(model, config, train_step)
    theirs = get_peft_model(model, config)
    options = {"direction": direction, "scale": "singular_values", "gamma": 9}
    mine = ours(name, batches, init="lora_ga", init_options=options)
    # PEFT takes the first size of GPT-2's weights, which are stored transposed, for the number of outputs.
    of_B = {fqn: (layer.lora_B.shape[0] / layer.weight.shape[0]) ** 0.25 for fqn, layer in lora_layers(mine)}
    assert_same_start(mine, theirs, 2e-3, of_B)  # B·A depends on the signs: A and B have different vectors
    assert torch.equal(logits(mine, name), logits(base(name), name))
    _refused_as_pefts_own(theirs, name, "lora_ga", tmp_path)
    _trained_and_read_by_peft(mine, name, tmp_path)


def assert_same_product(mine: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    """B·A is PEFT's; A and B themselves have signs of their own."""
    layers, wanted = dict(lora_layers(mine)), layers_of_peft(theirs)
    assert layers.keys() == wanted.keys()
    for fqn, (A, B, _) in wanted.items():
        found = (layers[fqn].lora_B @ layers[fqn].lora_A).detach()
        assert (found - B @ A).norm() <= tolerance * (B @ A).norm(), fqn
        torch.testing.assert_close(layers[fqn].lora_A.norm(), A.norm(), rtol=tolerance, atol=0, msg=fqn)


def _refused_as_pefts_own(theirs: nn.Module, name: str, init: str, folder: Path) -> None:
    theirs.save_pretrained(folder / "theirs")
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' trains on a base changed at the start"):
        load_adapter(base(name), folder / "theirs")


def _trained_and_read_by_peft(model: nn.Module, name: str, folder: Path) -> None:
    """The base stays, so the folder is plain LoRA of twice the rank."""
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.add_(0.02)
    after = logits(model, name)
    assert (after - logits(base(name), name)).abs().max() > 1e-2
    read = read_by_peft(base(name), save_adapter(model, folder / "mine"))
    assert read.peft_config["default"].r == 2 * RANK
    close(logits(read, name), after)
    close(logits(load_adapter(base(name), folder / "mine"), name), after)
