"""A refused call leaves the module as it was; what looks odd but is right is not refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, unload_lora
from lightning_lora.callbacks import gradient_check
from lightning_lora.callbacks.refusals import check_apart
from lightning_lora.layers import lora_layers
from tests.callbacks.lora_runs import Early
from tests.lit import CONFIG, LitNet, bits, trainer

OTHER = LoRAConfig(rank=4, target_modules=["fc1"])


def snapshot(module: nn.Module) -> Any:
    classes = {
        name: (type(child), sorted(child.__dict__), getattr(child, "merged", None)) for name, child in module.named_modules() if name
    }
    return classes, {name: p.requires_grad for name, p in module.named_parameters()}, bits(module)


def same(mine: Any, theirs: Any) -> None:
    assert mine[:2] == theirs[:2]
    assert all(torch.equal(value, theirs[2][name]) for name, value in mine[2].items())


def fit(folder: Path, module: L.LightningModule, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    run = trainer(folder, *(callbacks or (LoRACallback(CONFIG),)), max_epochs=1, limit_val_batches=0, **kwargs)
    run.fit(module)
    return run


class Outside(LitNet):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([*self.parameters(), nn.Parameter(torch.zeros(3))], lr=1e-2)


@pytest.mark.parametrize(
    "cls, lora, message",
    [
        (Early, LoRACallback(CONFIG), "in no optimizer"),
        (Outside, LoRACallback(CONFIG), "not part of Outside; it could not be resumed"),
        (LitNet, LoRACallback(CONFIG, module="nett"), "is no submodule"),
        (LitNet, LoRACallback(LoRAConfig(target_modules=["fc9"])), "fc9"),
    ],
    ids=["optimizer built too early", "parameter outside the module", "no such submodule", "no such target"],
)
def test_a_fit_that_is_refused_changes_nothing(tmp_path: Path, cls: type[LitNet], lora: LoRACallback, message: str) -> None:
    module = cls()
    before = snapshot(module)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, lora)
    same(snapshot(module), before)


@pytest.mark.parametrize("merge", [False, True])
def test_another_config_is_refused_and_changes_nothing(tmp_path: Path, merge: bool) -> None:
    module = LitNet()
    fit(tmp_path, module, LoRACallback(CONFIG, merge_on_fit_end=merge))
    before = snapshot(module)
    with pytest.raises(ValueError, match=r"another LoRA config \(rank: 2 != 4.*unload_lora\(model, merged='keep'\)"):
        fit(tmp_path, module, LoRACallback(OTHER))
    same(snapshot(module), before)


def test_a_checkpoint_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    module = LitNet()
    fit(tmp_path, module, LoRACallback(OTHER)).save_checkpoint(tmp_path / "other.ckpt")
    merged = LitNet()
    fit(tmp_path, merged)
    for module in (LitNet(), merged):
        before = snapshot(module)
        for stage in ("fit", "test"):
            with pytest.raises(ValueError, match="was made with another LoRA config"):
                getattr(trainer(tmp_path, LoRACallback(CONFIG), max_epochs=1), stage)(module, ckpt_path=tmp_path / "other.ckpt")
            same(snapshot(module), before)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_whose_shapes_do_not_fit_changes_nothing(stage: str, tmp_path: Path) -> None:
    """That is found last, when the module is unmerged already."""
    module = LitNet()
    run = fit(tmp_path, module)
    run.save_checkpoint(tmp_path / "good.ckpt")
    checkpoint = torch.load(tmp_path / "good.ckpt", weights_only=True)
    checkpoint["state_dict"]["net.fc2.lora_A"] = torch.zeros(2, 5)
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    before = snapshot(module)
    assert all(layer.merged for _, layer in lora_layers(module))
    with pytest.raises(ValueError, match=r"net\.fc2\.lora_A has shape \(2, 5\) in the checkpoint"):
        getattr(trainer(tmp_path, LoRACallback(CONFIG), max_epochs=2), stage)(module, ckpt_path=tmp_path / "bad.ckpt")
    same(snapshot(module), before)


def test_trials_on_one_base_and_stages_on_each_other(tmp_path: Path) -> None:
    module = LitNet()
    base = bits(module.net)
    fit(tmp_path, module)
    unload_lora(module, merged="drop")
    assert all(torch.equal(p, base[name]) for name, p in module.net.named_parameters())
    fit(tmp_path, module, LoRACallback(OTHER))  # the next trial
    first = module.net.fc1.weight.detach().clone()
    unload_lora(module, merged="keep")
    assert torch.equal(module.net.fc1.weight, first) and type(module.net.fc1) is nn.Linear
    fit(tmp_path, module, LoRACallback(CONFIG, merge_on_fit_end=False))  # the next stage
    assert torch.equal(module.net.fc1.weight, first)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated", "ignore:`torch.jit.trace_method` is deprecated")
def test_merged_layers_give_their_plain_class_back(tmp_path: Path) -> None:
    module = LitNet()
    fit(tmp_path, module)
    net, x = unload_lora(module.net, merged="keep").eval(), torch.randn(4, 8)
    assert torch.equal(torch.jit.trace(net, x)(x), net(x))
    assert [type(child) for child in net.modules()] == [type(child) for child in LitNet().net.modules()]  # what quantize_dynamic goes by


# Two callbacks.


class Towers(LitNet):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.text, self.image = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 4))

    def step(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.image(self.text(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for n, p in self.named_parameters() if "net" not in n and p.requires_grad], lr=1e-2)


def both(rank: int = 2, **kwargs: Any) -> list[LoRACallback]:
    text = LoRACallback(LoRAConfig(rank=rank, target_modules=["0"]), module="text", lora_plus_ratio=16.0, **kwargs)
    return [text, LoRACallback(LoRAConfig(rank=3, target_modules=["0"]), module="image", **kwargs)]


def test_two_callbacks_count_side_by_side(tmp_path: Path) -> None:
    module = Towers()
    run = fit(tmp_path, module, *both(merge_on_fit_end=False))
    rates = {id(p): group["lr"] for group in run.optimizers[0].param_groups for p in group["params"]}
    assert rates[id(module.text[0].lora_B)] == pytest.approx(0.16) and rates[id(module.image[0].lora_B)] == 0.01
    run.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)["state_dict"]
    assert {name for name in saved if "lora" in name} == {f"{t}.0.lora_{f}" for t in ("text", "image") for f in "AB"}
    assert not saved.keys() & {"text.0.weight", "image.0.weight"}
    fresh = Towers()
    trainer(tmp_path, *both()).test(fresh, ckpt_path=tmp_path / "two.ckpt", verbose=False)
    assert torch.equal(fresh.text[0].lora_B, module.text[0].lora_B) and torch.equal(fresh.image[0].lora_B, module.image[0].lora_B)
    for callbacks, cls, message in (
        (both(rank=4), Towers, "another LoRA config .*rank: 2 != 4"),
        (both(), lambda: Towers(7), "trained on another base"),
        (both()[:1], Towers, r"has adapters on \['image', 'text'\], here they are on \['text'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, *callbacks).test(cls(), ckpt_path=tmp_path / "two.ckpt", verbose=False)
    fit(tmp_path, module, *both())
    assert module.text[0].merged and module.image[0].merged


def test_two_callbacks_on_the_same_part_are_refused() -> None:
    check_apart("text", ["image", "text2"])
    for mine, other in ((None, "text"), ("text", "text"), ("text.deep", "text"), (None, None)):
        with pytest.raises(ValueError, match="these parts overlap"):
            check_apart(mine, [other])


# Optimizers, dropout, averages, parts that are used now and then.


class Counting(torch.optim.SGD):
    """Keeps a number in its state that is of no parameter, as SPAM does."""

    def step(self, closure: Any = None) -> Any:
        self.state["total_step"] = self.state.get("total_step", 0) + 1
        return super().step(closure)


def test_optimizer_state_that_is_of_no_parameter_is_saved(tmp_path: Path) -> None:
    class Lit(LitNet):
        def configure_optimizers(self) -> Any:
            return Counting(self.parameters(), lr=1e-2, momentum=0.9)

    fit(tmp_path, Lit()).save_checkpoint(tmp_path / "a.ckpt")
    run = trainer(tmp_path, LoRACallback(CONFIG), max_epochs=2, limit_val_batches=0)
    run.fit(Lit(), ckpt_path=tmp_path / "a.ckpt")
    assert run.optimizers[0].state["total_step"] == 8


@pytest.mark.filterwarnings("ignore:Found 5 module")
def test_dropout_acts_on_a_model_in_evaluation_mode(tmp_path: Path) -> None:
    module = LitNet()
    module.net.eval()
    seen = []

    class See(L.Callback):
        def on_train_batch_start(self, run: Any, module: Any, *args: Any) -> None:
            seen.append(([layer.dropout_now() for _, layer in lora_layers(module)], module.net.norm.training))

    config = LoRAConfig(rank=2, dropout=0.5, target_modules=["fc1", "fc2"])
    trainer(tmp_path, LoRACallback(config), See(), max_epochs=2).fit(module)
    assert seen == [([0.5, 0.5], False)] * 8


@pytest.mark.parametrize("first", [False, True])
def test_stochastic_weight_averaging_is_refused_in_either_order(tmp_path: Path, first: bool) -> None:
    pair = [StochasticWeightAveraging(1e-2), LoRACallback(CONFIG)]
    with pytest.raises(ValueError, match="StochasticWeightAveraging copies the whole model"):
        fit(tmp_path, LitNet(), *(pair if first else pair[::-1]))


class NowAndThen(LitNet):
    """Every other batch goes through the second layer alone."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx % 2:
            return super().training_step(batch, batch_idx)
        return self.net.fc2(torch.ones(1, 32)).sum()


