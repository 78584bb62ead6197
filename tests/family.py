"""``make family``: every kind of layer with every variant of the update, printed by running it.

The kinds are ``CASES`` of tests/layers/kinds.py, the variants those in the registry; a new base is a line there, a new variant a
line in ``WEIGHTS`` here. A pair that cannot be is refused when LoRA is applied, with a message. Each other pair runs ``CHECKS``; the
last line counts checks (and refused pairs): ``N passed, N refused, 0 failed``.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, apply_lora, load_adapter, merge_lora, save_adapter, unmerge_lora
from lightning_lora.layers.base import LoRALayer, lora_layers
from lightning_lora.registry import VARIANTS
from tests.conftest import fill, same_bits
from tests.layers.expert_cases import CASES as EXPERTS
from tests.layers.expert_cases import Several
from tests.layers.kinds import CASES as PLAIN
from tests.layers.kinds import Case, plain_product
from tests.quantized import inputs, packed_linear


class Packed(Case):
    """A quantized linear, which is made in its dtype; the definition takes what it unpacks to."""

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return self.build()

    def apply(self, layer: LoRALayer, W: Tensor, x: Tensor) -> Tensor:
        return nn.functional.linear(x, W, layer.bias.to(W.dtype))


def packed(how: str) -> Packed:
    return Packed(partial(packed_linear, how), inputs, None, plain_product, dtypes=(torch.float32,), quantized="dequantize")


# bitsandbytes' int8 quantizes the input too in evaluation, which no formula here does; tests/model/test_quantize.py has it.
CASES: dict[str, Case] = {
    **PLAIN,
    **{f"linear, {how}": packed(how) for how in ("nf4", "torchao-nf4", "torchao-int8", "fp8")},
    **EXPERTS,
}
PAIRS = [(kind, variant) for kind in CASES for variant in sorted(VARIANTS, key=lambda name: (name != "plain", name))]

Parameters = dict[str, Tensor]


def dora(case: Case, layer: LoRALayer, W: Tensor, p: Parameters) -> Tensor:
    """arXiv:2402.09353, equation 5, with the norm as a constant (section 4.3)."""
    V = W + layer.scaling * case.product(layer, p["lora_A"], p["lora_B"])
    others = [dim for dim in range(V.ndim) if dim != case.out_axis]
    norm = V.detach().square().sum(others, keepdim=True).sqrt()
    return p["lora_magnitude_vector"].view(norm.shape) * V / norm


def plain(case: Case, layer: LoRALayer, W: Tensor, p: Parameters) -> Tensor:
    """arXiv:2106.09685, equation 3."""
    return W + layer.scaling * case.product(layer, p["lora_A"], p["lora_B"])


def adalora(case: Case, layer: LoRALayer, W: Tensor, p: Parameters) -> Tensor:
    """arXiv:2303.10512, equation 3."""
    A = p["lora_A"] * p["lora_E"].view(-1, *(1,) * (p["lora_A"].ndim - 1))
    return W + layer.scaling * case.product(layer, A, p["lora_B"])


def vera(case: Case, layer: LoRALayer, W: Tensor, p: Parameters) -> Tensor:
    """arXiv:2310.11454, equation 2, with A and B drawn as PEFT draws them for one layer."""
    matrix = layer.to_matrix(W)
    A, B = torch.empty(case.rank, matrix.shape[1]), torch.empty(matrix.shape[0], case.rank)
    generator = torch.Generator().manual_seed(0)
    for factor in (A, B):
        torch.nn.init.kaiming_uniform_(factor, generator=generator)
    return W + case.product(layer, p["lora_lambda_d"][:, None] * A.double(), p["lora_lambda_b"][:, None] * B.double())


def lora_xs(case: Case, layer: LoRALayer, W: Tensor, p: Parameters) -> Tensor:
    """arXiv:2405.17604, equation 2."""
    A = (p["lora_R"] @ p["lora_A"].flatten(1)).view(p["lora_A"].shape)
    return W + layer.scaling * case.product(layer, A, p["lora_B"])


# The adapted weight as each variant's paper has it: (case, layer, base weight, adapter parameters) → weight.
WEIGHTS: dict[str, Callable[[Case, LoRALayer, Tensor, Parameters], Tensor]] = {
    "plain": plain,
    "lora_fa": plain,
    "lora_xs": lora_xs,
    "dora": dora,
    "adalora": adalora,
    "vera": vera,
    "lora_bias": plain,
}
# What scales the update, for the variants whose formula has that.
SCALING: dict[str, dict[str, Any]] = {"vera": {}}


def adapted(kind: str, variant: str, dtype: torch.dtype = torch.float32, filled: bool = True, **fields: Any) -> tuple[nn.Module, LoRALayer]:
    """A model of one layer, and that layer; its adapter as if it had been trained."""
    case = CASES[kind]
    model = nn.Module()
    model.layer = case.base(dtype)
    config = LoRAConfig(rank=case.rank, variant=variant, target_modules=["layer"], **case.fields, **fields)
    apply_lora(model, config=config)
    if filled:
        fill(model)
    ((_, layer),) = lora_layers(model)
    if getattr(layer, "padding_idx", None) is not None:
        layer.lora_A.data[:, layer.padding_idx] = 0  # where it starts, and where it stays
    return model.eval(), layer


def identity(kind: str, variant: str, folder: Path) -> None:
    """An adapter that was just made changes no bit of the output."""
    for dtype in CASES[kind].dtypes:
        x = CASES[kind].x(dtype)
        assert same_bits(adapted(kind, variant, dtype, filled=False)[1](x), CASES[kind].base(dtype)(x)), dtype


def gradient(kind: str, variant: str, folder: Path) -> None:
    """Output and gradients, of the input, the adapter and the bias, are those of the paper's formula in float64."""
    case = CASES[kind]
    exact = case.dtypes[-1]
    _, layer = adapted(kind, variant, exact, **SCALING.get(variant, {"alpha": 6, "scaling": "rslora"}))
    bias = layer._parameters.get("bias")
    if bias is not None:
        bias.requires_grad_(True)
    x = case.x(exact)
    x.requires_grad_(x.is_floating_point())
    mine = layer(x)
    torch.manual_seed(2)
    weights = torch.randn_like(mine)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    got = dict(zip([*trained, "x"], torch.autograd.grad((mine * weights).sum(), [*trained.values(), *[x] * x.requires_grad]), strict=False))

    parameters = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in layer.lora_parameters().items()}
    twin = x.detach().double().requires_grad_() if x.requires_grad else x
    if isinstance(case, Several):
        defined = case.defined(layer, WEIGHTS[variant], parameters, twin)
    else:
        short = {name.removesuffix("_weight"): p for name, p in parameters.items()}  # of the one weight of a module that may have several
        weight = WEIGHTS[variant](case, layer, layer.base_weight().detach().double(), short)
        defined = case.apply(layer, weight, twin) + sum(layer.per_output(layer.scaling * short[b]) for b in short if b == "lora_B_bias")
    if bias is not None:
        parameters["bias"] = bias  # functional_call used it as it is
    wanted = {**{name: parameters[name] for name in trained}, **({"x": twin} if x.requires_grad else {})}
    expected = dict(zip(wanted, torch.autograd.grad((defined * weights).sum(), list(wanted.values())), strict=True))
    if getattr(layer, "padding_idx", None) is not None and "lora_A" in expected:
        expected["lora_A"][:, layer.padding_idx] = 0
    tolerance = 1e-10 if exact == torch.float64 else 1e-4
    torch.testing.assert_close(mine.double(), defined, rtol=tolerance, atol=tolerance)
    assert got.keys() == expected.keys()
    for name in expected:
        assert expected[name].count_nonzero(), name
        torch.testing.assert_close(got[name].double(), expected[name].double(), rtol=tolerance, atol=tolerance)


