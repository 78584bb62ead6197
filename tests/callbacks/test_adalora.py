"""AdaLoRACallback: the right gradients and scores in every mode of the Trainer, resume, shrinking (refusals: test_adalora_refusals.py)."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, load_adapter, save_adapter
from lightning_lora.adapter_io.files import read_adapter
from lightning_lora.layers import LoRALinear, lora_layers
from lightning_lora.variants.rank_allocation import RankAllocator
from tests.callbacks.adalora_runs import adalora, adapters, fit
from tests.lit import LitNet, make_net, trainer
from tests.variants.test_rank_allocation import orthogonality

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory", "ignore:The `srun`")


@pytest.mark.parametrize("merge", [True, False])
def test_a_checkpoint_after_fit_is_of_weights_alone(merge, tmp_path):
    run, module, callback, _ = fit(tmp_path, callback=adalora(merge_on_fit_end=merge))
    with pytest.raises(ValueError, match=r"AdaLoRA shrank the adapters.*weights_only=True.*save_adapter"):
        run.save_checkpoint(tmp_path / "whole.ckpt")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert read_adapter(tmp_path / "weights.ckpt").config.variant == "plain"
    run.fit_loop.max_epochs, callback.total_steps = 8, 16
    run.fit(module)  # it grows again; so do checkpoints during the next fit
    fit(tmp_path, LitNet(), callback, [ModelCheckpoint(tmp_path / "next", filename="a")])
    assert (tmp_path / "next" / "a.ckpt").exists()


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_checkpoint_of_another_base_leaves_the_shrunk_adapters_merged(stage, tmp_path):
    """They grow to their full size before the base is checked."""
    other = LitNet()
    with torch.no_grad():
        other.net.fc1.weight.add_(1)
    for name, module in (("other", other), ("mine", LitNet())):
        run, module, callback, _ = fit(tmp_path, module, extra=[ModelCheckpoint(tmp_path / name, filename="a", save_last=True)])
    before, weights, ranks = adapters(module), {n: p.clone() for n, p in module.named_parameters()}, dict(callback.ranks)
    with pytest.raises(ValueError, match="another base"):
        getattr(run, stage)(module, ckpt_path=tmp_path / "other/a.ckpt")
    after = adapters(module)
    assert all(type(layer).__name__ == "LoRALinear" and layer.merged for _, layer in lora_layers(module))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert all(torch.equal(p, weights[n]) for n, p in module.named_parameters())
    assert callback.config.variant == "plain"
    run.fit_loop.max_epochs = 8
    callback.total_steps = 16  # the schedule is over: the ranks stay
    run.fit(module)  # grows again, and goes on
    assert callback.ranks == ranks


# Against a plain loop with the paper's loss.


def loop(folder, accumulate=1, clip=None, steps=16):
    """What AdaLoRA is: the loss with the regularizer, differentiated by autograd; score and mask after each step."""
    torch.manual_seed(5)
    lit = LitNet()
    apply_lora(lit, LoRAConfig(rank=4, alpha=4, target_modules=["fc1", "fc2"], variant="adalora"))
    allocator = RankAllocator(lit, target_rank=2, total_steps=steps, tinit=2, tfinal=3, deltaT=2, orth_reg_weight=0.0)
    optimizer = torch.optim.AdamW([p for p in lit.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)
    batches = list(lit.train_dataloader()) * 4
    for start in range(0, len(batches), accumulate):
        optimizer.zero_grad()
        losses = [lit.step(batch) for batch in batches[start : start + accumulate]]
        (sum(losses) / accumulate + 0.1 * orthogonality(lit)).backward()
        if clip:
            nn.utils.clip_grad_norm_([p for p in lit.parameters() if p.requires_grad], clip)
        optimizer.step()
        allocator.after_step()
    return adapters(lit), allocator.state_dict()


def same(mine, theirs, atol=2e-6):
    torch.testing.assert_close(mine.adapters, theirs[0], rtol=0, atol=atol)
    assert mine.state["step"] == theirs[1]["step"]
    assert {name: keep.tolist() for name, keep in mine.state["keep"].items()} == {n: keep.tolist() for n, keep in theirs[1]["keep"].items()}


class Scaled(MixedPrecision):
    """16-mixed's loss scaler on a CPU, without its rounding."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=3))

    def autocast_context_manager(self):
        return torch.autocast("cpu", enabled=False)


class Lit(LitNet):
    fused = False

    def configure_optimizers(self):  # with the usual eps Adam makes much of gradients that are rounding noise
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-4, fused=self.fused)


class Fused(Lit):
    fused = True


class Manual(Lit):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.step(batch))
        optimizer.step()


