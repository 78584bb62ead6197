"""Inits that read data under LoRACallback: the start is there before the first step, and nothing else of the run changes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, initialize_from_data, load_adapter, lora_layers, save_adapter
from lightning_lora.layers.awaiting import awaits_data
from tests.conftest import base_bits
from tests.lit import LitNet, bits, make_net, trainer

RANKS = {"eva": 4, "lora_ga": 2, "corda": 2}  # with 4, EVA gives the layers different ranks
INITS = tuple(RANKS)


def config(init: str, **fields: Any) -> LoRAConfig:
    return LoRAConfig(**{"rank": RANKS.get(init, 2), "alpha": 4, "target_modules": ["embed", "fc1", "fc2"], "init": init, **fields})


class Shuffled(LitNet):
    """Shuffles and drops out at random, appends to a list, counts, and notes what it sees."""

    def __init__(self, rate: float = 1e-2) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.count, self.rate = 0, rate

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(torch.cat([batch[0].flatten(), torch.rand(3)]))
        self.count += 1
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(super().train_dataloader().dataset, batch_size=8, shuffle=True)


class Still(LitNet):
    """Does not move."""

    @staticmethod
    def of(net: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-30)


def run(folder: Path, init: str, module: LitNet | None = None, epochs: int = 1, ckpt: Path | None = None, **fields: Any) -> Any:
    module = LitNet() if module is None else module
    torch.manual_seed(5)
    options = {name: fields.pop(name) for name in ("init_batches", "start_from", "quantize", "merge_quantized") if name in fields}
    callback = LoRACallback(config(init, **fields), merge_on_fit_end=False, **options)
    lit = trainer(folder, callback, max_epochs=epochs)
    lit.fit(module, ckpt_path=ckpt)
    return lit, module, callback


@pytest.mark.parametrize("init", INITS)
def test_the_run_sees_what_it_would_have_seen(init: str, tmp_path: Path) -> None:
    """Batches, their order, random numbers, statistics, and what the module keeps of its steps."""
    _, plain, _ = run(tmp_path, "kaiming", Shuffled(rate=1e-30), rank=RANKS[init])
    _, module, _ = run(tmp_path, init, Shuffled(rate=1e-30), init_batches=3)
    assert len(module.seen) == len(plain.seen) == module.count == len(module.losses) == 4
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(module.seen, plain.seen, strict=True))
    torch.testing.assert_close(module.losses, plain.losses, rtol=0, atol=1e-6)
    assert torch.equal(module.net.norm.running_mean, plain.net.norm.running_mean)


class Counting(LitNet):
    """Counts its steps in a buffer outside the part that is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return super().training_step((batch[0].to(self.net.fc1.weight.dtype), batch[1]), batch_idx)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])  # the second moves the module's buffers to new tensors
def test_buffers_outside_the_adapted_part_are_as_before(precision: Any, tmp_path: Path) -> None:
    module, callback = Counting(), LoRACallback(config("lora_ga"), module="net", init_batches=3, merge_on_fit_end=False)
    trainer(tmp_path, callback, max_epochs=1, precision=precision).fit(module)
    assert module.steps == len(module.losses) == 4


@pytest.mark.parametrize("init", INITS)
def test_the_start_is_that_of_the_plain_function_on_the_first_batches(init: str, tmp_path: Path) -> None:
    module, batches = Still(), [*itertools.islice(LitNet().train_dataloader(), 3)]
    _, _, callback = run(tmp_path, init, module, init_batches=3)
    alone = initialize_from_data(apply_lora(make_net(), config(init)), batches, step=Still.of)
    assert not any(awaits_data(layer) for _, layer in lora_layers(module))
    mine, wanted = bits(module.net), bits(alone)
    assert mine.keys() == wanted.keys() and any(wanted[name].any() for name in wanted if "lora_" in name)
    for name in wanted:
        if "lora_" in name:
            torch.testing.assert_close(mine[name], wanted[name], rtol=0, atol=1e-20)  # a step of 1e-30
    (_, layer), *_ = lora_layers(module)
    assert callback.config == layer.lora_config and callback.config.rank_pattern == next(lora_layers(alone))[1].lora_config.rank_pattern


