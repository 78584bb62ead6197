"""Frozen weights in host memory: the same bits, two blocks' weights on the device, in time. A CPU stands for the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    checkpoint_layers,
    compile_layers,
    export_merged,
    get_lora_parameters,
    load_adapter,
    merge_lora,
    offload_activations,
    offload_frozen,
    quantize_base,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.model import offload
from lightning_lora.model import offload_frozen as module
from lightning_lora.utils.blocks import repeated_blocks
from tests.lit import bits
from tests.quantized import QUANTIZERS

pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # the compiler's own doing
)
BLOCKS, WIDTH, TOKENS = 4, 128, 6


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Move every linear's weight, and no norm's."""
    torch._dynamo.reset()
    monkeypatch.setattr(module, "MINIMUM", WIDTH * 8)
    yield
    torch._dynamo.reset()


def llama(quantize: str | None = None, variant: str = "plain") -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=32, use_cache=False, num_hidden_layers=BLOCKS, **sizes)
    model = transformers.LlamaForCausalLM(config).train()
    if quantize is not None:
        quantize_base(model, quantize)
    apply_lora(model, config=LoRAConfig(rank=2, dropout=0.1, target_modules="all-linear", variant=variant))
    for parameter in get_lora_parameters(model):
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model: nn.Module, steps: int = 2) -> list[Tensor]:
    """The losses of some steps, and the sum of their gradients."""
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        ids = torch.randint(32, (2, TOKENS))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in get_lora_parameters(model))]  # type: ignore[list-item]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def on_device(handle: Any) -> list[int]:
    """The blocks whose weights have memory on the device."""
    return [k for k, place in enumerate(handle._places) if any(there.untyped_storage().nbytes() for there in place._there)]


def watched(handle: Any) -> list[tuple[int, list[int]]]:
    """At each block's use: its index, and the blocks that are on the device then."""
    seen: list[tuple[int, list[int]]] = []
    for k, place in enumerate(handle._places):
        place.block.input_layernorm.register_forward_hook(lambda *_, k=k: seen.append((k, on_device(handle))))
    return seen


CHECKPOINTS = {
    "none": lambda model: None,
    "transformers": lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),
    "selective": checkpoint_layers,
}


def reentrant(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()


@pytest.mark.parametrize("checkpoints", [*CHECKPOINTS, "reentrant"])
def test_gradients_are_equal_to_the_bit_with_two_blocks_on_the_device(checkpoints: str) -> None:
    prepare = {**CHECKPOINTS, "reentrant": reentrant}[checkpoints]
    alone, model = llama(), llama()
    prepare(alone), prepare(model)
    handle = offload_frozen(model, "cpu")
    seen = watched(handle)
    assert on_device(handle) == []
    assert equal(gradients(model), gradients(alone))
    assert [k for k, _ in seen[:BLOCKS]] == [0, 1, 2, 3]
    assert [there for _, there in seen[:BLOCKS]] == [[0, 1], [1, 2], [2, 3], [2, 3]]
    if checkpoints != "none":  # computed again in the backward pass
        assert [(k, there) for k, there in seen[BLOCKS : 2 * BLOCKS]] == [(3, [2, 3]), (2, [1, 2]), (1, [0, 1]), (0, [0, 1])]
    assert on_device(handle) == [0, 1]  # the next step begins with them
    assert handle.bytes == BLOCKS * 4 * (4 + 3 * 2) * WIDTH**2


@pytest.mark.parametrize("quantize", [None, *QUANTIZERS])
@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_quantized_bases(quantize: str | None, variant: str) -> None:
    if quantize in ("nf4", "int8"):
        pytest.importorskip("bitsandbytes")
    alone, model = llama(quantize, variant), llama(quantize, variant)
    if quantize in ("int8", "torchao-nf4", "torchao-int8"):
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj has a weight that consists of several tensors"):
            offload_frozen(model, "cpu")
        assert equal(gradients(model), gradients(alone))
        return
    assert offload_frozen(model, "cpu").bytes > 0
    assert equal(gradients(model), gradients(alone))


def test_without_gradients_and_out_of_order() -> None:
    alone, model = llama().eval(), llama().eval()
    handle = offload_frozen(model, "cpu")
    ids = torch.randint(32, (2, TOKENS))
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(input_ids=ids).logits, alone(input_ids=ids).logits)
    x = torch.randn(1, TOKENS, WIDTH)
    rotary = model.model.rotary_emb(x, torch.arange(TOKENS)[None])
    for index in (3, 0, 2, 2, 1):
        mine, theirs = (each.model.layers[index](x, position_embeddings=rotary) for each in (model, alone))
        assert torch.equal(mine, theirs) and index in on_device(handle) and len(on_device(handle)) == 2


