"""``LoRACallback(start_from=...)``: an adapter is trained further on new data, with a new optimizer, apart from resuming."""

import copy
import logging
import pickle

import lightning as L
import peft
import pytest
import torch
from torch import nn

from lightning_lora import AdaLoRACallback, LoRACallback, LoRAConfig, apply_lora, load_adapter, lora_layers, save_adapter
from tests.callbacks.lora_runs import checkpoint_in
from tests.lit import CONFIG, LitNet, bits, make_net, trainer
from tests.quantized import plain_stack

pytestmark = pytest.mark.filterwarnings("ignore:PEFT 0.21 leaves out the bias of 'fc2'")
OTHERS = {
    "plain": CONFIG,
    "names": LoRAConfig(rank=2, target_modules=["fc1", "embed"], rank_pattern={"fc1": 3}, alpha_pattern={"embed": 5}, scaling="rslora"),
    "regex": LoRAConfig(rank=2, target_modules=["^fc.$"], rank_pattern={"^fc1$": 3}),
    "dora": LoRAConfig(rank=2, target_modules=["fc1"], variant="dora"),
    "vera": LoRAConfig(rank=4, target_modules=["fc1"], variant="vera", variant_options={"projection_seed": 3}),
    "lora_fa": LoRAConfig(rank=2, target_modules=["fc1"], variant="lora_fa"),
    "pissa": LoRAConfig(rank=2, target_modules=["fc1", "fc2"], init="pissa"),
    "rows": LoRAConfig(rank=2, target_modules=["fc1"], trainable_token_indices={"fc2": [3, 1]}),
    "saved": LoRAConfig(rank=2, target_modules=["fc1"], modules_to_save=["fc2"], bias="lora_only"),
}