@pytest.mark.parametrize(
    ("module", "kwargs", "reference"),
    [
        pytest.param(Lit, {}, {}, id="plain"),
        pytest.param(Lit, {"accumulate_grad_batches": 2}, {"accumulate": 2, "steps": 8}, id="accumulated"),
        pytest.param(Lit, {"gradient_clip_val": 0.5}, {"clip": 0.5}, id="clipped"),
        pytest.param(Lit, {"plugins": Scaled}, {}, id="loss scaler"),
        pytest.param(Lit, {"plugins": Scaled, "gradient_clip_val": 0.5}, {"clip": 0.5}, id="loss scaler, clipped"),
        pytest.param(Fused, {"plugins": Scaled}, {}, id="loss scaler, fused optimizer"),
        pytest.param(Manual, {}, {}, id="manual optimization"),
    ],
)
def test_trains_as_a_plain_loop_with_the_papers_loss(tmp_path, module, kwargs, reference):
    kwargs = {key: value() if isinstance(value, type) else value for key, value in kwargs.items()}
    _, _, _, trained = fit(tmp_path, module(), **kwargs)
    same(trained, loop(tmp_path, **reference))
    assert trained.state["keep"] and sum(int(keep.sum()) for keep in trained.state["keep"].values()) == 4


class Overflows(Lit):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (float("inf") if self.trainer.global_step == 5 else 1.0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_loss_scaler_skips_counts_for_nothing(tmp_path, fused):
    module = type("Module", (Overflows, Fused) if fused else (Overflows,), {})()
    _, _, callback, trained = fit(tmp_path, module, plugins=Scaled())
    assert callback.allocator.step == 15
    assert all(tensor.isfinite().all() for tensor in trained.adapters.values())
    assert sum(callback.ranks.values()) == 4


# The end of fit.


def test_fit_leaves_plain_lora_of_the_ranks_found(tmp_path):
    _, module, callback, trained = fit(tmp_path, callback=adalora(merge_on_fit_end=False))
    assert {name: int(keep.sum()) for name, keep in trained.state["keep"].items()} == callback.ranks
    assert sum(callback.ranks.values()) == 4
    layers = dict(lora_layers(module))
    assert all(type(layer) is LoRALinear and layer.rank == max(1, callback.ranks[name]) for name, layer in layers.items())
    # What was trained, applied to the base by hand.
    twin = make_net()
    apply_lora(twin, callback.trained_config)
    twin.load_state_dict({name.removeprefix("net."): t for name, t in trained.adapters.items()}, strict=False)
    x = torch.randn(6, 8)
    twin.norm.load_state_dict(module.net.norm.state_dict())
    torch.testing.assert_close(module.net.eval()(x), twin.eval()(x), rtol=1e-5, atol=1e-6)
    save_adapter(module, tmp_path / "adapter")
    other = load_adapter(make_net(), tmp_path / "adapter").eval()
    torch.testing.assert_close(other(x), module.net(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("merge", [True, False])
def test_testing_with_and_without_a_checkpoint(tmp_path, merge):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    run, module, _, trained = fit(tmp_path, callback=adalora(merge_on_fit_end=merge), extra=[checkpoint])
    last = str(tmp_path / "epoch=3.ckpt")
    plain = run.test(module, verbose=False)[0]["test"]
    assert all(type(layer) is LoRALinear and layer.merged == merge for _, layer in lora_layers(module))
    assert run.test(module, ckpt_path=last, verbose=False)[0]["test"] == pytest.approx(plain, abs=1e-5)
    torch.testing.assert_close(adapters(module), trained.adapters, rtol=0, atol=0)  # in their size again
    assert run.test(module, verbose=False)[0]["test"] == pytest.approx(plain, abs=1e-5)
    early = run.test(module, ckpt_path=str(tmp_path / "epoch=0.ckpt"), verbose=False)[0]["test"]
    assert early != pytest.approx(plain, abs=1e-5)
    # Another process: a new module, a new callback.
    fresh = trainer(tmp_path, adalora()).test(LitNet(), ckpt_path=last, verbose=False)
    assert fresh[0]["test"] == pytest.approx(plain, abs=1e-5)
    twin = load_adapter(make_net(), last)
    torch.testing.assert_close(adapters(twin), {n.removeprefix("net."): t for n, t in trained.adapters.items()}, rtol=0, atol=0)


def test_a_checkpoint_written_after_fit_is_plain_lora(tmp_path):
    run, module, callback, _ = fit(tmp_path, callback=adalora(merge_on_fit_end=False))
    run.save_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    assert read_adapter(tmp_path / "after.ckpt").config == callback.config
    twin = load_adapter(make_net(), tmp_path / "after.ckpt")
    assert [layer.rank for _, layer in lora_layers(twin)] == [layer.rank for _, layer in lora_layers(module)]
    run.test(module, ckpt_path=str(tmp_path / "after.ckpt"), verbose=False)
    with pytest.raises(ValueError, match="AdaLoRA shrank the adapters"):
        run.save_checkpoint(tmp_path / "whole.ckpt")


def test_a_module_that_lost_all_its_triplets_is_named(tmp_path, caplog):
    class Gone(Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.net.fc1.lora_E.data.zero_()

    with caplog.at_level("INFO", "lightning.pytorch"):
        _, module, callback, _ = fit(tmp_path, extra=[Gone()])
    assert callback.ranks["net.fc1"] == 0 and module.net.fc1.rank == 1 and not module.net.fc1.lora_B.any()
    assert "AdaLoRA: 2 modules from rank 4 to" in caplog.text
    assert "Pruned completely, kept at rank 1 with B zero: net.fc1." in caplog.text


@pytest.mark.parametrize("part", [None, "net"])
def test_a_part_of_the_module(tmp_path, part):
    *_, callback, _ = fit(tmp_path, callback=adalora(module=part))
    assert sum(callback.ranks.values()) == 4
    names = {"fc1", "fc2"} if part else {"net.fc1", "net.fc2"}
    assert callback.ranks.keys() == names and callback.config.rank_pattern.keys() == {"fc1", "fc2"}


def test_a_model_built_late(tmp_path):
    *_, trained = fit(tmp_path, Lit(late=True))
    same(trained, loop(tmp_path))


# Resume.


@pytest.mark.parametrize("epoch", [0, 2])  # while it prunes; with the ranks found
def test_resume_is_step_exact(tmp_path, epoch):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    *_, whole = fit(tmp_path, extra=[checkpoint], callback=adalora(tfinal=5))
    *_, resumed = fit(tmp_path, callback=adalora(tfinal=5), ckpt_path=str(tmp_path / f"{epoch=}.ckpt"))
    torch.testing.assert_close(resumed.adapters, whole.adapters, rtol=0, atol=0)
    torch.testing.assert_close(resumed.state, whole.state, rtol=0, atol=0)


def test_a_run_may_be_planned_longer_than_it_takes_and_go_on(tmp_path):
    """Half of a run, and then the other half, with the whole schedule named: the same as in one go."""
    *_, whole = fit(tmp_path)
    checkpoint = ModelCheckpoint(tmp_path, filename="half", enable_version_counter=False)
    with pytest.warns(UserWarning, match=r"ended after 8 optimizer steps, but AdaLoRA's schedule prunes until step 13.*target_rank=2"):
        fit(tmp_path, callback=adalora(total_steps=16), extra=[checkpoint], max_epochs=2)
    *_, resumed = fit(tmp_path, callback=adalora(total_steps=16), ckpt_path=str(tmp_path / "half.ckpt"))
    torch.testing.assert_close(resumed.adapters, whole.adapters, rtol=0, atol=1e-6)
    torch.testing.assert_close(resumed.state, whole.state, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"total_steps=20 here, the checkpoint's schedule has 16, 8 of them done"):
        fit(tmp_path, max_epochs=5, ckpt_path=str(tmp_path / "half.ckpt"))


def test_fitting_on_goes_on(tmp_path):
    run, module, callback, _ = fit(tmp_path, callback=adalora(total_steps=16))
    first = dict(callback.ranks)
    run.fit_loop.max_epochs = 6
    run.fit(module)
    assert callback.allocator.step == 24 and callback.ranks == first
    assert all(layer.merged for _, layer in lora_layers(module))


def test_the_same_callback_on_another_module_starts_anew(tmp_path):
    _, _, callback, first = fit(tmp_path)
    *_, second = fit(tmp_path, callback=callback)
    torch.testing.assert_close(second.adapters, first.adapters, rtol=0, atol=0)
    assert second.state["step"] == 16


def test_a_checkpoint_of_another_callback_is_refused(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="plain", enable_version_counter=False)
    plain = LoRACallback(adalora().config, merge_on_fit_end=False)
    with pytest.warns(UserWarning, match="prunes no rank: use AdaLoRACallback"):
        trainer(tmp_path, plain, checkpoint, max_epochs=1).fit(LitNet())
    with pytest.raises(ValueError, match="no state of AdaLoRACallback"):
        fit(tmp_path, ckpt_path=str(tmp_path / "plain.ckpt"))


def test_a_module_of_one_layer_trains_shrinks_and_reads_its_file(tmp_path):
    class One(LitNet):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(8, 4)

    config = LoRAConfig(alpha=4, target_modules=["net"])
    _, module, callback, _ = fit(tmp_path, One(), adalora(config, merge_on_fit_end=False))
    assert callback.ranks == {"net": 2} and module.net.rank == 2
    save_adapter(module, tmp_path / "adapter")
    x = torch.randn(3, 8)
    torch.testing.assert_close(load_adapter(One(), tmp_path / "adapter").net(x), module.net(x))