def test_parts_that_are_used_now_and_then_are_no_false_alarm(tmp_path: Path) -> None:
    fit(tmp_path, NowAndThen())


def test_layers_without_a_gradient_are_named_by_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_check, "BATCHES", 3)
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2), "v": nn.Linear(2, 2)}) for _ in range(4))})
    apply_lora(model, config=LoRAConfig(rank=1, target_modules=["q", "v"]))
    check = gradient_check.GradientCheck(model)
    for layer in model["layers"][:3]:
        layer["v"](torch.ones(1, 2)).sum().backward()
    for _ in range(2):
        check.after_backward()
        check.after_batch()
    check.after_backward()
    with pytest.raises(RuntimeError) as error:
        check.after_batch()
    text = str(error.value)
    assert "5 of 8 adapted layers got no gradient in 3 batches: layers.*.q (4 layers), layers.3.v." in text
    assert repr([r"layers\.\d+\.q", "layers.3.v"]) in text
    left = LoRAConfig(rank=1, target_modules=["q", "v"], exclude_modules=[r"layers\.\d+\.q", "layers.3.v"])
    fresh = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2), "v": nn.Linear(2, 2)}) for _ in range(4))})
    assert [name for name, _ in lora_layers(apply_lora(fresh, config=left))] == [f"layers.{i}.v" for i in range(3)]