def changed(net, seed=5):
    """Give every parameter that trains another value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return net


def saved(folder, config=CONFIG):
    return save_adapter(changed(apply_lora(make_net(), config)), folder)


class Seen(L.Callback):
    """Keeps what the first batch finds."""

    def on_train_batch_start(self, trainer, pl_module, *args):
        if not hasattr(self, "bits"):
            self.bits, self.step = bits(pl_module.net), trainer.global_step
            self.states = [len(optimizer.state) for optimizer in trainer.optimizers]


def fit(tmp_path, lora, module=None, ckpt=None, **kwargs):
    module, seen = module or LitNet(), Seen()
    trainer(tmp_path, lora, seen, max_epochs=1, **kwargs).fit(module, ckpt_path=ckpt)
    return module, seen


def equal(mine, theirs):
    assert mine.keys() == theirs.keys()
    assert not [name for name in mine if not torch.equal(mine[name], theirs[name])]


@pytest.mark.parametrize("given", ["nothing", "the same"])
@pytest.mark.parametrize("config", OTHERS)
def test_goes_on_from_the_saved_values(config, given, tmp_path):
    config = OTHERS[config]
    folder = saved(tmp_path / "adapter", config)
    wanted = load_adapter(make_net(), folder)
    lora = LoRACallback(LoRAConfig() if given == "nothing" else config, start_from=folder, merge_on_fit_end=False)
    module, seen = fit(tmp_path, lora)
    equal(seen.bits, bits(wanted))
    assert seen.step == 0 and seen.states == [0]
    assert {name for name, p in module.net.named_parameters() if p.requires_grad} == {
        n for n, p in wanted.named_parameters() if p.requires_grad
    }
    assert any(not torch.equal(seen.bits[name], now) for name, now in bits(module.net).items() if "lora" in name)
    # what it saves loads on the bare model, from a folder and from a checkpoint
    equal(bits(load_adapter(make_net(), save_adapter(module, tmp_path / "again"))), bits(module.net) | {})


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_its_checkpoints_resume_and_start_others(late, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = saved(tmp_path / "adapter", OTHERS["regex"])
    lora = LoRACallback(start_from=folder, merge_on_fit_end=False)
    module = LitNet(late=late)
    trainer(tmp_path, lora, checkpoint_in(tmp_path / "ck"), max_epochs=1).fit(module)
    assert f"Starts from the adapter {folder}: its weights, with a new optimizer at step 0" in caplog.text
    caplog.clear()
    end, last = bits(module.net), tmp_path / "ck" / "last.ckpt"
    # resumed: everything is the checkpoint's, whatever start_from says
    again, seen = LitNet(late=late), Seen()
    trainer(tmp_path, LoRACallback(start_from=folder), seen, max_epochs=2).fit(again, ckpt_path=last)
    equal(seen.bits, end)
    assert seen.step == 4 and seen.states == [4]
    assert (
        f"Resumes {last} at step 4: its weights" in caplog.text
        and "Nothing of start_from=" in caplog.text
        and "Starts from" not in caplog.text
    )
    # started from: its adapter, and nothing else
    _, seen = fit(tmp_path, LoRACallback(start_from=last))
    equal({n: t for n, t in seen.bits.items() if "lora" in n}, {n: t for n, t in end.items() if "lora" in n})
    assert seen.step == 0 and seen.states == [0]
    equal(
        {n: t for n, t in bits(load_adapter(make_net(), last)).items() if "norm" not in n},
        {n: t for n, t in end.items() if "norm" not in n},
    )


def test_a_second_fit_trains_what_is_there(tmp_path):
    lora, module = LoRACallback(start_from=saved(tmp_path / "adapter")), LitNet()
    fit(tmp_path, lora, module)
    load_adapter(after := make_net(), save_adapter(module, tmp_path / "after"))
    _, seen = fit(tmp_path, lora, module)
    equal({n: t for n, t in seen.bits.items() if "lora" in n}, {n: t for n, t in bits(after).items() if "lora" in n})
    _, seen = fit(tmp_path, lora, LitNet())  # another module starts from the file again
    equal(seen.bits, bits(load_adapter(make_net(), tmp_path / "adapter")))


def test_an_adapter_that_is_there_is_replaced(tmp_path):
    module = LitNet()
    changed(apply_lora(module.net, CONFIG), seed=9)
    _, seen = fit(tmp_path, LoRACallback(start_from=saved(tmp_path / "adapter")), module)
    equal(seen.bits, bits(load_adapter(make_net(), tmp_path / "adapter")))


def test_pefts_folder_and_a_test_without_training(tmp_path):
    theirs = peft.get_peft_model(make_net(), peft.LoraConfig(r=3, target_modules="fc.", init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "theirs")
    module = LitNet()
    wanted = load_adapter(make_net(), tmp_path / "theirs").eval()
    trainer(tmp_path, LoRACallback(start_from=tmp_path / "theirs")).test(module, verbose=False)
    x = torch.randn(4, 8)
    torch.testing.assert_close(module.net.eval()(x), wanted(x))
    assert sum(1 for _ in lora_layers(module)) == 2


def test_dropout_is_the_users(tmp_path):
    folder = saved(tmp_path / "adapter")
    module, _ = fit(tmp_path, LoRACallback(LoRAConfig(dropout=0.25), start_from=folder, merge_on_fit_end=False))
    assert {layer.lora_config.dropout for _, layer in lora_layers(module)} == {0.25}


def test_a_quantized_base(tmp_path):
    class Lit(LitNet):
        def __init__(self):
            super().__init__()
            self.net = plain_stack()

        def step(self, batch):
            return self.net(batch[0].repeat(1, 16)).square().mean()

    config = LoRAConfig(rank=2, target_modules=["up", "down"])
    folder = save_adapter(changed(apply_lora(plain_stack(), config)), tmp_path / "adapter")
    _, seen = fit(tmp_path, LoRACallback(start_from=folder, quantize="torchao-nf4"), Lit())
    there = bits(load_adapter(plain_stack(), folder))
    equal({n: t for n, t in seen.bits.items() if "lora" in n}, {n: t for n, t in there.items() if "lora" in n})


def test_adalora_goes_on_from_its_checkpoint_and_its_folder_from_there(tmp_path):
    first = AdaLoRACallback(LoRAConfig(target_modules=["fc1", "fc2"]), init_rank=4, target_rank=2)
    trainer(tmp_path, first, checkpoint_in(tmp_path / "ck", every_n_train_steps=2, save_top_k=-1), max_epochs=1).fit(module := LitNet())
    folder = save_adapter(module, tmp_path / "shrunk")
    checkpoint = next(path for path in (tmp_path / "ck").glob("*step=2*.ckpt"))
    again = AdaLoRACallback(start_from=checkpoint, init_rank=4, target_rank=2)
    _, seen = fit(tmp_path, again)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    equal({n: t for n, t in seen.bits.items() if "lora" in n}, {n.removeprefix("net."): t for n, t in state.items() if "lora" in n})
    module, _ = fit(tmp_path, LoRACallback(start_from=folder))  # plain LoRA of the ranks that were found
    assert {name: layer.rank for name, layer in lora_layers(module)} == {
        f"net.{n}": max(r, 1) for n, r in first.ranks.items()
    } or first.ranks
    with pytest.raises(ValueError, match=r"variant='adalora' \(the adapter has 'plain'\)"):
        fit(tmp_path, AdaLoRACallback(start_from=folder, init_rank=4, target_rank=2))


CONFLICTS = {
    "rank": (dict(rank=4), r"rank of fc1=4 \(the adapter has 2\)"),
    "alpha": (dict(alpha=8), r"alpha of fc1=8.0 \(the adapter has 4.0\)"),
    "scaling": (dict(scaling="rslora"), r"scaling='rslora' \(the adapter has 'standard'\)"),
    "variant": (dict(variant="dora"), r"variant='dora' \(the adapter has 'plain'\)"),
    "bias": (dict(bias="all"), r"bias='all' \(the adapter has 'none'\)"),
    "targets": (dict(target_modules=["fc1", "embed"]), r"target_modules=.*the adapter has '2 layers; only the config has embed'"),
    "rows": (dict(trainable_token_indices={"embed": [1]}), r"trainable_token_indices=\{'embed': \[1\]\} \(the adapter has None\)"),
    "saved": (dict(modules_to_save=["embed"]), r"modules_to_save=\['embed'\] \(the adapter has \[\]\)"),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_another_config_is_refused_by_field(case, tmp_path):
    fields, words = CONFLICTS[case]
    module = LitNet()
    before = bits(module)
    lora = LoRACallback(LoRAConfig(**fields), start_from=saved(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=rf"start_from=.* does not fit the config: {words}.*Leave these fields out"):
        fit(tmp_path, lora, module)
    equal(bits(module), before)


def test_a_refused_start_changes_nothing(tmp_path):
    folder = saved(tmp_path / "adapter", OTHERS["saved"])
    with pytest.raises(ValueError, match="start_from='' is empty"):
        LoRACallback(start_from="")
    for lora, words in (
        (LoRACallback(start_from=tmp_path / "none"), "there is no such adapter folder or checkpoint"),
        (LoRACallback(start_from=folder, module="net.fc1"), "names no module|matches no|fc1"),
    ):
        module = LitNet()
        before = bits(module)
        with pytest.raises(ValueError, match=words):
            fit(tmp_path, lora, module)
        equal(bits(module), before)
    module = LitNet()
    nn.init.zeros_(module.net.embed.weight)  # another base
    before = bits(module)
    with pytest.raises(ValueError, match="was trained on another base"):
        fit(tmp_path, LoRACallback(start_from=folder), module)
    equal(bits(module), before)

    class Fails(L.Callback):
        def setup(self, trainer, pl_module, stage):
            raise ValueError("later")

    module = LitNet()
    before = bits(module)
    with pytest.raises(ValueError, match="later"):  # the file's values are taken out again, of fc2 too
        trainer(tmp_path, LoRACallback(start_from=folder), Fails(), max_epochs=1).fit(module)
    equal(bits(module), before)


def test_a_copy_starts_anew(tmp_path):
    lora = LoRACallback(start_from=saved(tmp_path / "adapter"))
    fit(tmp_path, lora)
    for copied in (copy.deepcopy(lora), pickle.loads(pickle.dumps(lora))):
        _, seen = fit(tmp_path, copied)
        equal(seen.bits, bits(load_adapter(make_net(), tmp_path / "adapter")))
