"""Trials side by side are each what they are alone; a model that does not keep rows apart is found, and they run one after another."""

import lightning
import pytest
import torch

from lightning_lora import LoRACallback, LoRAConfig, get_lora_parameters
from lightning_lora.trials import SideBySide, Trial
from tests.trials.nets import MIDDLES, Net, Own, Rows


def trial(number, middle, found, cls=Net, batch_size=4, **options):
    def make():
        lightning.seed_everything(number, workers=True)
        module = cls(middle)
        found[number] = module
        loader = torch.utils.data.DataLoader(Rows(), batch_size, shuffle=True)
        config = LoRAConfig(rank=1 + number % 2, dropout=0.2 * (number % 3), target_modules=["0", "2"])
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        callback = LoRACallback(config, **options)
        trainer = lightning.Trainer(accelerator="cpu", max_epochs=3, callbacks=[callback], **quiet)
        return trainer, module, lambda: trainer.fit(module, loader)

    return Trial(f"trial {number}", {"number": number}, make)


def trained(module):
    return [p.detach() for p in [*get_lora_parameters(module), *module.buffers()]]


def alone(number, *arguments, **options):
    found = {}
    SideBySide(1).run([trial(number, *arguments[:1], found, *arguments[1:], **options)])
    return trained(found[number])


@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_each_trial_is_what_it_is_alone(middle):
    found, runner = {}, SideBySide()
    trials = [trial(number, middle, found, batch_size=4 if number < 3 else 5) for number in range(4)]
    runner.run(trials)
    reason = MIDDLES[middle][1]
    assert (runner.reason is None) == (reason is None), runner.reason
    if reason is None:
        assert runner.joint.forwards == 9 + 4 and runner.joint.steps == 36
    else:
        assert any(part in runner.reason for part in reason.split("|"))
    for number in range(4):
        pairs = zip(trained(found[number]), alone(number, middle, Net, 4 if number < 3 else 5), strict=True)
        assert all(torch.allclose(*pair, rtol=1e-9, atol=1e-12) for pair in pairs), number
    assert [each.outcome.status for each in trials] == ["complete"] * 4 and trials[0].outcome.monitor == "train_loss"
    if reason is None:
        assert found[1].model[0].weight is found[0].model[0].weight, "one base in memory"


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_any_module_runs_one_after_another(caplog):
    found, runner = {}, SideBySide()
    runner.run([trial(number, "plain", found, Own) for number in range(2)])
    assert "Own does not say how the losses of several runs are computed together" in str(runner.reason)
    assert all(map(torch.equal, trained(found[1]), alone(1, "plain", Own)))


def test_a_refusal_names_the_reason_and_runs_nothing():
    found = {}
    with pytest.raises(ValueError, match=r"side_by_side=True: Own does not say"):
        SideBySide(side_by_side=True).run([trial(number, "plain", found, Own) for number in range(2)])
    with pytest.raises(ValueError, match="offload='frozen' moves the base"):
        SideBySide().run([trial(0, "plain", found, offload="frozen")])
    with pytest.raises(ValueError, match="at_once=0"):
        SideBySide(0)
