from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing, checkpoint_wrapper

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, merge_lora, unmerge_lora
from lightning_lora.model import compile as compile_module
from lightning_lora.model.compile import compile_layers, keep_gradients, uncompile_layers
from lightning_lora.ops import backends
from lightning_lora.utils.blocks import repeated_blocks

pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # the compiler's own doing
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def llama(blocks: int = 2, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": blocks}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, use_cache=False, **sizes)).train()
    return apply_lora(model, config=LoRAConfig(rank=2, dropout=dropout, target_modules="all-linear"))


class Block(nn.Module):
    tag = "x"

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.fc, self.inner = nn.Linear(8, 8), inner or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(self.fc(x).relu()) * len(self.tag)


def stack() -> nn.Module:
    """Blocks with adapters that do something."""
    torch.manual_seed(0)
    model = apply_lora(nn.Sequential(*(Block() for _ in range(3))), config=LoRAConfig(rank=2, target_modules=["fc"]))
    for parameter in get_lora_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model.double()


def step(model: Any, rows: int = 2, length: int = 8) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """A batch's loss, and the gradients if it has any."""
    torch.manual_seed(rows * 100 + length)
    ids = torch.randint(0, 32, (rows, length))
    loss = model(input_ids=ids, labels=ids).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, trained)) if loss.requires_grad else []


CHECKPOINTING = {
    "none": lambda model: None,
    "hf": lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),
    "torch": lambda model: apply_activation_checkpointing(model, checkpoint_wrapper, lambda m: type(m).__name__ == "LlamaDecoderLayer"),
}


@pytest.mark.parametrize(
    ("checkpointing", "first", "dropout"),
    [
        ("none", "compiled first", 0.0),
        ("hf", "checkpointed first", 0.5),
        ("torch", "compiled first", 0.5),
    ],
)
def test_one_graph_for_all_layers_and_none_more_over_the_steps(checkpointing: str, first: str, dropout: float) -> None:
    model, plain, counter = llama(dropout=dropout), llama(dropout=dropout), CompileCounter()
    model.enable_input_require_grads()
    changes = [lambda: compile_layers(model, backend=counter), lambda: CHECKPOINTING[checkpointing](model)]
    for change in changes if first == "compiled first" else reversed(changes):
        change()
    for _ in range(3):
        ours = step(model)
        assert counter.frame_count == 1
    if not dropout:  # masks are drawn differently there
        torch.testing.assert_close(ours, step(plain))
    assert [name for name in model.state_dict() if "compil" in name or "orig_mod" in name] == []
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_first_layer_above_a_frozen_embedding_has_a_shorter_graph() -> None:
    model, counter = llama(), CompileCounter()
    compile_layers(model, backend=counter)
    ours = [step(model) for _ in range(3)][-1]
    assert counter.frame_count == 2
    torch.testing.assert_close(ours, step(llama()))


def test_shapes_evaluation_and_merging_compile_anew_once_each() -> None:
    model, plain, counter, counts = stack(), stack(), CompileCounter(), []
    compile_layers(model, backend=counter)

    def both(*shape: int) -> None:
        x = torch.randn(*shape, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results = []
        for each in (model, plain):
            inputs = x.clone().requires_grad_()
            out = each(inputs)
            results.append((out, *(torch.autograd.grad(out.sum(), [inputs, *get_lora_parameters(each)]) if out.requires_grad else ())))
        torch.testing.assert_close(*results)
        counts.append(counter.frame_count)

    for shape in ((2, 8), (2, 9), (3, 10), (3, 12), (5, 7)):
        both(*shape)
    assert counts == [1, 2, 3, 3, 3]  # then rows and length may both be any
    model.eval(), plain.eval()
    with torch.no_grad():
        both(2, 8)
        both(4, 11)
        before, evaluation = model(torch.ones(3, 4, 8, dtype=torch.float64)), counts[-1]
        merge_lora(model), merge_lora(plain)
        both(2, 8)
        both(4, 11)
        torch.testing.assert_close(model(torch.ones(3, 4, 8, dtype=torch.float64)), before)
        merged = counts[-1]
        unmerge_lora(model), unmerge_lora(plain)
    model.train(), plain.train()
    both(2, 8)
    uncompile_layers(model)
    both(2, 8)
    assert all(block._compiled_call_impl is None for block in model.modules())
    compile_layers(model, backend=counter)
    both(3, 9)
    assert 3 < evaluation <= 5 and evaluation < merged <= evaluation + 2 and counts[-1] == merged


def test_more_graphs_than_the_compiler_allows_by_itself() -> None:
    """It would run the rest uncompiled, with nothing but a line in the log."""
    model, counter = nn.Sequential(Block(), Block()), CompileCounter()
    compile_layers(model, backend=counter)
    for length in range(12):
        for block in model:
            block.tag = "x" * length
        model(torch.ones(8, requires_grad=True))
    assert counter.frame_count == 12


def test_the_compilers_settings_come_back_with_the_last_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_module, "_compiled", weakref.WeakSet())  # models of other tests may still be about
    monkeypatch.setattr(compile_module, "_earlier", {})
    names = ("recompile_limit", "skip_fwd_side_effects_in_bwd_under_checkpoint")

    def now() -> list[Any]:
        return [getattr(torch._dynamo.config, name) for name in names]

    first, second = stack(), stack()
    with torch._dynamo.config.patch(recompile_limit=8, skip_fwd_side_effects_in_bwd_under_checkpoint=False):
        compile_layers(first, backend="eager")
        compile_layers(second, backend="eager")
        assert now() == [64, True]
        uncompile_layers(first)
        assert now() == [64, True]
        uncompile_layers(second)
        assert now() == [8, False]
    with torch._dynamo.config.patch(recompile_limit=100, skip_fwd_side_effects_in_bwd_under_checkpoint=False):
        compile_layers(first, backend="eager")
        assert now() == [100, True]
        uncompile_layers(first)
        assert now() == [100, False]


