"""The options of experts: factors that all experts share, and a rank divided by the number of experts that a token meets."""

import copy

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, merge_lora, unload_lora, unmerge_lora
from lightning_lora.layers.adapting import refusal
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.model.targeting import find_targets
from tests.conftest import base_bits, fill, same_bits
from tests.layers.experts import tiny_qwen3_moe
from tests.layers.test_experts import E, H, W, adapted, arguments, build, definition

SHARED = {"experts": {"shared_outer": True}}
NAMES = ["qwen3_moe", "gpt_oss", "llama4", "nemotron_h"]
every = pytest.mark.parametrize("name", NAMES)


def each_experts(layer):
    """Parameter → that of all experts, a shared one repeated; with gradients to the parameters."""
    found = {}
    for key, parameter in layer.lora_parameters().items():
        shared = key == "lora_B_down_proj" or (key.startswith("lora_A") and key != "lora_A_down_proj")
        found[key] = parameter.repeat(E, 1) if shared else parameter
    return found


@every
def test_outputs_and_gradients_are_those_of_repeated_factors(name):
    _, layer = adapted(name, kind_options=SHARED)
    x, *routed = arguments(name)
    parameters = [*layer.lora_parameters().values()]
    found, wanted = layer(x, *routed), definition(name, layer, each_experts(layer), x, *routed)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    mine, theirs = (torch.autograd.grad((y * weights).sum(), [x, *parameters]) for y in (found, wanted))
    torch.testing.assert_close(mine, theirs)
    assert all(gradient.any() for gradient in mine)


def test_shapes_and_counts():
    _, layer = adapted("qwen3_moe", kind_options=SHARED)
    shapes = {key: tuple(parameter.shape) for key, parameter in layer.lora_parameters().items()}
    assert shapes == {
        "lora_A_gate_up_proj": (3, H), "lora_B_gate_up_proj": (E * 2 * W, 3), "lora_A_down_proj": (E * 3, W), "lora_B_down_proj": (H, 3),
    }  # fmt: skip
    report = find_targets(build("qwen3_moe"), LoRAConfig(rank=3, target_modules=["experts"], kind_options=SHARED))
    assert report.parameters == sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)


@every
def test_merge_unmerge_and_unload(name):
    base = build(name)
    model, layer = adapted(name, kind_options=SHARED)
    given = arguments(name)
    unmerged = layer(*given)
    torch.testing.assert_close(merge_lora(model)["experts"](*given), unmerged)
    assert base_bits(unmerge_lora(model)) == base_bits(base) and same_bits(layer(*given), unmerged)
    assert base_bits(unload_lora(model)) == base_bits(base)


def test_the_start_changes_nothing_and_only_what_it_should_is_random():
    model = apply_lora(build("qwen3_moe"), LoRAConfig(rank=3, target_modules=["experts"], kind_options=SHARED))
    assert same_bits(model["experts"](*arguments("qwen3_moe")), build("qwen3_moe")["experts"](*arguments("qwen3_moe")))
    for key, parameter in model["experts"].lora_parameters().items():
        assert parameter.any() == key.startswith("lora_A")


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_compiled(implementation):
    _, layer = adapted("qwen3_moe", kind_options=SHARED)
    x, *routed = arguments("qwen3_moe")
    parameters = [x, *layer.lora_parameters().values()]
    wanted = torch.autograd.grad(layer(x, *routed).square().sum(), parameters)
    layer.config._experts_implementation = implementation
    layer.compile(backend="eager", fullgraph=True)
    try:
        torch.testing.assert_close(torch.autograd.grad(layer(x, *routed).square().sum(), parameters), wanted)
    finally:
        torch.compiler.reset()


