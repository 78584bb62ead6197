"""Preconditioners in training: LoRA-FA's as PEFT's optimizer, both in every loop of Lightning's, resumed exactly, refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from peft.optimizers import create_lorafa_optimizer
from torch import Tensor, nn

from lightning_lora import AdaLoRACallback, LoRACallback, LoRAConfig, apply_lora, apply_preconditioner, get_lora_parameters, load_adapter
from lightning_lora.optim import lora_param_groups
from tests.conftest import TinyModel, fill, same_bits, snapshot
from tests.lit import CONFIG, LitNet, bits, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory")
FIELDS: dict[str, Any] = {"rank": 3, "alpha": 5, "target_modules": ["q_proj", "v_proj", "mlp"]}


def test_lora_fa_is_pefts_optimizer(make: Any, ids: Tensor, tmp_path: Path) -> None:
    """Ten steps of Adam in float64. Without ε, whose place differs between PEFT's Adam and torch's; ranks and scalings differ by layer."""
    theirs = peft.get_peft_model(
        make(TinyModel).double(),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=FIELDS["target_modules"], rank_pattern={"mlp": 2}, use_rslora=True),
        autocast_adapter_dtype=False,
    )
    torch.manual_seed(5)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(make(TinyModel).double(), tmp_path)
    for name, p in ours.named_parameters():
        if name.endswith("lora_A"):
            p.requires_grad_(False)
    B = [p for p in ours.parameters() if p.requires_grad]
    mine: Any = torch.optim.Adam(B, lr=1e-3, eps=0.0)
    apply_preconditioner(mine, ours, "lora_fa")
    other: Any = create_lorafa_optimizer(theirs, r=3, lora_alpha=5, lr=1e-3)
    other.param_groups[0]["eps"] = 0.0
    start = [p.detach().clone() for p in B]
    for _ in range(10):
        for model, optimizer in ((ours, mine), (theirs, other)):
            optimizer.zero_grad()
            model(ids).square().mean().backward()
            optimizer.step()
    there = {name.removeprefix("base_model.model.").replace(".default.weight", ""): p for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(p, there[name], rtol=0, atol=1e-10, msg=name)
    assert all((p - before).abs().max() > 5e-3 for p, before in zip(B, start, strict=True))


def reference(
    method: str, steps: int, config: LoRAConfig = CONFIG, accumulate: int = 1, clip: float = 0.0, ratio: float = 1.0
) -> nn.Module:
    """A plain loop, its gradients preconditioned by hand."""
    torch.manual_seed(5)
    net = apply_lora(LitNet().net, config=config)
    optimizer = torch.optim.AdamW(lora_param_groups(net, lr=1e-2, weight_decay=0.01, lora_plus_ratio=ratio), eps=1e-3)
    batches = [batch for _ in range(steps) for batch in LitNet().train_dataloader()][: steps * accumulate]
    for index, (x, y) in enumerate(batches):
        (F.cross_entropy(net(x), y) / accumulate).backward()
        if (index + 1) % accumulate:
            continue
        if clip:
            nn.utils.clip_grad_norm_(list(get_lora_parameters(net)), clip)
        for layer in (net.fc1, net.fc2):
            A, B, eye = layer.lora_A.double(), layer.lora_B.double(), torch.eye(2, dtype=torch.float64)
            if method == "riemannian":
                layer.lora_A.grad = torch.linalg.solve(B.T @ B + 1e-6 * eye, layer.lora_A.grad.double()).float()
            scale = 1 if method == "riemannian" else layer.scaling**-2
            layer.lora_B.grad = (scale * layer.lora_B.grad.double() @ torch.linalg.inv(A @ A.T + 1e-6 * eye)).float()
        optimizer.step()
        optimizer.zero_grad()
    return net


class Lit(LitNet):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(list(get_lora_parameters(self)), lr=1e-2, weight_decay=0.01, eps=1e-3)


class Manual(Lit):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.step(batch))
        self.optimizers().step()
        self.optimizers().zero_grad()


class Two(Manual):
    """An optimizer per layer, both stepped after one backward pass."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(list(layer.parameters()), lr=1e-2, weight_decay=0.01, eps=1e-3) for layer in (self.net.fc1, self.net.fc2)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.step(batch))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


