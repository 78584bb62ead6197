"""Layers under compilers and transforms: torch.compile, functional_call and autocast."""

import pytest
import torch

from lightning_lora import LoRAConfig, apply_lora, merge_lora, unload_lora, unmerge_lora
from tests.conftest import TinyModel, fill
from tests.layers.kinds import CASES


def counting_backend(graphs, backend="eager"):
    def compile_graph(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    return compile_graph


@pytest.mark.parametrize("kind", ["linear", "hf-conv1d", "embedding", "conv2d-groups"])
def test_compiled_layers_of_one_class_share_one_graph_and_never_recompile(kind):
    torch._dynamo.reset()
    case, graphs = CASES[kind], []
    layers = [case.layer() for _ in range(3)]
    for seed, layer in enumerate(layers):
        fill(layer, seed)
    step = torch.compile(lambda layer, x: layer(x), backend=counting_backend(graphs), fullgraph=True)
    optimizer = torch.optim.SGD([p for layer in layers for p in layer.lora_parameters().values()], lr=0.01)
    for _ in range(2):
        for layer in layers:
            out = step(layer, case.x())
            torch.testing.assert_close(out, layer(case.x()))
            out.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(graphs) == 1


def test_a_compiled_model_trains_as_an_eager_one(make, ids):
    torch._dynamo.reset()
    config = LoRAConfig(target_modules=["q_proj", "v_proj", "embed"], rank=2)
    graphs, losses = [], []
    for compiled in (False, True):
        model = fill(apply_lora(make(TinyModel), config=config))
        run = torch.compile(model, backend=counting_backend(graphs, "aot_eager"), fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            loss = run(ids).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)
    assert losses[0] != losses[2]
    assert len(graphs) == 1


def test_a_compiled_model_follows_merge_and_unmerge(make, ids):
    torch._dynamo.reset()
    model = fill(apply_lora(make(TinyModel), config=LoRAConfig(target_modules=["q_proj"], rank=2)))
    compiled, before = torch.compile(model, backend="eager"), model(ids)
    torch.testing.assert_close(compiled(ids), before)
    merge_lora(model)
    torch.testing.assert_close(compiled(ids), before)
    unmerge_lora(model)
    torch.testing.assert_close(compiled(ids), before)
    unload_lora(model)
    torch.testing.assert_close(compiled(ids), make(TinyModel)(ids))


@pytest.mark.parametrize("kind", ["linear", "hf-conv1d", "embedding", "conv2d"])
def test_functional_call_and_grad(kind):
    case = CASES[kind]
    layer, x = case.layer(), case.x()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(trained):
        return torch.func.functional_call(layer, {**parameters, **trained}, x).square().sum()

    trained = {name: parameters[name] for name in ("lora_A", "lora_B")}
    grads = torch.func.grad(loss)(trained)
    layer(x).square().sum().backward()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, layer.get_parameter(name).grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "linear-subclass", "hf-conv1d", "conv2d"])
def test_autocast_runs_in_bf16_and_keeps_fp32_gradients(kind):
    case = CASES[kind]
    layer, x = case.layer(), case.x()
    full = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    if kind != "linear-subclass":
        assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), full, rtol=0.05, atol=0.05 * full.abs().max().item())
    y.float().square().sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
