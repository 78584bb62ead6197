"""LoftQ: quantize with adapters that make up for what is lost, for every format that is quantized here."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import loftq_utils
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    apply_lora,
    combine_adapters,
    export_adapter,
    find_targets,
    load_adapter,
    lora_layers,
    merge_lora,
    quantize_base,
    save_adapter,
    unload_lora,
    unmerge_lora,
)
from lightning_lora.adapter_io.starting import starting_config
from lightning_lora.quantization.content import lost_factors
from lightning_lora.quantization.formats import dequantized
from tests.conftest import same_bits
from tests.lit import LitNet, bits, trainer
from tests.quantized import QUANTIZERS, Stack, packed_stack, plain_stack

X = torch.linspace(-1, 1, 3 * 128).view(3, 128)


def config(rank: int = 8, **fields: Any) -> LoRAConfig:
    return LoRAConfig(
        **{"rank": rank, "alpha": 2 * rank, "target_modules": ["up", "down"], "init": "loftq", "modules_to_save": [], **fields}
    )


def test_one_reason_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="its weight is not quantized") as raised:
        find_targets(plain_stack(torch.float32), config())
    assert str(raised.value).count("its weight is not quantized") == 1 and "The same of 'down'" in str(raised.value)


def packed(how: str, lora: LoRAConfig, dtype: torch.dtype = torch.float32) -> Stack:
    return quantize_base(plain_stack(dtype), how, targets=["up", "down"], lora=lora)


def error(model: nn.Module) -> float:
    """How far the layers' weights, with their updates, are from those that were quantized."""
    squares = 0.0
    for name, layer in lora_layers(model):
        W = plain_stack().get_submodule(name).weight.double()
        squares += float((W - dequantized(layer).double() - layer.lora_delta().detach().double()).square().sum().detach())
    return squares**0.5


