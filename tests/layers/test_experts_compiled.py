"""Experts under ``torch.compile``: part of the blocks' graph where their implementation can be traced, with the eager gradients."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lightning_lora import LoRAConfig, apply_lora, disabled_lora, merge_lora, quantize_base, unmerge_lora
from lightning_lora.model.compile import compile_layers, uncompile_layers
from lightning_lora.utils import transformers_experts
from tests.conftest import fill
from tests.layers import mixtures
from tests.layers.experts import tiny_mixtral, tiny_qwen3_moe
from tests.layers.mixtures import CONFIG, IDS, experts
from tests.layers.test_experts import adapted, arguments, build

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # Dynamo's own, after a break
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),  # in transformers, frozen models too
]


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(run, x, layer):
    """The output, and the gradients of x and of the adapters."""
    y = run(x)
    return y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.lora_parameters().values()])


def counted(module):
    """Compile a module; its counter of graphs."""
    counter = CompileCounter()
    module.compile(backend=counter)
    return counter


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_one_graph_with_the_eager_gradients(name, implementation):
    """float64, in which torch has no grouped product: the same numbers come from the loop over experts."""
    _, layer = adapted(name)
    x, index, share = arguments(name)
    wanted = step(lambda x: layer(x, index, share), x, layer)
    layer.config._experts_implementation = implementation
    counter = counted(layer)
    torch.testing.assert_close(step(lambda x: layer(x, index, share), x, layer), wanted)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4"])
def test_others_run_as_they_are_between_compiled_parts(name):
    """A loop over the experts that have tokens, and a forward of the model's own."""
    _, layer = adapted(name)
    x, *routed = arguments(name)
    wanted = step(lambda x: layer(x, *routed), x, layer)
    counter = counted(layer)
    torch.testing.assert_close(step(lambda x: layer(x, *routed), x, layer), wanted)
    assert counter.frame_count == 0


@pytest.mark.parametrize("make", [tiny_qwen3_moe, tiny_mixtral])
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_compiled_blocks_have_as_many_graphs_as_the_frozen_model(make, implementation):
    frozen = make(torch.bfloat16, implementation=implementation)
    model = fill(apply_lora(copy.deepcopy(frozen), CONFIG), std=0.1)
    wanted, counters = model(IDS).logits, []
    for each in (frozen, model):
        counters.append(CompileCounter())
        compile_layers(each, backend=counters[-1])
        with torch.no_grad():
            found = each(IDS, use_cache=False).logits
        uncompile_layers(each)
        torch.compiler.reset()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)
    assert counters[0].frame_count == counters[1].frame_count == 1


def test_dropout_disabling_and_merging():
    base = tiny_qwen3_moe(torch.float64, implementation="batched_mm")
    model = fill(apply_lora(base, LoRAConfig(rank=2, dropout=0.5, target_modules=["experts"])), std=0.3)
    layer = experts(model)
    x, *routed = mixtures.routed(layer, torch.float64)
    whole = layer.eval()(x, *routed)
    with disabled_lora(model):
        base = layer(x, *routed)
    counted(layer)
    torch.manual_seed(3)
    dropped = layer.train()(x, *routed)
    assert not torch.allclose(dropped, whole, atol=1e-3)
    torch.testing.assert_close(layer.eval()(x, *routed), whole)
    with disabled_lora(model):
        torch.testing.assert_close(layer(x, *routed), base)
    merge_lora(model)
    torch.testing.assert_close(layer(x, *routed), whole)
    torch.testing.assert_close(unmerge_lora(model).get_submodule("model.layers.0.mlp.experts")(x, *routed), whole)


def test_a_forward_that_does_more_runs_as_it_is():
    class Doubled(Qwen3MoeExperts):
        def forward(self, *args):
            return 2 * super().forward(*args)

    model = tiny_qwen3_moe(implementation="batched_mm")
    plain, layer = copy.deepcopy(experts(model)), experts(model)
    layer.__class__ = Doubled
    for each in (plain, layer):
        fill(apply_lora(torch.nn.ModuleDict({"experts": each}), CONFIG), std=0.3)
    x, routed = torch.randn(2, 32, generator=torch.Generator().manual_seed(1)), (torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2))
    counter = counted(layer)
    torch.testing.assert_close(layer(x, *routed), 2 * plain(x, *routed))
    assert counter.frame_count == 0


def test_without_transformers_functions_of_those_names_experts_run_as_they_are(monkeypatch):
    import transformers.integrations.moe as moe

    assert set(transformers_experts.traced_experts(Qwen3MoeExperts, max)) == {"batched_mm", "grouped_mm"}
    monkeypatch.delattr(moe, "_grouped_linear")
    assert set(transformers_experts.traced_experts(Qwen3MoeExperts, max)) == {"batched_mm"}
    monkeypatch.delattr(moe, "batched_mm_experts_forward")
    assert transformers_experts.traced_experts(Qwen3MoeExperts, max) == {}


@pytest.mark.parametrize(("how", "implementation"), [("fp8", "grouped_mm"), ("nf4", "batched_mm")])
def test_packed_experts_are_part_of_the_graph(how, implementation):
    """Frozen ones, whose input needs no gradient, and adapted ones; with the eager numbers."""
    frozen = quantize_base(build("qwen3_moe", 16, 8).bfloat16(), how, targets=["experts"])
    model = fill(apply_lora(copy.deepcopy(frozen), CONFIG), std=0.1)
    x, index, share = arguments("qwen3_moe", 16)
    for layer, needs in ((frozen["experts"], False), (model["experts"], True)):
        layer.config._experts_implementation = implementation
        given = x.detach().bfloat16().requires_grad_(needs)
        leaves = [given] * needs + [p for p in layer.parameters() if p.requires_grad]
        results, counter = [], None
        for _ in range(2):  # eager, then compiled
            y = layer(given, index, share.bfloat16())
            results.append((y.detach(), torch.autograd.grad(y.square().sum(), leaves) if leaves else ()))
            counter = counter or counted(layer)
        torch.testing.assert_close(*results)
        assert counter.frame_count == 1


@pytest.mark.parametrize("needs", [False, True])
def test_a_frozen_fp8_linear_is_part_of_the_graph(needs):
    """Also before the first adapter, where the input needs no gradient."""
    model = quantize_base(torch.nn.Sequential(torch.nn.Linear(32, 32)), "fp8")
    counter = counted(model)
    model(torch.randn(4, 32, requires_grad=needs))
    assert counter.frame_count == 1
