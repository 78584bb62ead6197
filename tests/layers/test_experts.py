"""Experts of transformers' mixtures: each layout and implementation computes ``W_e + s·B_e·A_e`` for every token's experts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GptOssConfig, Llama4TextConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lightning_lora import LoRAConfig, apply_lora, disabled_lora, merge_lora, unload_lora, unmerge_lora
from lightning_lora.layers.adapting import refusal
from lightning_lora.layers.spec import LayerSpec
from tests.conftest import base_bits, fill, same_bits
from tests.layers.experts import tiny_mixtral, tiny_qwen3_moe
from tests.layers.mixtures import IDS, dropout_gradients, experts

E, H, W, N = 4, 12, 10, 9  # experts, hidden size, width, tokens
CONFIG = LoRAConfig(rank=3, alpha=6, target_modules=["experts"])


def gated(cls, config):
    config._experts_implementation = "eager"
    return cls(config)


def build(name, hidden=H, width=W):
    sizes = {"hidden_size": hidden, "moe_intermediate_size": width, "intermediate_size": width}
    module = {
        "qwen3_moe": lambda: gated(Qwen3MoeExperts, Qwen3MoeConfig(**sizes, num_experts=E)),
        "gpt_oss": lambda: gated(GptOssExperts, GptOssConfig(**sizes, num_local_experts=E)),
        "llama4": lambda: Llama4TextExperts(Llama4TextConfig(**sizes, num_local_experts=E)),
        "nemotron_h": lambda: gated(NemotronHExperts, NemotronHConfig(**sizes, n_routed_experts=E, moe_latent_size=None)),
        "jetmoe": lambda: JetMoeParallelExperts(E, hidden, width),
    }[name]()
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3
    return nn.ModuleDict({"experts": module})


def adapted(name, **fields):
    model = apply_lora(build(name), LoRAConfig(rank=3, alpha=6, target_modules=["experts"], **fields))
    return fill(model, std=0.3), model["experts"]


def routed(hidden=H):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(N, hidden, generator=generator, dtype=torch.float64).requires_grad_()
    index = torch.stack([torch.randperm(E - 1, generator=generator)[:2] for _ in range(N)])  # the last expert gets no token
    return x, index, torch.rand(N, 2, generator=generator, dtype=torch.float64)


def arguments(name, hidden=H):
    x, index, share = routed(hidden)
    given = {"llama4": (x[:8],), "jetmoe": (x, [2, 0, 4, 3])}
    return given.get(name, (x, index, share))


def dense(layer, factors):
    """Weight → (E, out, in), each matrix W_e + s·B_e·A_e, from factors by name."""
    found = {}
    for name in layer.adapted:
        A, B = factors[f"lora_A_{name}"].unflatten(0, (E, -1)), factors[f"lora_B_{name}"].unflatten(0, (E, -1))
        weight = layer._parameters[name]
        found[name] = (weight.mT if layer.stored_transposed else weight) + 2.0 * B @ A
    return found


def definition(name, layer, factors, x, index=None, share=None):
    """Token by token, as each model's paper has it."""
    weights = dense(layer, factors)
    if name == "jetmoe":
        owners = [0] * 2 + [2] * 4 + [3] * 3
        return torch.stack([weights["weight"][e] @ v for e, v in zip(owners, x, strict=True)])
    up, down = weights[layer.adapted[0]], weights["down_proj"]
    if name == "llama4":
        return torch.stack([down[n // 2] @ silu_gated(up[n // 2] @ v) for n, v in enumerate(x)])
    out = []
    for n, v in enumerate(x):
        total = 0
        for e, s in zip(index[n].tolist(), share[n], strict=True):
            if name == "gpt_oss":
                h = up[e] @ v + layer.gate_up_proj_bias[e]
                gate, linear = h[::2].clamp(max=7.0), h[1::2].clamp(-7.0, 7.0)
                y = down[e] @ ((linear + 1) * gate * torch.sigmoid(1.702 * gate)) + layer.down_proj_bias[e]
            elif name == "nemotron_h":
                y = down[e] @ F.relu(up[e] @ v).square()
            else:
                y = down[e] @ silu_gated(up[e] @ v)
            total = total + s * y
        out.append(total)
    return torch.stack(out)


def silu_gated(h):
    gate, up = h.chunk(2)
    return F.silu(gate) * up


NAMES = ["qwen3_moe", "gpt_oss", "llama4", "nemotron_h", "jetmoe"]
every = pytest.mark.parametrize("name", NAMES)
both = pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])


@every
def test_outputs_and_gradients_are_those_of_the_definition(name):
    _, layer = adapted(name)
    given = arguments(name)
    x = given[0]
    factors = {key: p.detach().clone().requires_grad_() for key, p in layer.lora_parameters().items()}
    found, wanted = layer(*given), definition(name, layer, factors, x, *given[1:])
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    mine = torch.autograd.grad((found * weights).sum(), [x, *layer.lora_parameters().values()])
    theirs = torch.autograd.grad((wanted * weights).sum(), [x, *factors.values()])
    torch.testing.assert_close(mine, theirs)
    assert all(gradient.any() for gradient in mine)


@every
def test_shapes_are_per_expert(name):
    _, layer = adapted(name)
    for part in layer.by_weight().values():
        A, B = part.factor_matrices()
        outputs, inputs = part.to_matrix(part.weight).shape[1:]
        assert A.shape == (E, 3, inputs) and B.shape == (E, outputs, 3) and part.lora_A.shape == (E * 3, inputs)
    assert not any(p.requires_grad for p in layer.base_parameters().values())


@every
def test_the_start_changes_no_bit_and_disabling_gives_the_base(name):
    base, given = build(name), arguments(name)
    wanted = base["experts"](*given)
    model = apply_lora(copy.deepcopy(base), CONFIG)
    torch.testing.assert_close(model["experts"](*given), wanted, rtol=0, atol=0)
    fill(model, std=0.3)
    assert not torch.equal(model["experts"](*given), wanted)
    with disabled_lora(model):
        assert same_bits(model["experts"](*given), wanted)


@every
def test_merge_unmerge_and_unload(name):
    base = build(name)
    bits, plain = base_bits(base), type(base["experts"])
    model, layer = adapted(name)
    given, factors = arguments(name), dict(layer.lora_parameters())
    unmerged, exact = layer(*given), dense(layer, factors)
    merge_lora(model)
    torch.testing.assert_close(layer(*given), unmerged)  # GPT-OSS has an alpha of its own, which the merged layer's must not replace
    for key, wanted in exact.items():
        torch.testing.assert_close(layer.by_weight()[key].to_matrix(layer._parameters[key]), wanted)
    unmerge_lora(model)
    assert base_bits(model) == bits and same_bits(layer(*given), unmerged)
    unload_lora(model)
    assert type(model["experts"]) is plain and base_bits(model) == bits


@every
def test_copies_and_pickles(name):
    _, layer = adapted(name)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer) and same_bits(twin(*arguments(name)), layer(*arguments(name)))