def merge(kind: str, variant: str, folder: Path) -> str | None:
    """Merged and unmerged outputs agree; or the base cannot take it, and merging says so and changes nothing."""
    for dtype in CASES[kind].dtypes:
        model, layer = adapted(kind, variant, dtype)
        x = CASES[kind].x(dtype)
        how = CASES[kind].quantized
        if layer.merge_refusal(how):
            weight = layer.weight.detach().clone()
            with pytest.raises(ValueError, match="'layer' cannot be merged"):
                merge_lora(model)
            assert not layer.merged and same_bits(layer.weight, weight)
            return "refused"
        before = layer(x)
        merge_lora(model, quantized=how)
        tolerance = 1e-5 if dtype.itemsize > 2 else 16 * torch.finfo(dtype).eps
        assert (layer(x) - before).double().norm() <= tolerance * before.double().norm(), dtype
    return None


def unmerge(kind: str, variant: str, folder: Path) -> str | None:
    """The base comes back bit for bit, twice."""
    for dtype in CASES[kind].dtypes:
        model, layer = adapted(kind, variant, dtype)
        how = CASES[kind].quantized
        if layer.merge_refusal(how):
            return "refused"
        weight, output = _weight(layer, base=True).detach().clone(), layer(CASES[kind].x(dtype))
        for _ in range(2):
            merge_lora(model, quantized=how)
            assert not same_bits(_weight(layer), weight)
            unmerge_lora(model)
            assert same_bits(_weight(layer, base=True), weight), dtype
            assert same_bits(layer(CASES[kind].x(dtype)), output), dtype
    return None


