"""Packed documents are computed as each of them alone: logits, losses and gradients, under every attention there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.data.packing import PackedRows
from lightning_lora.model.compile import compile_layers
from lightning_lora.ops.varlen_attention import masked_attention, packed_mask
from lightning_lora.tasks.hf import enable_checkpointing
from lightning_lora.tasks.packed_attention import NAME, packed_rows, register, use_attention
from lightning_lora.tasks.packing_check import packed_inputs
from tests.tasks.packing_models import alone, documents, model, packed_batch

FOUR = ["Llama", "Mistral", "Gemma3Text", "GPT2"]


def run(network: Any, batch: dict[str, Any]) -> Tensor:
    with packed_rows():
        return network(input_ids=batch["input_ids"], use_cache=False, **packed_inputs(network, batch)).logits


def near(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """transformers' norms and softmaxes compute in fp32, whatever the model's dtype."""
    limit = 1e-5 * max(tensor.abs().max().item() for tensor in expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)


def compare(network: Any, attention: str) -> None:
    """Logits, and the gradients of a loss on all tokens but each document's first."""
    batch = packed_batch(documents())
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    expected = alone(network, batch)
    network.set_attn_implementation(attention)
    found = run(network, batch)
    near([found], [expected])
    answers = batch["labels"][:, 1:]
    losses = [torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), answers.flatten()) for logits in (found, expected)]
    ours, theirs = (torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True) for loss in losses)
    assert sum(bool(gradient.any()) for gradient in ours) > len(parameters) // 2
    near(ours, theirs)


@pytest.mark.parametrize("attention", [NAME, "sdpa", "eager"])
@pytest.mark.parametrize("name", FOUR)
def test_logits_and_gradients_equal_those_of_documents_alone(name: str, attention: str) -> None:
    register()
    compare(model(name, attn_implementation="eager" if attention == "sdpa" else "sdpa"), attention)


@pytest.mark.parametrize("name", ["Gemma2", "Qwen3Moe"])
def test_capped_scores_and_experts_too(name: str) -> None:
    register()
    compare(model(name), "eager" if name == "Gemma2" else NAME)


@pytest.mark.parametrize("name", FOUR)
def test_in_single_precision_too(name: str) -> None:
    register()
    compare(model(name, torch.float32), NAME)


@pytest.mark.filterwarnings("ignore:_compile flag on", "ignore:flex_attention called without", "ignore:.torch.jit.script_method. is")
def test_flex_attention_too() -> None:
    """On a CPU it has no backward pass."""
    network, batch = model("Llama", torch.float32).eval(), packed_batch(documents())
    expected = alone(network, batch)
    network.set_attn_implementation("flex_attention")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        near([run(network, batch)], [expected])


def test_flash_attention_gets_the_bounds_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package needs a GPU. Here its function for documents of varying length is the definition."""
    from transformers import modeling_flash_attention_utils as theirs

    seen = []

    def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any) -> Tensor:
        seen.append((cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), options["max_seqlen_q"]))
        query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
        mask = packed_mask(cu_seqlens_q, 1, len(q), options["sliding_window"])
        return masked_attention(query, key, value, mask, options["softmax_scale"])[0].transpose(0, 1)

    functions = ((None, varlen, None, None, None), (lambda **options: options, None))
    monkeypatch.setattr(theirs, "lazy_import_flash_attention", lambda *args, **kwargs: functions)
    network, batch = model("Mistral"), packed_batch(documents())
    expected = alone(network, batch)
    network.config._attn_implementation = "flash_attention_2"
    near([run(network, batch)], [expected])
    bounds = batch["cu_seq_lens_q"].tolist()
    assert seen == [(bounds, bounds, 12)] * 2


def test_rows_that_are_not_packed_are_computed_as_by_sdpa() -> None:
    """Padded on the left too, and in generation: a model keeps this attention for validation and prediction."""
    register()
    network = model("Mistral").eval()
    ids = torch.randint(1, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def results() -> list[Tensor]:
        with torch.no_grad():
            outputs = [network(input_ids=ids, attention_mask=mask).logits[:, 4:], network(input_ids=ids).logits]
        return [*outputs, network.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)]

    expected = results()
    network.set_attn_implementation(NAME)
    torch.testing.assert_close(results(), expected)


def test_attention_with_more_than_scores_is_refused() -> None:
    register()
    network = model("Gemma2")
    network.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match=r"Gemma2Attention has softcap, which lightning_lora_varlen does not compute"):
        run(network, packed_batch(documents()))


@pytest.mark.parametrize(("attention", "checkpointing"), [(NAME, False), (NAME, True), ("sdpa", False)])
def test_one_graph_for_all_packed_batches(attention: str, checkpointing: bool) -> None:
    """Whatever the documents' number and lengths."""
    register()
    network, plain = (apply_lora(model("Llama"), config=LoRAConfig(rank=2, target_modules=["q_proj", "down_proj"])) for _ in range(2))
    counter = CompileCounter()
    for each in (network, plain):
        each.set_attn_implementation(attention)
        each.enable_input_require_grads()
        if checkpointing:
            enable_checkpointing(each)
    compile_layers(network, backend=counter)
    packed = PackedRows(documents([7, 5, 9, 3, 1, 12, 24, 20, 4, 11, 2]), 24, 2)
    batches = [packed.collate([packed[i] for i in rows], pad=0) for rows in ((0, 1), (2, 3), (4,))]
    assert len({len(set(batch["cu_seq_lens_q"].tolist())) for batch in batches}) > 1
    for batch in batches:
        losses = {each: run(each, batch).square().mean() for each in (network, plain)}
        ours, theirs = (torch.autograd.grad(loss, [p for p in each.parameters() if p.requires_grad]) for each, loss in losses.items())
        torch.testing.assert_close(ours, theirs)
        assert counter.frame_count == 1


@pytest.mark.parametrize(("name", "reason"), [("flash_attention_9", "flash_attention_9"), ("flash_attention_2", "FlashAttention2")])
def test_an_attention_that_is_not_there_is_named(name: str, reason: str) -> None:
    network = model("Llama")
    with pytest.raises(ValueError, match=rf"model.attn_implementation='{name}': .*{reason}.*use sdpa or eager"):
        use_attention(network, name)
    assert network.config._attn_implementation == "sdpa"
    use_attention(network, "eager")
    assert network.config._attn_implementation == "eager"


def test_a_model_with_one_attention_only_says_so() -> None:
    with pytest.raises(ValueError, match=r"'eager': FalconForCausalLM does not let its attention be set"):
        use_attention(model("Falcon"), "eager")
