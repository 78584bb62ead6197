"""Embeddings: padding, Gemma's scaled embeddings, why B is the random factor."""

import pytest
import torch
from torch import nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.spec import LayerSpec
from tests.conftest import fill, same_bits
from tests.layers.kinds import CASES, ScaledEmbedding

KINDS = ["embedding", "embedding-padding", "embedding-scaled"]


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_names(kind):
    layer = CASES[kind].layer()
    assert layer.lora_A.shape == (4, 11)
    assert layer.lora_B.shape == (10, 4)
    assert list(layer.to_peft()) == ["lora_embedding_A", "lora_embedding_B"]
    assert not layer.is_linear


def test_a_starts_at_zero_so_that_the_first_gradient_reaches_every_seen_row():
    layer = CASES["embedding"].layer(filled=False)
    assert not layer.lora_A.count_nonzero()
    assert layer.lora_B.count_nonzero() == layer.lora_B.numel()
    ids = torch.tensor([1, 4, 4])
    layer(ids).square().sum().backward()
    seen = layer.lora_A.grad.abs().sum(0) > 0
    assert seen.nonzero().flatten().tolist() == [1, 4]


def test_the_padding_row_gets_no_update_and_no_gradient():
    case = CASES["embedding-padding"]
    layer = case.layer(filled=False)
    optimizer = torch.optim.SGD(layer.lora_parameters().values(), lr=0.5)
    padding = torch.tensor([2])
    assert padding in case.x()
    for _ in range(3):
        (layer(case.x()) - 1).square().sum().backward()  # which would move every row: padding's output is zero, and not wanted to be
        assert not layer.lora_A.grad[:, padding].any() and layer.lora_A.grad.any()
        optimizer.step()
        optimizer.zero_grad()
    assert same_bits(layer(padding), case.base()(padding))
    assert not torch.equal(layer(torch.tensor([1])), case.base()(torch.tensor([1])))
    layer.merge_weights()
    assert same_bits(layer(padding), case.base()(padding))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_update_of_a_scaled_embedding_is_scaled_too(dtype):
    layer = fill(CASES["embedding-scaled"].layer(dtype), std=0.02)
    ids = torch.arange(11)
    update = layer(ids).float() - CASES["embedding-scaled"].base(dtype)(ids).float()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(update, layer.lora_delta() * 4, **tolerance)


@pytest.mark.parametrize("scale", [0.5, 30.0])
def test_merged_scaled_embeddings_agree(scale):
    from lightning_lora import LoRAConfig
    from lightning_lora.layers.adapting import adapt

    layer = fill(adapt(ScaledEmbedding(11, 10, embed_scale=scale), LayerSpec(LoRAConfig(), 4, 8.0)))
    assert isinstance(layer, LoRALayer)
    ids = torch.arange(11)
    unmerged = layer(ids)
    layer.merge_weights()
    torch.testing.assert_close(layer(ids), unmerged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_autocast_rounds_the_update_no_more_than_the_base(variant, dtype):
    """Autocast leaves an embedding's output in the weight's dtype. Outputs and gradients are those without it."""
    layer, ids, found = CASES["embedding"].layer(dtype, variant=variant), torch.arange(11), []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(ids)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in layer.lora_parameters().values())])
    assert all(same_bits(plain, cast) for plain, cast in zip(*found, strict=True))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4), (0,)])
def test_ids_of_any_shape(shape):
    layer = CASES["embedding"].layer()
    ids = torch.randint(11, shape)
    assert layer(ids).shape == (*shape, 10)
    torch.testing.assert_close(layer(ids), nn.functional.embedding(ids, layer.weight + layer.lora_delta()))


def test_dropout_has_no_meaning_here():
    layer = CASES["embedding"].layer(dropout=0.9).train()
    assert same_bits(layer(CASES["embedding"].x()), CASES["embedding"].layer()(CASES["embedding"].x()))