@pytest.mark.parametrize("init", INITS)
def test_it_trains_resumes_and_continues(init: str, tmp_path: Path) -> None:
    """The base stays; a resumed run computes no start again, with the ranks of the checkpoint, and is exact."""
    base = base_bits(make_net())
    lit, module, _ = run(tmp_path, init)
    assert module.losses[-1] != module.losses[0]
    assert {k: v for k, v in base_bits(module.net).items() if "norm" not in k} == {k: v for k, v in base.items() if "norm" not in k}
    lit.save_checkpoint(tmp_path / "one.ckpt")
    save_adapter(module, tmp_path / "adapter")
    straight = bits(run(tmp_path, init, epochs=2)[1])
    resumed = run(tmp_path, init, epochs=2, ckpt=tmp_path / "one.ckpt")[1]
    assert all(torch.equal(tensor, straight[name]) for name, tensor in bits(resumed).items())

    x = torch.randn(5, 8)
    wanted = module.net.eval()(x)
    for path in ("adapter", "one.ckpt"):
        torch.testing.assert_close(load_adapter(_unadapted(module), tmp_path / path).eval()(x), wanted, rtol=0, atol=1e-6)
    tested = LitNet()
    trainer(tmp_path, LoRACallback(config(init))).test(tested, ckpt_path=tmp_path / "one.ckpt", verbose=False)
    torch.testing.assert_close(tested.net.eval()(x), wanted, rtol=0, atol=1e-6)
    # A second fit, of the same module by another callback, trains what is there.
    before = {name: layer.rank for name, layer in lora_layers(module)}
    run(tmp_path, init, module.train())
    assert before == {name: layer.rank for name, layer in lora_layers(module)}
    assert (len({*before.values()}) > 1) == (init == "eva")


def _unadapted(module: LitNet) -> nn.Module:
    net = make_net()
    net.norm.load_state_dict(module.net.norm.state_dict())
    return net


def test_start_from_reads_no_data(tmp_path: Path) -> None:
    _, module, _ = run(tmp_path, "eva")
    save_adapter(module, tmp_path / "adapter")
    torch.manual_seed(0)
    new = Still()
    new.net.norm.load_state_dict(module.net.norm.state_dict())
    run(tmp_path, "eva", new, start_from=tmp_path / "adapter")
    mine, wanted = bits(new.net), bits(module.net)
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted if "lora_" in name)


def test_evaluation_needs_no_data(tmp_path: Path) -> None:
    module = LitNet()
    lit = trainer(tmp_path, LoRACallback(config("eva")))
    lit.validate(module, verbose=False)
    assert all(awaits_data(layer) for _, layer in lora_layers(module))
    run(tmp_path, "eva", module)
    assert not any(awaits_data(layer) for _, layer in lora_layers(module))


class Manual(LitNet):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Once(IterableDataset):
    """Rows that come once."""

    def __init__(self) -> None:
        self.rows = iter([(torch.randn(8), torch.tensor(0)) for _ in range(64)])

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return next(self.rows)


class Streamed(LitNet):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(Once(), batch_size=8)


class Infinite(LitNet):
    def train_dataloader(self) -> DataLoader:
        x = torch.randn(16, 8)
        x[3, 2] = float("inf")
        return DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(16, dtype=torch.long)), batch_size=8)


@pytest.mark.parametrize(
    ("module", "fields", "match"),
    [
        (Manual, {}, "init='eva' runs training_step to read data, and Manual optimizes in it"),
        (Streamed, {}, r"the train dataloader \(DataLoader\) gives each batch once"),
        (Infinite, {}, "'embed': init='eva' met NaN or infinity in its inputs"),
        (LitNet, {"rank": 4, "init_batches": 1}, r"'embed': init='eva' saw 8 rows \(tokens\), and rank=4 needs at least 9"),
    ],
)
def test_a_refused_run_leaves_the_module_as_it_was(module: type[LitNet], fields: dict[str, Any], match: str, tmp_path: Path) -> None:
    made = module()
    state, random = bits(made), torch.get_rng_state()
    with pytest.raises(ValueError, match=match):
        run(tmp_path, "eva", made, **fields)
    assert not any(lora_layers(made)) and all(parameter.requires_grad for parameter in made.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in bits(made).items())
    assert "log" not in vars(made) and random.shape == torch.get_rng_state().shape


@pytest.mark.parametrize("number", [0, -1, 2.0, True, None])
def test_the_number_of_batches(number: Any) -> None:
    with pytest.raises(ValueError, match=f"init_batches={number!r}: give a whole number ≥ 1"):
        LoRACallback(init_batches=number)
