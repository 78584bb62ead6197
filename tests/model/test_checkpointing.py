"""Checkpointed blocks: exact gradients, bytes between all and none, attention computed once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, apply_lora, checkpoint_layers, compile_layers, get_lora_parameters
from lightning_lora.model.checkpointing import Checkpointed
from lightning_lora.utils.blocks import repeated_blocks

pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # the compiler's own doing
)
BLOCKS, WIDTH, TOKENS = 3, 32, 24
EXACT = {"rtol": 1e-12, "atol": 1e-14}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def llama(dropout: float = 0.1) -> Any:
    """In float64, with adapters that do something."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=BLOCKS, **sizes)
    model = apply_lora(
        transformers.LlamaForCausalLM(config).train(), config=LoRAConfig(rank=2, dropout=dropout, target_modules="all-linear")
    )
    for parameter in get_lora_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    return model.double()


def gradients(model: nn.Module, **inputs: Any) -> list[Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(32, (2, TOKENS))
    model(input_ids=ids, labels=ids, **inputs).loss.backward()
    return [p.grad for p in get_lora_parameters(model)]  # type: ignore[misc]


class Attentions(TorchDispatchMode):
    """Counts attention's forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "attention" in str(op) and "backward" not in str(op)
        return op(*args, **(kwargs or {}))


def kept_bytes(forward: Any) -> int:
    """What a forward pass allocates and leaves allocated."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = forward()
    del result
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())


def backend() -> tuple[Any, list[list[str]]]:
    """A compiler that partitions as the default one does; and the operations of each graph."""
    graphs: list[list[str]] = []

    def compiler(graph: Any, _: Any) -> Any:
        # What draws random numbers in both graphs (attention, for its dropout) is an argument of what sets the generator for it.
        called = [(node.target, *(arg for arg in node.args if isinstance(arg, OpOverload))) for node in graph.graph.nodes]
        graphs.append([str(op) for ops in called for op in ops])
        return make_boxed_func(graph)

    return aot_autograd(fw_compiler=compiler, partition_fn=min_cut_rematerialization_partition), graphs


@pytest.mark.parametrize(("keep", "times"), [("inputs", 2), ("attention", 1)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradients_are_exact_and_attention_runs_so_often(keep: Any, times: int, dropout: float) -> None:
    expected, model = gradients(llama(dropout)), llama(dropout)
    checkpoint_layers(model, keep=keep)
    with Attentions() as attentions:
        found = gradients(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert attentions.count == times * BLOCKS


def test_bytes_kept_are_between_those_of_none_and_all() -> None:
    def kept(*keep: Any) -> int:
        model = llama()
        for each in keep:
            checkpoint_layers(model, keep=each)
        return kept_bytes(lambda: model(input_ids=torch.zeros(2, TOKENS, dtype=torch.long)).logits)

    inputs, attention, everything = kept("inputs"), kept("attention"), kept()
    result = 2 * TOKENS * WIDTH * 8
    lse = 2 * TOKENS * 4 * 8
    assert attention - inputs == BLOCKS * (result + lse)
    assert everything > 3 * attention


@pytest.fixture(scope="module")
def compiled() -> list[Tensor]:
    """The gradients of compiled blocks without checkpoints."""
    model = llama()
    compile_layers(model, backend=backend()[0])
    return gradients(model)


@pytest.mark.parametrize("first", ["compile", "checkpoint"])
@pytest.mark.parametrize("keep", ["inputs", "attention"])
def test_a_compiled_block_computes_the_rest_again_in_its_backward_graph(keep: Any, first: str, compiled: list[Tensor]) -> None:
    model = llama()
    compiler, graphs = backend()
    if first == "compile":
        compile_layers(model, backend=compiler)
    handle = checkpoint_layers(model, keep=keep)
    if first == "checkpoint":
        compile_layers(model, backend=compiler)
    torch.testing.assert_close(gradients(model), compiled, **EXACT)  # also the dropout
    forward, backward = graphs[0], graphs[-1]
    attentions = [sum("attention" in op and "backward" not in op for op in graph) for graph in (forward, backward)]
    assert attentions == [1, 1 if keep == "inputs" else 0]
    assert sum("silu" in op or "sigmoid" in op for op in backward) >= 1
    assert len(graphs) <= 4  # the first block's input needs no gradient
    handle.remove()
    assert not any(isinstance(module, Checkpointed) for module in model.modules())


def test_under_autocast_too() -> None:
    def run(model: Any) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(model.float())

    model = llama()
    checkpoint_layers(model)
    torch.testing.assert_close(run(model), run(llama()), rtol=0, atol=0)


def test_a_cache_that_the_model_makes_is_left_out_and_one_with_tokens_is_refused() -> None:
    expected, model = gradients(llama()), llama()
    checkpoint_layers(model)
    torch.testing.assert_close(gradients(model, use_cache=True), expected, rtol=0, atol=0)
    with torch.no_grad():
        cache = model(input_ids=torch.zeros(2, 4, dtype=torch.long), use_cache=True).past_key_values
    assert cache.get_seq_length() == 4
    with pytest.raises(RuntimeError, match=r"past_key_values holds tokens.*use_cache=False"):
        gradients(model, past_key_values=cache)


def test_removal_restores_the_classes_and_copies_have_no_checkpoints() -> None:
    model = llama()
    names = [type(block) for _, block in repeated_blocks(model)]
    handle = checkpoint_layers(model)
    assert all(isinstance(block, Checkpointed) for _, block in repeated_blocks(model))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(block) for _, block in repeated_blocks(twin)] == names
        torch.testing.assert_close(gradients(twin), gradients(llama()), rtol=0, atol=0)
    handle.remove()
    assert [type(block) for _, block in repeated_blocks(model)] == names
    assert not any("kept_for_backward" in vars(block) for _, block in repeated_blocks(model))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_of_any_module_are_checkpointed() -> None:
    model = Own().double()
    x = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    checkpoint_layers(model)
    (found,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(found, expected)
    assert checkpoint(model, x, use_reentrant=False).grad_fn is not None


def test_refusals() -> None:
    with pytest.raises(ValueError, match="keep='all' is not known"):
        checkpoint_layers(Own(), keep="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear has no repeated blocks to checkpoint"):
        checkpoint_layers(nn.Linear(2, 2))
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match=r"has gradient checkpointing switched on already: switch it off"):
        checkpoint_layers(model)
    model = llama()
    checkpoint_layers(model)
    with pytest.raises(ValueError, match=r"model\.layers\.0 has gradient checkpointing switched on already"):
        checkpoint_layers(model)