def pruning(module: LitNet, *names: str, **options: Any) -> ModelPruning:
    chosen = [(module.net.get_submodule(name), "weight") for name in names]  # type: ignore[union-attr]
    return ModelPruning("l1_unstructured", chosen or None, amount=0.25, use_lottery_ticket_hypothesis=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("names", [["fc1"], []], ids=["chosen", "all"])
def test_pruning_that_leaves_its_masks_on_adapted_weights_is_refused_at_the_start(tmp_path: Path, names: list[str], first: bool) -> None:
    """It was refused by the merge, after all training. Whichever callback comes first."""
    module = LitNet()
    before = snapshot(module)
    callbacks = [LoRACallback(CONFIG), pruning(module, *names, make_pruning_permanent=False)][:: 1 if first else -1]
    with pytest.raises(ValueError, match=r"make_pruning_permanent=False\) leaves a mask on net\.fc1\.weight, so it cannot be merged"):
        fit(tmp_path, module, *callbacks)
    same(snapshot(module), before)


class OthersOnly(ModelPruning):
    def filter_parameters_to_prune(self, parameters_to_prune: Any = ()) -> Any:
        return [(owner, name) for owner, name in parameters_to_prune if getattr(owner, "in_features", 0) == 8 and name == "weight"]


def test_pruning_that_filters_its_choice_goes_on(tmp_path: Path) -> None:
    module = LitNet()
    others = OthersOnly("l1_unstructured", amount=0.25, use_lottery_ticket_hypothesis=False, make_pruning_permanent=False)
    fit(tmp_path, module, LoRACallback(CONFIG), others)
    assert all(layer.merged for _, layer in lora_layers(module))


@pytest.mark.parametrize(
    ("names", "permanent", "merge"), [(["embed"], False, True), (["fc1"], True, True), (["fc1"], False, False)], ids=str
)
def test_other_pruning_goes_on(tmp_path: Path, names: list[str], permanent: bool, merge: bool) -> None:
    module = LitNet()
    lora = LoRACallback(CONFIG, merge_on_fit_end=merge, check_gradients=False)
    fit(tmp_path, module, lora, pruning(module, *names, make_pruning_permanent=permanent))
    assert all(layer.merged == merge for _, layer in lora_layers(module))
