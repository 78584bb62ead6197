"""AdaLoRACallback's refusals: arguments, schedules and modules that it cannot serve."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_lora import AdaLoRACallback, LoRAConfig
from tests.callbacks.adalora_runs import CONFIG, adalora, fit
from tests.lit import LitNet

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory", "ignore:The `srun`")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_rank": 0}, "target_rank=0: give a whole number"),
        ({"target_rank": 4}, "target_rank=4 is not below init_rank=4"),
        ({"target_rank": 2.5}, "target_rank=2.5: give a whole number"),
        ({"total_steps": "9"}, "total_steps='9': give a whole number"),
        ({"deltaT": 0}, "deltaT=0: give a whole number"),
        ({"total_steps": 0}, "total_steps=0: give a whole number"),
        ({"tinit": -1}, "tinit=-1: give a whole number of optimizer steps, or a share"),
        ({"tfinal": 1.0}, "tfinal=1.0: give a whole number of optimizer steps, or a share"),
        ({"beta1": 1.0}, "beta1=1.0: give a number between 0 and 1"),
        ({"beta2": 0.0}, "beta2=0.0: give a number between 0 and 1"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight=-0.1: give a finite number"),
        ({"orth_reg_weight": float("nan")}, "orth_reg_weight=nan: give a finite number"),
        ({"config": LoRAConfig(rank=6)}, "rank=6 and init_rank=4 differ: leave rank out and give the start rank"),
        ({"config": LoRAConfig(variant="dora")}, "variant='dora' and AdaLoRACallback exclude each other"),
    ],
)
def test_arguments_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        adalora(**fields)


def test_needs_nothing_but_targets(tmp_path):
    _, _, callback, _ = fit(tmp_path, callback=AdaLoRACallback(CONFIG, target_rank=2, init_rank=4))
    allocator = callback.allocator
    assert (allocator.total_steps, allocator.tinit, allocator.tfinal) == (16, 2, 5) and sum(callback.ranks.values()) == 4


def test_a_schedule_that_does_not_fit_the_run(tmp_path):
    with pytest.raises(ValueError, match="tinit=10 and tfinal=6 leave none of the 16 optimizer steps"):
        fit(tmp_path, callback=adalora(tinit=10, tfinal=6))


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.randn(8), torch.tensor(1)


@pytest.mark.parametrize("kwargs", [{"max_epochs": -1}, {"max_epochs": 2}])
def test_a_run_of_unknown_length(tmp_path, kwargs):
    module = LitNet()
    module.train_dataloader = lambda: DataLoader(Endless(), batch_size=8)
    with pytest.raises(ValueError, match=r"does not know how many optimizer steps.*set max_steps or AdaLoRACallback\(total_steps"):
        fit(tmp_path, copy.copy(module), **kwargs)
    _, _, callback, _ = fit(tmp_path, module, max_epochs=-1, max_steps=12)
    assert callback.allocator.total_steps == 12 and sum(callback.ranks.values()) == 4


def test_a_run_without_steps(tmp_path):
    with pytest.raises(ValueError, match=r"will take no optimizer step \(.*limit_train_batches=0\), so AdaLoRA has no steps to prune in"):
        fit(tmp_path, limit_train_batches=0)


def test_adapters_in_two_optimizers(tmp_path):
    class Two(LitNet):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(layer.parameters(), 0.1) for layer in (self.net.fc1, self.net.fc2)]

    with pytest.raises(ValueError, match="2 optimizers hold lora_E"):
        fit(tmp_path, Two())
