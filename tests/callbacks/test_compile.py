"""``LoRACallback(compile="layer")`` through fit, test and predict, against the same run uncompiled."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch._dynamo.testing import CompileCounter

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.callbacks import block_modes
from lightning_lora.callbacks.refusals import recordable
from lightning_lora.layers import lora_layers
from lightning_lora.model.compile import compile_layers, keep_gradients
from tests.lit import LitNet, Net, bits, trainer

CONFIG = LoRAConfig(rank=2, alpha=4, target_modules=["fc1", "fc2"])
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # the compiler's own doing
    "ignore:Checkpoint directory",
)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(self.fc1(x).relu())


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(8, 16), nn.ModuleList(Residual() for _ in range(3)), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make() -> Deep:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Deep()


class LitDeep(LitNet):
    def __init__(self, late: bool = False) -> None:
        super().__init__(late=True)
        self.net = None if late else make()

    def configure_model(self) -> None:
        if self.net is None:
            self.net = make()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """With eps=1e-8 Adam would make steps out of rounding noise, which a compiled sum has in another order."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-4)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    torch._dynamo.reset()
    made = CompileCounter()
    monkeypatch.setattr(block_modes, "compile_layers", functools.partial(compile_layers, backend=made))
    yield made
    torch._dynamo.reset()


def compiled(module: nn.Module) -> bool:
    return any(child._compiled_call_impl is not None for child in module.modules())


def test_fit_test_predict_and_fit_again_as_if_not_compiled(tmp_path: Path, counter: CompileCounter) -> None:
    seen, results = [], []
    for how in (None, "layer"):
        torch.manual_seed(5)
        module = LitDeep(late=True)
        keep = ModelCheckpoint(tmp_path / str(how), save_last=True, enable_version_counter=False)
        callback = LoRACallback(CONFIG, compile=how)

        def run(epochs: int, callbacks: tuple[L.Callback, ...] = (callback, keep)) -> L.Trainer:
            return trainer(tmp_path, *callbacks, max_epochs=epochs, num_sanity_val_steps=0)

        run(2).fit(module)
        seen.append(counter.frame_count)
        tested = [run(2).test(module, verbose=False)[0]["test"]]
        tested += [run(2).test(module, ckpt_path=keep.last_model_path, verbose=False)[0]["test"]]
        seen.append(counter.frame_count)
        predicted = run(2).predict(module)
        run(3).fit(module)
        assert not compiled(module) and all(layer.merged for _, layer in lora_layers(module))
        seen.append(counter.frame_count)
        saved = torch.load(keep.last_model_path, weights_only=True)["state_dict"]
        results.append({"losses": module.losses, "tested": tested, "predicted": predicted, "saved": saved, "end": bits(module)})
    torch.testing.assert_close(results[1], results[0])
    assert seen[:3] == [0, 0, 0]
    # Training compiles two, validation one; the tests, in inference mode, one for the merged layers and one for the checkpoint's.
    assert seen[3:] == [3, 5, 5]


def test_steps_and_epochs_compile_no_more(tmp_path: Path, counter: CompileCounter) -> None:
    counts = []

    class Note(LitDeep):
        def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
            assert compiled(self)
            counts.append(counter.frame_count)

    trainer(tmp_path, LoRACallback(CONFIG, compile="layer"), max_epochs=3, num_sanity_val_steps=0).fit(Note())
    assert counts[0] == 0 and counts[1:4] == [2] * 3 and len(set(counts[4:])) == 1


def test_prediction_alone_runs_as_written(tmp_path: Path, counter: CompileCounter) -> None:
    module = LitDeep()
    trainer(tmp_path, LoRACallback(CONFIG, compile="layer")).predict(module)
    assert counter.frame_count == 0 and not compiled(module)


def test_an_exception_leaves_nothing_compiled(tmp_path: Path, counter: CompileCounter) -> None:
    class Fails(LitDeep):
        def on_train_epoch_end(self) -> None:
            assert compiled(self)
            raise RuntimeError("as planned")

    module = Fails()
    with pytest.raises(RuntimeError, match="as planned"):
        trainer(tmp_path, LoRACallback(CONFIG, compile="layer"), max_epochs=1).fit(module)
    assert counter.frame_count > 0 and not compiled(module)


def test_a_model_without_blocks_is_refused_as_it_is(tmp_path: Path) -> None:
    module = LitNet()
    before = bits(module)
    with pytest.raises(ValueError, match=r'LitNet has no repeated blocks.*Leave compile="layer" out'):
        trainer(tmp_path, LoRACallback(CONFIG, compile="layer"), max_epochs=1).fit(module)
    assert bits(module).keys() == before.keys() and all(p.requires_grad for p in module.parameters()) and type(module.net) is Net


def test_another_value_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compile='model' is not known; it is None or 'layer'"):
        LoRACallback(CONFIG, compile="model")


def test_with_cuda_graphs_each_batch_is_a_step_and_gradients_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is to see of it on a CPU; tests/test_gpu.py trains with graphs that are recorded."""
    made, log = CompileCounter(), []
    forward = Deep.forward
    monkeypatch.setattr(Deep, "forward", lambda net, x: (log.append("forward"), forward(net, x))[1])
    recorder = lambda graph, inputs, config_patches: made(graph, inputs)  # noqa: E731
    monkeypatch.setattr(block_modes, "compile_layers", functools.partial(compile_layers, backend=recorder))
    monkeypatch.setattr(block_modes, "begin_step", lambda: log.append("begin"))
    monkeypatch.setattr(block_modes, "keep_gradients", lambda parameters: (log.append("keep"), keep_gradients(parameters)))
    monkeypatch.setattr(block_modes, "recordable", lambda strategy: True)
    results = []
    for options in ({}, {"compile": "layer", "cuda_graphs": True}):
        torch.manual_seed(5)
        log.clear()
        module, run = LitDeep(), trainer(tmp_path, LoRACallback(CONFIG, **options), max_epochs=2, accumulate_grad_batches=2)
        run.fit(module)
        run.test(module, verbose=False)
        results.append((bits(module), len(log)))
    (plain, forwards), (recorded, _) = results
    torch.testing.assert_close(recorded, plain)
    assert made.frame_count > 0 and log.count("keep") == run.fit_loop.epoch_loop.batch_progress.total.ready > 0
    assert log.count("begin") == log.count("forward") == forwards
    assert all(before == "begin" for before, here in itertools.pairwise(log) if here == "forward")
    assert all(before == "forward" for before, here in itertools.pairwise(log) if here == "keep")


def test_cuda_graphs_on_a_cpu_say_that_they_do_nothing(tmp_path: Path, counter: CompileCounter) -> None:
    with pytest.warns(UserWarning, match="cuda_graphs=True has no effect on cpu"):
        trainer(tmp_path, LoRACallback(CONFIG, compile="layer", cuda_graphs=True), max_epochs=1, limit_val_batches=0).fit(LitDeep())
    assert counter.frame_count > 0


def test_cuda_graphs_where_there_is_nothing_to_record_are_an_error() -> None:
    with pytest.raises(ValueError, match="cuda_graphs=True records compiled blocks: pass compile='layer'"):
        LoRACallback(CONFIG, cuda_graphs=True)
    with pytest.raises(ValueError, match=r"cuda_graphs=True with strategy=ModelParallelStrategy: it moves.*Leave cuda_graphs out"):
        recordable(ModelParallelStrategy())
