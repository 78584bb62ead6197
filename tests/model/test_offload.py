"""Offloaded activations: the same gradients to the bit, and nothing but the blocks' inputs moved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, offload_activations
from lightning_lora.model import offload
from lightning_lora.model.compile import compile_layers

pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning")

BLOCKS, WIDTH, TOKENS = 4, 32, 12


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Move every tensor as large as the blocks' inputs."""
    torch._dynamo.reset()
    monkeypatch.setattr(offload, "MINIMUM", 2 * TOKENS * WIDTH * 4)
    yield
    torch._dynamo.reset()


def llama(*, checkpointing: bool = True, reentrant: bool = False) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, use_cache=False, num_hidden_layers=BLOCKS, **sizes)
    model = apply_lora(transformers.LlamaForCausalLM(config).train(), config=LoRAConfig(rank=2, dropout=0.1, target_modules="all-linear"))
    for parameter in get_lora_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model


def gradients(model: nn.Module, steps: int = 1) -> list[Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(32, (2, TOKENS))
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
    return [p.grad for p in get_lora_parameters(model)]  # type: ignore[misc]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_equal_to_the_bit_and_each_blocks_input_is_moved(reentrant: bool) -> None:
    expected = gradients(llama(reentrant=reentrant), steps=2)
    model = llama(reentrant=reentrant)
    moving = offload_activations(model)
    for mine, theirs in zip(gradients(model, steps=2), expected, strict=True):
        assert torch.equal(mine, theirs)
    # The last norm saves a tensor too: it is behind the blocks.
    assert BLOCKS <= moving.tensors / 2 <= BLOCKS + 2
    assert moving.bytes == moving.tensors * 2 * TOKENS * WIDTH * 4


def test_a_compiled_checkpointed_block_moves_no_weights() -> None:
    alone, model = llama(), llama()
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), partition_fn=min_cut_rematerialization_partition)
    for each in (alone, model):
        compile_layers(each, backend=backend)
    expected = gradients(alone)
    moving = offload_activations(model)
    for mine, theirs in zip(gradients(model), expected, strict=True):
        assert torch.equal(mine, theirs)
    assert BLOCKS <= moving.tensors <= BLOCKS + 2


def test_without_checkpointing_it_is_still_right() -> None:
    expected = gradients(llama(checkpointing=False))
    model = llama(checkpointing=False)
    moving = offload_activations(model)
    for mine, theirs in zip(gradients(model), expected, strict=True):
        assert torch.equal(mine, theirs)
    assert moving.tensors > 2 * BLOCKS


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_tensor_is_copied_back_once_and_a_blocks_tensors_are_held_together(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama(checkpointing=checkpointing)
    moving = offload_activations(model)
    gradients(model)
    away, back, held = moving.tensors, [], []
    copy, release = offload._Moved._copy, offload._Moved.release
    monkeypatch.setattr(offload._Moved, "_copy", lambda self, a, b: back.append(b is not self._host) or copy(self, a, b))
    monkeypatch.setattr(offload._Moved, "release", lambda self: held.append(moving.tensors) or release(self))
    gradients(model)
    assert back.count(False) == away == moving.tensors - away
    each = away // BLOCKS
    assert each == 1 if checkpointing else each > 3
    assert back.count(True) == away - 2 * each  # the last ones are still there
    assert held[0] - away == 2 * each + 1


def test_evaluation_and_removal_move_nothing() -> None:
    model = llama()
    moving = offload_activations(model)
    with torch.no_grad():
        model(input_ids=torch.zeros(2, TOKENS, dtype=torch.long))
    assert moving.tensors == 0
    moving.remove()
    gradients(model)
    assert moving.tensors == 0


def test_an_error_in_the_forward_pass_leaves_no_hook() -> None:
    model = llama()
    offload_activations(model)
    with pytest.raises(IndexError):
        model(input_ids=torch.full((2, TOKENS), 99))
    x = torch.ones(2, TOKENS, WIDTH, requires_grad=True)
    seen = (x * x).grad_fn._saved_self  # type: ignore[union-attr]
    assert seen.data_ptr() == x.data_ptr()


class Block(nn.Module):
    """A block."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).tanh()


class Stack(nn.Module):
    """Changes each block's input in place after the block."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = checkpoint(block, x, use_reentrant=False)
            with torch.no_grad():
                x.add_(1)  # after it was saved
            x = y
        return x


def test_a_change_in_place_is_refused_and_not_copied_half_way() -> None:
    model = Stack(5)
    offload_activations(model)
    with pytest.raises(RuntimeError, match="changed in place after it was saved"):
        model(torch.ones(2, TOKENS, WIDTH).requires_grad_() * 2)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no repeated blocks"):
        offload_activations(nn.Linear(2, 2))