def test_with_its_backward_traced_it_gives_the_same_numbers() -> None:
    model = llama(2)
    model.enable_input_require_grads()
    assert compile_layers(model, backend="aot_eager") == ["model.layers.0", "model.layers.1"]
    torch.testing.assert_close(step(model), step(llama(2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_block_keeps_no_more_wide_tensors_than_the_frozen_one(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norms' outputs and the gated MLP's middle, which the adapters' gradients read, are computed again."""
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "worth_kernels", lambda x: fused)
    kept: list[list[torch.Size]] = []

    def forward(graph: Any, inputs: Any) -> Any:
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        made = [node.meta["val"] for node in outputs[1:] if node is not None and node.op != "placeholder"]
        kept[-1] += [value.shape for value in made if isinstance(value, torch.Tensor) and value.numel() >= 16 * 32]
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=forward, bw_compiler=lambda graph, _: make_boxed_func(graph.forward), partition_fn=min_cut_rematerialization_partition
    )
    for model in (llama(1), transformers.LlamaForCausalLM(llama(1).config).requires_grad_(False)):
        model.enable_input_require_grads()
        kept.append([])
        compile_layers(model, backend=backend)
        ids = torch.arange(16).view(2, 8)
        model(input_ids=ids, labels=ids).loss.backward()
    ours, frozen = kept
    # Attention's output is kept in two layouts: the attention's own backward pass reads one, the output projection's adapter the other.
    assert len(frozen) == 5 and len(ours) <= 6


def test_recording_is_the_backends_work_and_lets_kernels_serve_small_inputs() -> None:
    asked, x = [], torch.ones(2, 8, dtype=torch.float64, requires_grad=True)

    def backend(graph: Any, inputs: Any, config_patches: Any = None) -> Any:
        asked.append((config_patches, backends._recording))
        return graph.forward

    recorded, other = stack(), stack()
    compile_layers(recorded, backend=backend, cuda_graphs=True)
    compile_layers(other, backend=backend)
    for model in (recorded, other, recorded):  # neither has the other compiled anew
        model(x)
    assert asked == [({"triton.cudagraphs": True}, True), (None, False)] and not backends._recording
    compile_layers(recorded, backend=backend, cuda_graphs=True)
    with pytest.raises(ValueError, match=r"0 is compiled already, without CUDA graphs: call uncompile_layers"):
        compile_layers(other, backend=backend, cuda_graphs=True)
    with pytest.raises(ValueError, match="backend='eager' records no CUDA graphs: use 'inductor'"):
        compile_layers(stack(), backend="eager", cuda_graphs=True)


def test_gradients_are_kept_from_being_written_over() -> None:
    trained, frozen, table = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3)), nn.Embedding(4, 2, sparse=True)
    ((trained * torch.tensor([1.0, -2.0, 3.0])).sum() + table(torch.tensor([1])).sum()).backward()
    replayed, sparse = trained.grad, table.weight.grad
    keep_gradients([trained, frozen, table.weight])
    assert replayed is not None
    replayed.zero_()
    assert trained.grad is not None and trained.grad.tolist() == [1.0, -2.0, 3.0]
    assert frozen.grad is None and table.weight.grad is sparse
    keep_gradients([frozen])


def test_compiles_the_repeated_blocks_and_nothing_else() -> None:
    model = nn.ModuleDict({"b": nn.ModuleList([Block(nn.Sequential(Block(), Block())) for _ in range(2)]), "head": Block()})
    assert compile_layers(model, backend="eager") == ["b.0", "b.1"]
    compiled = {name for name, module in model.named_modules() if module._compiled_call_impl is not None}
    assert compiled == {name for name, _ in repeated_blocks(model)} == {"b.0", "b.1"}


def test_hugging_face_says_itself_what_its_blocks_are() -> None:
    config = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_heads": 2, "vocab_size": 32}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(num_layers=2, num_decoder_layers=1, **config))
    assert compile_layers(model, backend="eager") == ["encoder.block.0", "encoder.block.1", "decoder.block.0"]
    assert compile_layers(llama(1), backend="eager") == ["model.layers.0"]
    vision = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    assert len(compile_layers(transformers.ViTModel(vision), backend="eager")) == 2


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), nn.ModuleList([Block()])])
def test_nothing_to_compile_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"{type(model).__name__} has no repeated blocks.*Leave compile"):
        compile_layers(model)


def test_copies_and_pickles_are_not_compiled() -> None:
    model = nn.Sequential(Block(), Block())
    compile_layers(model, backend="eager")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(block._compiled_call_impl is None for block in other)
        assert torch.equal(other(torch.ones(8)), model(torch.ones(8)))


def test_a_block_that_is_compiled_stays_so() -> None:
    model = nn.Sequential(Block(), Block())
    model[0].compile(backend="eager", dynamic=True)
    own = model[0]._compiled_call_impl
    compile_layers(model, backend="eager")
    assert model[0]._compiled_call_impl is own and model[1]._compiled_call_impl is not None
    uncompile_layers(model)
    assert model[0]._compiled_call_impl is own and model[1]._compiled_call_impl is None
