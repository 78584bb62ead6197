"""What the document says in numbers and names. Three of its numbers are wrong: the right ones are asserted."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_lora
from lightning_lora import LoRAConfig, LoRALinear, apply_lora, get_lora_parameters, merge_lora
from tests.document import teach


@pytest.mark.parametrize(("rank", "parameters"), [(1, 8_192), (4, 32_768), (8, 65_536), (16, 131_072), (64, 524_288)])
def test_parameters_of_a_4096_by_4096_layer(rank: int, parameters: int) -> None:
    layer = LoRALinear(4096, 4096, rank=rank, bias=False, device="meta")
    assert sum(p.numel() for p in layer.lora_parameters().values()) == parameters
    assert layer.linear.weight.numel() == 16_777_216
    assert layer.linear.weight.numel() / parameters == 256 * 8 / rank


def test_initialisation() -> None:
    """A is uniform in ±1/√k, not ±√(5/k) as the document has it: `kaiming_uniform_` takes √5 as a slope. B is zero."""
    k = 4096
    A, B = LoRALinear(k, 8, rank=16).lora_parameters().values()
    assert not B.any()
    assert 0.999 / k**0.5 < A.abs().max() <= 1 / k**0.5 == 0.015625
    assert abs(A.std() * (3 * k) ** 0.5 - 1) < 0.02  # a uniform on ±b has the standard deviation b/√3
    reference = nn.Linear(k, 2000)  # starts the same way
    assert abs(A.std() / reference.weight.std() - 1) < 0.02


@pytest.mark.parametrize(
    ("rank", "targets", "parameters"),
    [
        (8, ["q_proj", "v_proj"], 4_194_304),
        (16, ["q_proj", "k_proj", "v_proj", "o_proj"], 16_777_216),  # the document's 33.5M is twice that
    ],
)
def test_parameters_of_llama_7b(rank: int, targets: list[str], parameters: int) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **sizes))
    apply_lora(model, config=LoRAConfig(rank=rank, target_modules=targets))
    adapters = get_lora_parameters(model)
    assert sum(p.numel() for p in adapters) == parameters
    assert sum(p.nbytes for p in adapters) == 4 * parameters  # in fp32: 16.8 MB for the first
    assert sum(p.numel() for p in model.parameters()) - parameters == 6_738_415_616


@pytest.mark.parametrize(("alpha", "rank", "scaling"), [(8, 8, 1.0), (16, 8, 2.0), (32, 8, 4.0)])
def test_scaling(alpha: float, rank: int, scaling: float) -> None:
    """α = r is no scaling, α = 2r twice the update."""
    layer = teach(LoRALinear(6, 5, rank=rank, alpha=alpha))
    assert layer.scaling == scaling
    x = torch.randn(2, 6)
    torch.testing.assert_close(layer(x), layer.linear(x) + scaling * (x @ layer.lora_A.T @ layer.lora_B.T))


def test_every_name_of_the_document_is_public() -> None:
    assert {"LoRALinear", "LoRAConfig", "apply_lora", "merge_lora", "get_lora_parameters"} <= set(lightning_lora.__all__)
    assert merge_lora is lightning_lora.merge_lora