def test_dropout_is_on_each_experts_input_and_off_in_evaluation():
    _, layer = adapted("llama4", dropout=0.4)
    (x,) = arguments("llama4")
    torch.manual_seed(1)
    found = layer.train()(x)
    torch.manual_seed(1)
    first = F.dropout(x.view(E, 2, H), 0.4)
    up, down = (part.factor_matrices() for part in layer.by_weight().values())
    h = x.view(E, 2, H) @ layer.gate_up_proj + 2.0 * first @ up[0].mT @ up[1].mT
    gate, linear = h.chunk(2, -1)
    act = linear * F.silu(gate)
    wanted = act @ layer.down_proj + 2.0 * F.dropout(act, 0.4) @ down[0].mT @ down[1].mT
    torch.testing.assert_close(found, wanted.flatten(0, 1))
    whole = adapted("llama4")[1].eval()(x)
    assert same_bits(layer.eval()(x), whole) and not torch.allclose(found, whole)


@both
@pytest.mark.parametrize("make", [tiny_qwen3_moe, tiny_mixtral])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_implementation_in_a_model(make, implementation, dtype):
    model = make(dtype, implementation=implementation)
    before, base = model(IDS).logits, base_bits(model)
    apply_lora(model, CONFIG)
    assert same_bits(model(IDS).logits, before)
    fill(model, std=0.1)
    unmerged = model(IDS).logits
    assert (unmerged - before).abs().max() > 5e-3
    atol = 1e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(merge_lora(model)(IDS).logits, unmerged, rtol=0, atol=atol)
    assert base_bits(unmerge_lora(model)) == base


@both
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_checkpointing_with_dropout_gives_the_same_gradients(implementation):
    plain, again = (dropout_gradients(tiny_qwen3_moe(implementation=implementation), checkpointed) for checkpointed in (False, True))
    assert len(plain) == 12 and all(gradient.any() for gradient in plain)
    torch.testing.assert_close(plain, again)


def test_autocast_keeps_adapters_in_float32():
    model = fill(apply_lora(tiny_qwen3_moe(), CONFIG), std=0.1)
    wanted = model(IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(IDS).logits.float(), wanted, rtol=0, atol=0.02)
    assert all(p.dtype == torch.float32 for p in model.bfloat16().parameters() if p.requires_grad)


def test_what_does_not_fit_is_refused_by_name():
    module = experts(tiny_qwen3_moe())

    def message(module=module, **fields):
        return refusal(module, LayerSpec(LoRAConfig(**fields), 2, 4.0, "mlp.experts"))

    assert message() is None and message(dropout=0.1) is None and message(variant="lora_fa") is None
    assert "variant='dora' scales a layer's outputs" in message(variant="dora")
    assert "variant='adalora' pairs" in message(variant="adalora")
    assert "variant='vera' shares" in message(variant="vera")
    assert "gate_up_proj: init='pissa' pairs" in message(init="pissa")
    module.config._experts_implementation = "deepgemm"
    assert "does not see the products of experts_implementation='deepgemm'" in message()
    module.config._experts_implementation = "eager"
    packed = copy.deepcopy(module)  # nobody says what its scales are
    packed._parameters["down_proj"] = nn.Parameter(module.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert "stores its down_proj as torch.float8_e4m3fn" in message(packed)
    module._parameters["down_proj"] = nn.Parameter(torch.zeros(4, 4))
    assert "down_proj: its shape (4, 4) is not one matrix per expert" in message()


def test_an_implementation_chosen_later_raises_and_says_what_to_choose():
    def reads_entries(self, hidden_states, *_):
        return hidden_states * self.gate_up_proj.sum()

    class Reads(Qwen3MoeExperts):
        forward = reads_entries

    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=W, num_experts=E)
    config._experts_implementation = "eager"
    model = apply_lora(nn.ModuleDict({"experts": Reads(config)}), CONFIG)
    with pytest.raises(AttributeError, match=r"sum of a weight with LoRA is not known: .*set_experts_implementation\('grouped_mm'\)"):
        model["experts"](torch.randn(2, H))