def test_the_rank_is_divided_by_the_experts_that_a_token_meets():
    options = {"experts": {"rank_over_active": True}}
    fields = {"rank": 6, "alpha": 12, "target_modules": ["experts", "q_proj"], "kind_options": options}
    report = find_targets(tiny_qwen3_moe(), LoRAConfig(**fields))  # two of eight experts a token
    assert {target.fqn.rpartition(".")[2]: (target.rank, target.alpha) for target in report.targets} == {
        "experts": (3, 12),
        "q_proj": (6, 12),
    }
    assert [line.split()[-4:-2] for line in str(report).splitlines() if "Experts" in line] == [["3", "12"]]
    named = find_targets(tiny_qwen3_moe(), LoRAConfig(**fields, rank_pattern={"layers.0.mlp.experts": 5}))
    assert [target.rank for target in named.targets if "experts" in target.fqn] == [5, 3]
    model = apply_lora(tiny_qwen3_moe(), LoRAConfig(**fields))
    assert model.get_submodule("model.layers.0.mlp.experts").rank == 3 and model.get_submodule("model.layers.0.self_attn.q_proj").rank == 6
    assert apply_lora(model, LoRAConfig(**fields)) is model


def test_a_rank_that_cannot_be_divided_is_refused_by_name():
    model, options = tiny_qwen3_moe(), {"experts": {"rank_over_active": True}}
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.experts' .*rank=7 is no multiple of the 2 experts that a token meets"):
        find_targets(model, LoRAConfig(rank=7, target_modules=["experts"], kind_options=options))
    config = LoRAConfig(rank=8, target_modules=["experts"], kind_options=options)
    with pytest.raises(ValueError, match=r"'experts' .*nothing says how many of its experts a token meets"):
        find_targets(build("llama4"), config)
    llama4 = build("llama4")
    llama4.config = copy.copy(model.config)
    assert find_targets(llama4, config).targets[0].rank == 4  # by the model's config


def test_options_of_experts_that_are_passed_over_are_refused_with_the_reason():
    config = LoRAConfig(target_modules="all-linear", variant="dora", kind_options=SHARED)
    with pytest.raises(ValueError, match=r"no target is of that kind: 'all-linear' passes over model.layers.\*.mlp.experts .*'dora'"):
        find_targets(tiny_qwen3_moe(), config)


def test_wrong_options_are_refused():
    def message(**fields):
        with pytest.raises(ValueError) as caught:
            find_targets(tiny_qwen3_moe(), LoRAConfig(target_modules=["q_proj"], **fields))
        return str(caught.value)

    assert "kind_options: kind='expert' is not known; there are" in message(kind_options={"expert": {"shared_outer": True}})
    assert "kind_options['experts']['shared']=True is not known to kind 'experts'; it takes rank_over_active, shared_outer" in message(
        kind_options={"experts": {"shared": True}}
    )
    assert "kind_options['experts']['shared_outer']=1: give true or false" in message(kind_options={"experts": {"shared_outer": 1}})
    assert "kind_options['experts']: no target is of that kind" in message(kind_options=SHARED)
    assert "kind_options['linear']['x']=1 is not known to kind 'linear'; it takes none" in message(kind_options={"linear": {"x": 1}})
    with pytest.raises(ValueError, match=r"kind_options=\[1\]: give a mapping from kind to its options"):
        LoRAConfig(kind_options=[1])
    with pytest.raises(ValueError, match=r"kind_options\['experts'\]=3: give a mapping from option to value"):
        LoRAConfig(kind_options={"experts": 3})
    assert LoRAConfig(kind_options={"experts": {}}) == LoRAConfig()
    config = LoRAConfig(kind_options=SHARED, rank=2)
    assert LoRAConfig(**config.to_dict()) == config
    jetmoe = build("jetmoe")["experts"]
    assert "shared_outer shares factors of the projections up and down" in refusal(jetmoe, LayerSpec(config, 2, 4.0, "experts"))


@pytest.mark.parametrize("init", ["pissa", "olora", "mica", "orthogonal"])
def test_inits_from_whole_weights_are_refused(init):
    spec = LayerSpec(LoRAConfig(rank=2, init=init, kind_options=SHARED), 2, 4.0, "experts")
    assert "groups" in refusal(build("qwen3_moe")["experts"], spec)


def test_models_of_several_variants_share_too():
    model = apply_lora(build("gpt_oss"), LoRAConfig(rank=3, variant="lora_fa", target_modules=["experts"], kind_options=SHARED))
    fill(model, std=0.3)
    trained = {key for key, parameter in model["experts"].named_parameters() if parameter.requires_grad}
    assert trained == {"lora_B_gate_up_proj", "lora_B_down_proj"} and isinstance(model["experts"], nn.Module)