def fit(folder: Path, module: LitNet, *more: Any, method: str | None = "riemannian", config: LoRAConfig = CONFIG, **options: Any) -> Any:
    torch.manual_seed(5)
    ratio, ckpt = options.pop("ratio", 1.0), options.pop("ckpt", None)
    callback = LoRACallback(config, merge_on_fit_end=False, precondition=method, lora_plus_ratio=ratio)  # type: ignore[arg-type]
    run = trainer(folder, callback, *more, **options)
    run.fit(module, ckpt_path=ckpt)
    return run


@pytest.mark.parametrize(
    ("case", "make", "options", "by_hand"),
    [
        ("plain", Lit, {}, {}),
        ("clipped first", Lit, {"gradient_clip_val": 0.05}, {"clip": 0.05}),
        ("accumulated", Lit, {"accumulate_grad_batches": 2}, {"accumulate": 2}),
        ("manual", Manual, {}, {}),
        ("two optimizers", Two, {}, {}),
        ("LoRA+", Lit, {"ratio": 4.0}, {"ratio": 4.0}),
    ],
)
def test_every_loop_is_the_plain_one(tmp_path: Path, case: str, make: Any, options: dict[str, Any], by_hand: dict[str, Any]) -> None:
    module = make()
    fit(tmp_path, module, max_epochs=1, **options)
    net = reference("riemannian", 4 // by_hand.get("accumulate", 1), **by_hand)
    for (name, mine), (_, theirs) in zip(module.net.named_parameters(), net.named_parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5, msg=name)


def test_lora_fas_is_the_plain_loop_too(tmp_path: Path) -> None:
    config = LoRAConfig(**{**CONFIG.to_dict(), "variant": "lora_fa"})
    module = Lit()
    fit(tmp_path, module, method="lora_fa", config=config, max_epochs=1)
    net = reference("lora_fa", 4, config)
    for (name, mine), (_, theirs) in zip(module.net.named_parameters(), net.named_parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5, msg=name)


def test_under_a_gradient_scaler_gradients_are_unscaled_first(tmp_path: Path) -> None:
    """As 16-mixed without its scale: a preconditioned gradient of scaled ones would be clipped, and the moments 1,024 times as large."""
    steps = []
    for scale in (1.0, 1024.0):
        module = Lit()
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000))
        run = fit(tmp_path, module, plugins=[plugin], max_epochs=1, gradient_clip_val=0.5)
        moments = [state["exp_avg_sq"].sqrt() for state in run.optimizers[0].state.values()]
        steps.append((moments, [p.detach().clone() for p in get_lora_parameters(module)]))
    for mine, theirs in zip(*steps, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=1e-3 * b.abs().max().item())


def test_a_resumed_run_is_exact_and_another_method_is_refused(tmp_path: Path) -> None:
    whole, half, rest = Lit(), Lit(), Lit()
    fit(tmp_path, whole, max_epochs=4)
    save = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
    fit(tmp_path, half, save, max_epochs=2)
    last = tmp_path / "last.ckpt"
    fit(tmp_path, rest, max_epochs=4, ckpt=last)
    assert half.losses + rest.losses == whole.losses
    assert all(same_bits(tensor, bits(rest)[name]) for name, tensor in bits(whole).items())
    with pytest.raises(ValueError, match="precondition is 'riemannian' in the checkpoint, None here"):
        fit(tmp_path, Lit(), method=None, max_epochs=4, ckpt=last)


def test_a_module_that_keeps_its_optimizer_is_preconditioned_once(tmp_path: Path) -> None:
    class Keeps(Lit):
        kept: Any = None

        def configure_optimizers(self) -> Any:
            self.kept = self.kept or super().configure_optimizers()
            return self.kept

    module = Keeps()
    run = fit(tmp_path, module, max_epochs=1)
    hooks = len(module.kept._optimizer_step_pre_hooks)
    run.fit_loop.max_epochs = 2
    run.fit(module)
    assert len(module.kept._optimizer_step_pre_hooks) == hooks == 1
    with pytest.raises(ValueError, match="AdamW has another preconditioner for these adapters"):
        apply_preconditioner(module.kept, module, "riemannian", damping=1e-3)