def test_compiled_blocks_are_compiled_as_often() -> None:
    counters = [CompileCounter(), CompileCounter()]
    models = [llama(), llama()]
    handle = offload_frozen(models[1], "cpu")
    for model, counter in zip(models, counters, strict=True):
        compile_layers(model, backend=counter)
        torch._dynamo.reset()
        model.eval()
        with torch.no_grad():
            for _ in range(3):
                model(input_ids=torch.zeros(2, TOKENS, dtype=torch.long))
    assert counters[0].frame_count == counters[1].frame_count == 1
    assert len(on_device(handle)) == 2


def test_compiled_blocks_train_the_same() -> None:
    def backend() -> Any:
        return aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), partition_fn=min_cut_rematerialization_partition)

    alone, model = llama(), llama()
    compile_layers(alone, backend=backend()), compile_layers(model, backend=backend())
    handle = offload_frozen(model, "cpu")
    assert equal(gradients(model), gradients(alone))
    assert on_device(handle) == [0, 1]


def test_with_offloaded_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "MINIMUM", 2 * TOKENS * WIDTH * 4)
    alone, model = llama(), llama()
    for each in (alone, model):
        checkpoint_layers(each)
    offload_frozen(model, "cpu")
    activations = offload_activations(model)
    assert equal(gradients(model), gradients(alone))
    assert BLOCKS <= activations.tensors / 2 <= BLOCKS + 2  # no weight


def test_values_can_be_read_and_written_at_any_time(tmp_path: Path) -> None:
    alone, model = llama(), llama()
    expected = bits(alone)
    handle = offload_frozen(model, "cpu")
    order = [name for name, _ in model.named_parameters()]
    gradients(model)
    assert order == [name for name, _ in alone.named_parameters()]
    assert all(torch.equal(value, expected[name]) for name, value in bits(model).items())
    save_adapter(model, tmp_path / "adapter")
    load_adapter(alone, tmp_path / "adapter")
    weights = [block.mlp.up_proj.weight for _, block in repeated_blocks(model)]
    with torch.no_grad():
        for weight in weights:  # two of them on the device, two away
            weight.mul_(2)
    gradients(model)
    assert all(torch.equal(weight, 2 * expected[f"model.layers.{k}.mlp.up_proj.weight"]) for k, weight in enumerate(weights))
    assert handle.bytes


def test_merges_exports_and_unmerges(tmp_path: Path) -> None:
    alone, model = llama(), llama()
    before = bits(model)
    handle = offload_frozen(model, "cpu")
    gradients(model)
    handle.rest()
    assert on_device(handle) == []
    ids = torch.randint(32, (2, TOKENS))
    for each, folder in ((alone, "alone"), (model, "offloaded")):
        export_merged(each, tmp_path / folder)
        merge_lora(each.eval())
    assert (tmp_path / "alone/model.safetensors").read_bytes() == (tmp_path / "offloaded/model.safetensors").read_bytes()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, alone(input_ids=ids).logits)
    handle.rest()
    unmerge_lora(model)
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())


def test_the_model_moves_without_them_and_is_not_cast() -> None:
    model = llama()
    handle = offload_frozen(model, "cpu")
    gradients(model)
    model.to("cpu").float()
    with pytest.raises(RuntimeError, match="cannot be cast while its weights are offloaded"):
        model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="cannot be copied or pickled"):
        copy.deepcopy(model)
    handle.remove()
    assert on_device(handle) == []
    assert not any("_apply" in vars(each) or each._forward_pre_hooks or each._forward_hooks for each in model.modules())
    assert copy.deepcopy(model.to(torch.float64)).dtype == torch.float64


class Shared(nn.Module):
    """Two blocks, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(2))
        self.blocks[1][0].weight = self.blocks[0][0].weight  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def test_tied_and_trained_weights_stay() -> None:
    model = Shared().requires_grad_(False)
    model.blocks[0][1].weight.requires_grad_()  # type: ignore[index, union-attr]
    handle = offload_frozen(model, "cpu")
    assert handle.bytes == 64 * 64 * 4
    model(torch.randn(2, 64, requires_grad=True)).sum().backward()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Linear has no repeated blocks whose weights could be offloaded"):
        offload_frozen(nn.Linear(2, 2), "cpu")
    model = llama()
    offload_frozen(model, "cpu")
    with pytest.raises(ValueError, match=r"model\.layers\.0 is offloaded already"):
        offload_frozen(model, "cpu")
