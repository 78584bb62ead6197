"""Reads in forwards of torch and transformers, of attention's packed weight, and of modules that are no children."""

import torch.nn.functional as F
from torch import nn
from transformers.models.mobilebert.modeling_mobilebert import MobileBertConfig, MobileBertForMaskedLM
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from lightning_lora.utils.weight_reads import weight_reads
from tests.utils.test_weight_reads import Base


def test_a_module_that_is_no_child():
    class Decoder(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = [encoder]

        def forward(self, x):
            return x @ self.encoder[0].b.weight.t()

    base = type("Module", (Base,), {"forward": lambda self, x: self.a(x)})()
    assert weight_reads(nn.ModuleList([base, Decoder(base)])) == {base.b: "Decoder.forward"}


def test_the_packed_weight_of_attention():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.narrow = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, kdim=2)

        def forward(self, x):
            return self.narrow(x, x[:2], x[:2])[0] + F.linear(x, self.attn.in_proj_weight[-4:], self.attn.in_proj_bias[-4:])

    model = Dense()
    assert weight_reads(model)[model.attn] == "Dense.forward"
    assert model.narrow not in weight_reads(model)


def test_torch_and_transformers_modules():
    layer = nn.TransformerEncoderLayer(4, 2, 8)
    assert {layer.linear1, layer.linear2, layer.self_attn.out_proj} <= weight_reads(layer).keys()
    attention = WavLMAttention(8, 2)
    found = weight_reads(attention)
    assert {attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj} == found.keys() - {attention.gru_rel_pos_linear}
    sizes = {"vocab_size": 8, "hidden_size": 8, "embedding_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = MobileBertForMaskedLM(MobileBertConfig(**sizes, intra_bottleneck_size=4))
    assert model.cls.predictions.dense in weight_reads(model)
