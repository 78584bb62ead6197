"""What is recognised in real models, that it changes no number and no name, and that it can be undone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertModel,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, quantize_base, unload_lora
from lightning_lora.layers.adapting import adapt, unadapt
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.model import fuse as fuse_module
from lightning_lora.model.compile import compile_layers
from lightning_lora.model.fuse import GatedMLP, fuse, unfuse
from lightning_lora.ops import backends, plain
from tests.conftest import fill

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
IDS = torch.arange(12).view(2, 6)


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False))


MODELS = {
    "llama": (llama, 2, True),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, head_dim=8, use_cache=False)), 2, True),
    "gemma": (lambda: GemmaForCausalLM(GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=8, use_cache=False)), 2, False),  # GELU
    "bert": (lambda: BertModel(BertConfig(**SIZES)), 1, False),
}


def adapted(name, quantize=None, **options):
    torch.manual_seed(0)
    make, *_ = MODELS[name]
    base = make() if quantize is None else quantize_base(make(), quantize)
    return fill(apply_lora(base, config=LoRAConfig(rank=3, target_modules="all-linear", **options))).eval()


def run(model):
    model.zero_grad()
    out = model(input_ids=IDS)
    out = out.logits if hasattr(out, "logits") else out.last_hidden_state
    out.square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in get_lora_parameters(model) if p.grad is not None)]  # BERT's pooler is not used


@pytest.mark.parametrize("name", MODELS)
def test_recognised_and_the_same_numbers(name):
    _, groups, gated = MODELS[name]
    model = adapted(name)
    keys, classes = list(model.state_dict()), [type(m).__name__ for m in model.modules()]
    assert len(fuse(model)) == groups * 2  # fusing again finds the same
    assert sum(isinstance(m, GatedMLP) for m in model.modules()) == 2 * gated
    fused = run(model)
    unfuse(model)
    assert not any(isinstance(m, GatedMLP) or getattr(m, "shared_input", None) for m in model.modules())
    assert_close(fused, run(model))
    assert (keys, classes) == (list(model.state_dict()), [type(m).__name__ for m in model.modules()])


def test_a_model_without_adapters_has_nothing_to_fuse():
    model = llama()
    assert fuse(model) == []
    assert not any(isinstance(m, GatedMLP) for m in model.modules())


def test_unloading_takes_everything_back():
    model, before = adapted("llama"), [type(m) for m in llama().modules()]
    unload_lora(model)
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    model = adapted("llama")
    twin = copied(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert_close(run(twin), run(model))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(*size, bias=False) for size in ((16, 24), (16, 24), (24, 16)))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states):
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class Other(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))  # the other way round


class Half(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 0.5


def mlp(cls=MLP, targets=("gate_proj", "up_proj", "down_proj"), quantize=None, **options):
    torch.manual_seed(0)
    base = nn.Sequential(cls()) if quantize is None else quantize_base(nn.Sequential(cls()), quantize)
    return fill(apply_lora(base, config=LoRAConfig(rank=3, target_modules=targets, **options)))[0]


def test_a_gated_mlp_is_known_by_its_instructions():
    assert isinstance(mlp(), GatedMLP)
    assert not any(isinstance(mlp(cls), GatedMLP) for cls in (Other, Half))
    assert not isinstance(mlp(targets=("gate_proj", "up_proj")), GatedMLP)
    relu = MLP()
    relu.act_fn = nn.ReLU()
    apply_lora(nn.Sequential(relu), config=LoRAConfig(target_modules="all-linear"))
    assert not isinstance(relu, GatedMLP)


def test_undone_below_a_class_that_was_put_on_top(monkeypatch):
    """As FSDP2 does; once unloaded the module is plain, and fused again when adapters come again."""
    model = nn.Sequential(mlp())
    model[0].__class__ = type("FSDPMLP", (type(model[0]),), {"wrapped": True})
    monkeypatch.setattr(backends, "worth_kernels", lambda x: True)
    unload_lora(model)
    assert type(model[0]).__name__ == "FSDPMLP" and model[0].wrapped and isinstance(model[0], MLP)
    assert not isinstance(model[0], GatedMLP) and "lora_groups" not in model[0].__dict__
    assert_close(model(torch.ones(2, 16)), MLP.forward(model[0], torch.ones(2, 16)))
    apply_lora(model, config=LoRAConfig(rank=3, target_modules="all-linear"))
    assert isinstance(model[0], GatedMLP) and isinstance(model[0], MLP) and model[0].wrapped


def test_one_projection_without_its_adapter_is_computed_as_written(monkeypatch):
    model = mlp()
    expected = model(torch.ones(2, 16))
    unload_lora(model.up_proj)
    monkeypatch.setattr(backends, "worth_kernels", lambda x: True)
    assert model(torch.ones(2, 16)).shape == expected.shape


def hooked(model):
    model.up_proj.register_forward_hook(lambda module, inputs, output: output * 2)


def merged(model):
    model.up_proj.merge_weights()


def training_weight(model):
    model.up_proj.weight.requires_grad_()


def other_dropout(model):
    model.train()
    model.up_proj.lora_dropout.p = 0.5


def nothing(model):
    pass


def dora(model, **options):
    unload_lora(model)
    fill(apply_lora(model, config=LoRAConfig(rank=3, variant="dora", target_modules="all-linear", **options)))
    assert isinstance(model, GatedMLP)


def doras_dropout(model):
    """It acts on the base's product too."""
    dora(model, dropout=0.5)
    model.train()