def _weight(layer: Any, base: bool = False) -> Tensor:
    """The weight as it is stored, or the base's; all of them in one if there are several."""
    several = [part.weight.flatten() for part in layer.by_weight().values()] if len(layer.adapted) > 1 else []
    return torch.cat(several) if several else layer.base_weight() if base else layer.weight


def files(kind: str, variant: str, folder: Path) -> None:
    """An adapter folder, and a state dict, hold the whole adapter."""
    model, layer = adapted(kind, variant)
    x = CASES[kind].x()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*PEFT 0.21 takes other norms")  # of grouped convolutions; ours reads it right
        save_adapter(model, folder / f"{kind}-{variant}", overwrite=True)
    other = nn.Module()
    other.layer = CASES[kind].base()
    load_adapter(other, folder / f"{kind}-{variant}")
    torch.testing.assert_close(other.layer.eval()(x), layer(x), rtol=0, atol=0 if type(other.layer) is type(layer) else 1e-5)
    twin, _ = adapted(kind, variant, filled=False)
    state = model.state_dict()
    if CASES[kind].quantized:  # bitsandbytes' own layers cannot load all that they save; checkpoints hold the adapter only
        state = {name: tensor for name, tensor in state.items() if "lora_" in name}
    twin.load_state_dict(state, strict=not CASES[kind].quantized)
    assert same_bits(twin.layer(x), layer(x))


CHECKS: dict[str, Callable[[str, str, Path], str | None]] = {
    "identity": identity,
    "gradient": gradient,
    "merge": merge,
    "unmerge": unmerge,
    "files": files,
}


def refusal(kind: str, variant: str) -> str | None:
    """Why LoRA cannot be applied to this pair; None if it can. A refusal names the module and changes nothing."""
    model = nn.Module()
    model.layer = CASES[kind].base()
    cls, parameters = type(model.layer), list(model.parameters())
    try:
        apply_lora(model, config=LoRAConfig(rank=CASES[kind].rank, variant=variant, target_modules=["layer"], **CASES[kind].fields))
    except ValueError as error:
        assert "'layer'" in str(error) and variant in str(error), error
        assert type(model.layer) is cls and all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert all(p.requires_grad for p in parameters if p.is_floating_point())
        return str(error)
    return None


def cell(results: dict[str, str]) -> str:
    """What the table says of a pair: the results by check, none of a pair that is refused."""
    without = [check for check, result in results.items() if result == "refused"]
    passed = "✓" + (f" ({', '.join(without)} refused)" if without else "")
    return "refused" if not results else "FAILED" if "failed" in results.values() else passed


def main() -> int:
    """Print the table; the exit code is the number of failed checks."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    variants = list(dict.fromkeys(variant for _, variant in PAIRS))
    print(f"| kind | {' | '.join(variants)} |\n|---|{'---|' * len(variants)}")
    with tempfile.TemporaryDirectory() as folder:
        for kind in CASES:
            cells = []
            for variant in variants:
                refused = refusal(kind, variant) is not None
                results = {} if refused else {check: _run(check, kind, variant, Path(folder)) for check in CHECKS}
                counts.update(results.values() if results else ["refused"])
                cells.append(cell(results))
            print(f"| {kind} | {' | '.join(cells)} |", flush=True)
    print(f"{counts['passed']} passed, {counts['refused']} refused, {counts['failed']} failed")
    return counts["failed"]


def _run(check: str, kind: str, variant: str, folder: Path) -> str:
    torch.manual_seed(0)
    try:
        return CHECKS[check](kind, variant, folder) or "passed"
    except (Exception, pytest.fail.Exception) as error:
        print(f"{kind}, {variant}, {check}: {type(error).__name__}: {error}", file=sys.stderr)
        return "failed"


if __name__ == "__main__":
    sys.exit(main())