def test_parts_of_a_module_have_methods_of_their_own(tmp_path: Path) -> None:
    """Two callbacks, one optimizer; the second part's B is frozen, by its init."""
    module = Lit()
    configs = {"net.fc1": LoRAConfig(rank=2, target_modules=["0"]), "net.fc2": LoRAConfig(rank=2, target_modules=["0"], init="mica")}
    with torch.random.fork_rng():
        module.net.fc1, module.net.fc2 = nn.Sequential(module.net.fc1), nn.Sequential(module.net.fc2)  # type: ignore[union-attr]
    methods: dict[str, Any] = {"net.fc1": "riemannian", "net.fc2": "lora_fa"}
    callbacks = [LoRACallback(configs[m], module=m, precondition=methods[m], merge_on_fit_end=False) for m in configs]
    seen: dict[str, Tensor] = {}

    class Watching(Lit):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.update({name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None})

    module.__class__ = Watching
    run = trainer(tmp_path, *callbacks, max_steps=1)
    run.fit(module)
    one, two = module.net.fc1[0], module.net.fc2[0]  # type: ignore[union-attr,index]
    state = run.optimizers[0].state
    B, eye = two.lora_B.detach().double(), torch.eye(2, dtype=torch.float64)
    taken = {p: state[p]["exp_avg"].double() / 0.1 for p in (one.lora_B, two.lora_A)}  # the gradient of the first step
    expected = two.scaling**-2 * torch.linalg.solve(B.T @ B + 1e-8 * eye, seen["net.fc2.0.lora_A"].double())
    torch.testing.assert_close(taken[two.lora_A], expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(taken[one.lora_B], seen["net.fc1.0.lora_B"].double(), rtol=0.1)


def test_doras_magnitudes_and_heads_keep_their_gradients(make: Any, ids: Tensor) -> None:
    steps = []
    for method in (None, "riemannian"):
        model = fill(apply_lora(make(TinyModel), config=LoRAConfig(**FIELDS, variant="dora", modules_to_save=["lm_head"])))
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        if method is not None:
            apply_preconditioner(optimizer, model, method)
        model(ids).square().mean().backward()
        optimizer.step()
        steps.append({name: p.detach() - before[name] for name, p in model.named_parameters() if name in before})
    plain, mine = steps
    for name, step in plain.items():
        factor = name.endswith(("lora_A", "lora_B"))
        assert torch.equal(step, mine[name]) != factor, name
    assert any("magnitude" in name for name in plain) and "lm_head.weight" in plain


@pytest.mark.parametrize("variant", ["vera", "lora_xs", "adalora"])
def test_updates_of_another_form_are_refused_by_name(make: Any, variant: str) -> None:
    model = apply_lora(make(TinyModel), config=LoRAConfig(rank=2, target_modules=["q_proj"], variant=variant))
    before = snapshot(model)
    optimizer = torch.optim.SGD(list(get_lora_parameters(model)), lr=1.0)
    with pytest.raises(ValueError, match=rf"updates B·A, and that of 'layers\.0\.attn\.q_proj' is another \(variant='{variant}'\)"):
        apply_preconditioner(optimizer, model, "riemannian")
    assert snapshot(model) == before and not optimizer._optimizer_step_pre_hooks


def test_what_does_not_fit_is_refused(make: Any) -> None:
    model = apply_lora(make(TinyModel), config=LoRAConfig(**FIELDS))
    optimizer = torch.optim.SGD(list(get_lora_parameters(model)), lr=1.0)
    head = torch.optim.SGD([make(TinyModel).lm_head.weight], lr=1.0)
    for error, call in (
        (
            r"precondition='lora_fa' is for a frozen factor, and both of 'layers\.0",
            lambda: apply_preconditioner(optimizer, model, "lora_fa"),
        ),
        (r"precondition='shampoo' is not known; it is None, 'riem", lambda: apply_preconditioner(optimizer, model, "shampoo")),
        (r"SGD holds no A or B of an adapter of TinyModel", lambda: apply_preconditioner(head, model, "riemannian")),
        (r"damping=0: give a finite number > 0", lambda: apply_preconditioner(optimizer, model, "riemannian", damping=0)),
        (r"precondition='shampoo' is not known", lambda: LoRACallback(precondition="shampoo")),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=error):
            call()
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    "callback",
    [
        LoRACallback(CONFIG, precondition="lora_fa"),
        AdaLoRACallback(LoRAConfig(target_modules=["fc1"]), target_rank=2, precondition="riemannian"),
        LoRACallback(LoRAConfig(target_modules=["fc1"], variant="vera"), precondition="riemannian"),
    ],
    ids=["both train", "adalora", "vera"],
)
def test_a_refused_run_leaves_the_module_alone(tmp_path: Path, callback: LoRACallback) -> None:
    module = LitNet()
    before = snapshot(module.net)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precondition="):
        trainer(tmp_path, callback, max_epochs=1).fit(module)
    assert snapshot(module.net) == before  # type: ignore[arg-type]
