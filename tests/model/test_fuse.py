"""What is recognised in real models, that it changes no number and no name, and that it can be undone."""

import copy
import pickle

import pytest
import torch
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
from lightning_lora.model.compile import compile_layers
from lightning_lora.model.fuse import GatedMLP, fuse, unfuse
from lightning_lora.ops import backends
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
