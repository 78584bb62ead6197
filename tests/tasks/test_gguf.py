"""A real GGUF file, written with the package gguf from a tiny Llama: its weights, its tokenizer, and how often it is read."""

import os
from pathlib import Path

import gguf
import pytest
import torch
import transformers

from lightning_lora.tasks import hf
from tests import tiny_lm

NAME = "tiny.gguf"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write(file: Path, model: transformers.LlamaForCausalLM) -> None:
    """Write the model as llama.cpp does: names of its own, and q and k with each head's halves interleaved."""
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*"abcdefghijklmnopqr", "<s>", "</s>", "ab"][: config.vocab_size])
    writer.add_token_types([*[gguf.TokenType.NORMAL] * 18, *[gguf.TokenType.CONTROL] * 2, gguf.TokenType.NORMAL][: config.vocab_size])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(18)
    writer.add_eos_token_id(19)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            weight = weight.view(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def folder(tmp_path):
    assert len(tiny_lm.WORDS) == 21
    write(tmp_path / NAME, tiny_lm.llama())
    return tmp_path


def test_a_model_is_the_one_that_was_written(folder):
    model, tokenizer = hf.load_causal_lm(folder, NAME)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = torch.arange(8)[None]
    torch.testing.assert_close(model(ids).logits, tiny_lm.llama()(ids).logits, rtol=1e-5, atol=1e-5)
    assert tokenizer.chat_template == TEMPLATE and tokenizer("abc")["input_ids"][-2:] == [20, 2]
    assert tokenizer.eos_token == "</s>" and tokenizer.pad_token is not None


def test_the_configuration_is_read_once(folder, monkeypatch):
    reads, read = [], transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *args, **kwargs: reads.append(args) or read(*args, **kwargs))
    config = hf.load_config(folder, NAME)
    config.hidden_size = 7
    assert hf.load_config(folder, NAME).hidden_size == 32
    assert hf.load_model("AutoModelForCausalLM", folder, NAME).config.hidden_size == 32
    assert len(reads) == 1
    os.utime(folder / NAME, ns=(0, 0))
    assert hf.load_config(folder, NAME).hidden_size == 32
    assert len(reads) == 2