def mixed(model):
    """One projection has a scale, the others have none."""
    down = unadapt(model.down_proj)
    fill(adapt(down, LayerSpec(LoRAConfig(rank=3, variant="dora"), 3, 6.0)))


def own_output(model):
    """As a variant of another package might do."""
    layer = model.up_proj
    layer.__class__ = type("Loud", (type(layer),), {"lora_output": lambda self, z: 2 * z})


SERVED = {"not": nothing, "dora": dora}
STEPS_ASIDE = {
    **SERVED,
    "dora's dropout": doras_dropout,
    "mixed": mixed,
    "own output": own_output,
    "hook": hooked,
    "merged": merged,
    "trained weight": training_weight,
    "dropout": other_dropout,
}


@pytest.mark.parametrize(("case", "quantize"), [*((case, None) for case in STEPS_ASIDE), ("not", "nf4"), ("hook", "nf4"), ("not", "int8")])
def test_steps_aside_by_rule(case, quantize, monkeypatch):
    """With kernels that serve, the fused pass is taken only where it means the same."""
    pytest.importorskip("triton")
    model, x = mlp(quantize=quantize), torch.randn(5, 16)
    STEPS_ASIDE[case](model)
    torch.manual_seed(1)
    expected = model(x)
    if case == "own output":
        assert not torch.allclose(expected, mlp()(x))
    monkeypatch.setattr(backends, "worth_kernels", lambda x: True)
    taken = []
    run_fused = fuse_module.lora_gated_mlp
    monkeypatch.setattr(fuse_module, "lora_gated_mlp", lambda *args: taken.append(1) or run_fused(*args))
    monkeypatch.setattr("lightning_lora.ops.fused_linear._backend", lambda fast: plain)
    torch.manual_seed(1)
    assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert taken == ([1] if case in SERVED and quantize != "int8" else [])


def test_deterministic_algorithms_are_respected(monkeypatch):
    monkeypatch.setattr(backends, "worth_kernels", lambda x: True)
    monkeypatch.setattr("lightning_lora.ops.fused_linear._backend", lambda fast: plain)
    monkeypatch.setattr("lightning_lora.model.fuse.lora_gated_mlp", lambda *args: pytest.fail("its sums are not deterministic"))
    torch.use_deterministic_algorithms(True)
    try:
        mlp()(torch.randn(5, 16))
    finally:
        torch.use_deterministic_algorithms(False)


def test_fifty_steps_in_bf16_lose_as_the_definition_does():
    """Losses of AdamW on a bf16 base with fp32 adapters, fused and layer by layer, within 1e-3 all the way."""

    def losses(fused):
        torch.manual_seed(0)
        model, ids = llama().bfloat16(), torch.randint(50, (8, 32))
        apply_lora(model, config=LoRAConfig(rank=4, alpha=8, target_modules="all-linear"))
        if not fused:
            unfuse(model)
        optimizer = torch.optim.AdamW(get_lora_parameters(model), lr=1e-3)
        values = []
        for _ in range(50):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    together, alone = losses(True), losses(False)
    assert together[-1] < together[0] - 0.05
    assert together == pytest.approx(alone, abs=1e-3)


def test_a_model_with_scales_is_as_its_layers_one_by_one(monkeypatch):
    """Under the interpreter: siblings, output projections and the gated MLP in one operation each, and every gradient."""
    pytest.importorskip("triton")
    model = adapted("llama", variant="dora")
    with torch.no_grad():  # scales near 1, as they are
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.copy_(model.get_submodule(name.rpartition(".")[0]).norm() * (1 + 0.2 * p))
    alone = copy.deepcopy(model)
    unfuse(alone)
    expected = run(alone)
    taken, operation = [], GatedMLP.forward.__globals__["lora_gated_mlp"]
    monkeypatch.setattr("lightning_lora.model.fuse.lora_gated_mlp", lambda *args: taken.append(len(args[-1])) or operation(*args))
    monkeypatch.setattr(backends, "worth_kernels", lambda x: True)
    assert_close(run(model), expected, rtol=1e-3, atol=1e-5)
    assert taken == [3, 3]


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("quantize", "checkpointed", "variant"),
    [(None, False, "plain"), ("nf4", False, "plain"), ("nf4", True, "plain"), (None, False, "dora")],
)
def test_compiled_blocks_are_one_graph_with_the_fused_operations(quantize, checkpointed, variant, monkeypatch):
    """With kernels that serve (here under the interpreter): siblings, the output projection and the gated MLP, in every block."""
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "worth_kernels", lambda x: True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = adapted("llama", quantize, variant=variant).train()
    model.enable_input_require_grads()  # else the first block's graph has no gradient for its input
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    eager = run(model)
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers(model, backend=counter)
    for _ in range(2):
        assert_close(run(model), eager)
    assert counter.frame_count == 1 and not torch._dynamo.utils.counters["graph_break"]
    inside = next((module for name, module in counter.graphs[0].named_children() if name.startswith("wrap_body")), counter.graphs[0])
    calls = [node for node in inside.graph.nodes if str(node.target) == "autograd_function_apply"]
    assert len(calls) == 3