@pytest.mark.parametrize("how", QUANTIZERS)
def test_it_is_the_papers_alternation(how: str) -> None:
    """Algorithm 1, by induction: Q is the format's of W − (the B·A of one iteration less), and B·A is of the rest, in float64."""
    before = dict.fromkeys(("up", "down"), torch.zeros(()))
    for iterations in (1, 2, 3):
        lora = config(init_options={"iterations": iterations})
        for name, layer in lora_layers(apply_lora(packed(how, lora), lora)):
            W = plain_stack().get_submodule(name).weight.detach()
            linear = nn.Sequential(nn.Linear(W.shape[1], W.shape[0]))
            linear[0].weight.data = W - before[name]
            Q = dequantized(quantize_base(linear, how)[0])
            assert same_bits(dequantized(layer), Q)
            U, S, Vh = torch.linalg.svd(W.double() - Q.double(), full_matrices=False)
            before[name] = layer.lora_delta().detach()
            torch.testing.assert_close(before[name].double(), (U[:, :8] * S[:8]) @ Vh[:8], rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", QUANTIZERS)
def test_the_model_starts_nearer_to_the_plain_one(how: str) -> None:
    assert error(apply_lora(packed(how, config()), config())) < 0.97 * error(apply_lora(packed_stack(how), config(init="kaiming")))


def test_more_iterations_are_nearer() -> None:
    errors = [error(apply_lora(packed("nf4", lora), lora)) for lora in (config(16, init_options={"iterations": n}) for n in (1, 5))]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("iterations", [1, 3])
def test_it_is_pefts(iterations: int) -> None:
    """PEFT's own function, which needs a GPU for its device's name only."""
    source = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"').replace("clear_device_cache()", "pass")
    namespace = dict(vars(loftq_utils))
    exec(compile(source, "loftq", "exec"), namespace)
    torch.manual_seed(5)
    W = torch.randn(256, 128) / 10
    wanted, A, B = namespace["loftq_init"](W, num_bits=4, reduced_rank=8, num_iter=iterations)
    lora = LoRAConfig(rank=8, alpha=8, target_modules=["0"], init="loftq", init_options={"iterations": iterations})
    linear = nn.Sequential(nn.Linear(128, 256))
    linear[0].weight.data = W.clone()
    ours = apply_lora(quantize_base(linear, "nf4", lora=lora), lora)[0]
    # Ours quantizes the scales of NF4 too, so the two differ by what that loses.
    assert (dequantized(ours) - wanted).norm() < 0.1 * iterations * (W - wanted).norm()
    assert ((ours.lora_B @ ours.lora_A) - B @ A).norm() < 0.1 * iterations * (B @ A).norm()
    assert ((W - dequantized(ours) - ours.lora_delta()).norm() / (W - wanted - B @ A).norm()).item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("how", QUANTIZERS)
def test_a_folder_belongs_to_the_quantized_weights(how: str, iterations: int, tmp_path: Path) -> None:
    lora = config(init_options={"iterations": iterations})
    model = apply_lora(packed(how, lora), lora).eval()
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.add_(0.01)
    wanted = model(X)
    save_adapter(model, tmp_path / "adapter")
    read = load_adapter(packed(how, lora), tmp_path / "adapter").eval()
    torch.testing.assert_close(read(X), wanted, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"init='loftq' belongs to a quantized base, and its weight is not quantized"):
        load_adapter(plain_stack(), tmp_path / "adapter")
    other = next(name for name in QUANTIZERS if name != how)
    with pytest.raises(ValueError, match=r"was trained with LoftQ, so it belongs to quantized weights: .*; this model's are"):
        load_adapter(packed_stack(other), tmp_path / "adapter")
    if iterations == 1:  # Q is the quantized W
        load_adapter(packed_stack(how), tmp_path / "adapter")
    else:
        with pytest.raises(ValueError, match="belongs to quantized weights"):
            load_adapter(packed_stack(how), tmp_path / "adapter")
    # Written again from where it was read, merged or not, it says the same.
    merge_lora(read, quantized="dequantize")
    save_adapter(read, tmp_path / "again")
    unmerge_lora(read)
    with pytest.raises(ValueError, match="belongs to quantized weights"):
        load_adapter(packed_stack(other), tmp_path / "again")
    torch.testing.assert_close(load_adapter(packed(how, lora), tmp_path / "again").eval()(X), wanted, rtol=0, atol=0)


def test_it_is_added_to_adapters_of_its_own_base_only(tmp_path: Path) -> None:
    lora = config()
    save_adapter(apply_lora(packed("nf4", lora), lora), tmp_path / "loftq")
    save_adapter(apply_lora(packed_stack("nf4"), config(init="kaiming")), tmp_path / "plain")
    with pytest.raises(ValueError, match="makes up for what quantizing lost"):
        combine_adapters({tmp_path / "loftq": 0.5, tmp_path / "plain": 0.5}, tmp_path / "sum")


class LitStack(LitNet):
    """Trains a stack of two linears, on rows that fit it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain_stack()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(X.repeat(4, 1), torch.arange(12)), batch_size=4)

    val_dataloader = train_dataloader


def test_the_callback_quantizes_with_it_and_resumes(tmp_path: Path) -> None:
    lora = config(init_options={"iterations": 2})

    def run(epochs: int, ckpt: Path | None = None) -> tuple[Any, LitStack]:
        module = LitStack()
        lit = trainer(tmp_path, LoRACallback(lora, quantize="nf4", merge_on_fit_end=False), max_epochs=epochs)
        lit.fit(module, ckpt_path=ckpt)
        return lit, module

    lit, module = run(1)
    lit.save_checkpoint(tmp_path / "one.ckpt")
    wanted = apply_lora(quantize_base(plain_stack(), "nf4", lora=lora), lora)
    assert all(same_bits(layer.weight, dict(lora_layers(wanted))[name].weight) for name, layer in lora_layers(module.net))
    straight, resumed = bits(run(2)[1]), bits(run(2, tmp_path / "one.ckpt")[1])
    assert all(torch.equal(straight[name], tensor) for name, tensor in resumed.items())
    read = load_adapter(quantize_base(plain_stack(), "nf4", lora=lora), tmp_path / "one.ckpt").eval()
    torch.testing.assert_close(read(X), module.net.eval()(X), rtol=0, atol=0)
    with pytest.raises(ValueError, match="belongs to quantized weights"):
        load_adapter(quantize_base(plain_stack(), "nf4"), tmp_path / "one.ckpt")
    module = LitStack()
    with pytest.raises(ValueError, match="init='loftq' belongs to a quantized base"):
        trainer(tmp_path, LoRACallback(lora), max_epochs=1).fit(module)
    assert not any(lora_layers(module))


@pytest.mark.parametrize(
    ("base", "fields", "match"),
    [
        (plain_stack, {}, "'up' .*: init='loftq' belongs to a quantized base, and its weight is not quantized"),
        (lambda: packed_stack("nf4"), {}, "'up': init='loftq' makes up for what quantizing lost, and this weight came quantized"),
        (lambda: packed("nf4", config(4)), {}, "'up': rank=8, and its base was quantized for init='loftq' at rank=4"),
        (lambda: packed("nf4", config(4)), {"init_options": {"iterations": 0}}, r"init_options\['iterations'\]=0: give a whole number ≥ 1"),
        (
            lambda: packed("nf4", config(4)),
            {"init_options": {"rho": 2}},
            r"init_options\['rho'\]=2 is not known to init='loftq'; it takes iter",
        ),
    ],
)
def test_what_is_refused(base: Any, fields: dict[str, Any], match: str) -> None:
    model = base()
    with pytest.raises(ValueError, match=match):
        apply_lora(model, config(**fields))
    assert not any(lora_layers(model))


def test_a_rank_that_is_too_high_is_refused_before_anything_is_quantized() -> None:
    model = plain_stack()
    with (
        pytest.warns(UserWarning, match="rank=200"),
        pytest.raises(ValueError, match=r"'up': init='loftq' with rank=200 is above min\(in, out\)=128"),
    ):
        quantize_base(model, "nf4", lora=config(200))
    assert type(model.up) is nn.Linear and model.up.weight.dtype == torch.float32


def test_layers_that_are_not_targets_are_only_quantized() -> None:
    lora = config(target_modules=["up"])
    model = quantize_base(plain_stack(), "fp8", targets=["up", "down"], lora=lora)
    assert lost_factors(model.up) is not None and lost_factors(model.down) is None
    assert [target.fqn for target in find_targets(model, lora).targets] == ["up"]
    twin = packed_stack("fp8")
    assert same_bits(model.down.weight, twin.down.weight) and same_bits(model.up.weight, twin.up.weight)
    unload_lora(apply_lora(model, lora))
    assert next(lora_layers(apply_lora(model, lora)))[1].lora_B.any()  # the factors stay with the weight


@pytest.mark.parametrize("target", ["peft", "vllm", "llama.cpp"])
def test_no_server_adds_it_to_other_weights(target: str, tmp_path: Path) -> None:
    save_adapter(apply_lora(packed("fp8", config()), config=config()), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"init='loftq' belongs to quantized weights \(Float8 .*export_merged"):
        export_adapter(tmp_path / "adapter", tmp_path / "served", target=target, base="owner/base")
    assert not (tmp_path / "served").exists()


def test_a_run_starts_from_it_before_the_base_is_quantized_as_it_was(tmp_path: Path) -> None:
    first = apply_lora(packed("fp8", config()), config=config())
    with torch.no_grad():
        for _, layer in lora_layers(first):
            layer.lora_B.add_(0.01)
    save_adapter(first, tmp_path / "adapter")
    found = starting_config(plain_stack(), tmp_path / "adapter", config())
    assert found.init == "loftq"
    again = load_adapter(apply_lora(packed("fp8", found), config=found), tmp_path / "adapter")
    assert torch.equal(first(X), again(X))
