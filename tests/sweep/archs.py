"""Tiny random models of many transformers architectures, made from one set of small sizes, and an input for each."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Every name that a configuration may have for a size. Those that it has are set.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "encoder_hidden_size", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("hidden_dim", "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "n_group", "topk_group", "moe_k"), 2),
    **dict.fromkeys(("vocab_size",), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    "num_codevector_groups": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "first_k_dense_replace": 1,
    "image_size": 16,
    "patch_size": 8,
}
AUDIO: dict[str, Any] = {
    "conv_dim": (8, 8),
    "conv_kernel": (4, 4),
    "conv_stride": (2, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
SWIN: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "patch_size": 4, "window_size": 4}
PYRAMID: dict[str, Any] = {"hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1], "image_size": 32}
MAMBA_HEADS: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
LINEAR_ATTENTION: dict[str, Any] = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA: dict[str, Any] = {"state_size": 4, "time_step_rank": 4, "conv_kernel": 4, "expand": 2}

TEXT = {
    "AutoModelForCausalLM": """
        arcee bamba bloom codegen cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 exaone4 falcon falcon_mamba
        gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe helium jamba
        jetmoe llama llama4_text mamba mamba2 minimax mistral mixtral mpt nemotron olmo olmo2 olmoe opt persimmon phi
        phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next recurrent_gemma seed_oss smollm3 stablelm starcoder2 xglm
        bitnet lfm2 biogpt ctrl afmoe deepseek_v32 ernie4_5_moe exaone_moe glm4_moe glm4_moe_lite hunyuan_v1_moe laguna
        longcat_flash solar_open aria_text axk1 cohere2_moe deepseek_v4 flex_olmo glm_moe_dsa granitemoeshared hy_v3 hy_v4
        kolibri1 mellum minimax_m2 minimax_m3_vl_text nemotron_h
        qwen3_5_text qwen3_5_moe_text granitemoehybrid lfm2_moe dots1 gemma4_text
        apertus axk2 beam bert-generation cpmant cwm diffllama doge falcon_h1 flint
        gpt-sw3 gpt_neox_japanese granite_swa granitemoe_swa hrm_text hunyuan_v1_dense hyperclovax
        inkling2_text inkling_text internlm3 iquestcoder jais2 minicpm3 ministral ministral3
        modernbert-decoder moshi nanochat olmo3 olmo_hybrid openai-gpt roberta-prelayernorm
        trocr vaultgemma whisper xlm xlm-roberta-xl xlnet youtu dbrx
    """,
    "AutoModel": """
        albert bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra ernie esm fnet ibert
        layoutlm megatron-bert mobilebert modernbert mpnet mra nystromformer rembert roberta roformer squeezebert xlm-roberta yoso 
    """,
    "AutoModelForSeq2SeqLM": """
        bart blenderbot-small m2m_100 marian mbart mt5 pegasus plbart t5 umt5 switch_transformers longt5 led
        bigbird_pegasus blenderbot fsmt mvp nllb-moe pegasus_x prophetnet seamless_m4t seamless_m4t_v2
    """,
}
IMAGE = {
    "AutoModel": """
        beit data2vec-vision deit dinov2 dinov3_vit vit vit_mae vivit ijepa siglip_vision_model clip_vision_model
        swin swinv2 pvt segformer yolos
    """,
}
SOUND = {
    "AutoModel": """
        wav2vec2 hubert wavlm unispeech unispeech-sat sew data2vec-audio wav2vec2-conformer
    """,
}

# What does not follow from the sizes above.
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("mamba", "falcon_mamba"), MAMBA),
    "bamba": {**MAMBA_HEADS, "attn_layer_indices": [1]},
    "swin": SWIN,
    "swinv2": SWIN,
    "pvt": PYRAMID,
    "segformer": PYRAMID,
    "yolos": {"image_size": [16, 16], "num_detection_tokens": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), LINEAR_ATTENTION),
    "granitemoehybrid": {**MAMBA_HEADS, "layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "per_layer_config": {"1": {"head_dim": 16}},
        "head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "dbrx": {
        "max_seq_len": 64,
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8, "expand": 2},
    **dict.fromkeys(SOUND["AutoModel"].split(), AUDIO),
}


def names() -> list[str]:
    return [name for group in (TEXT, IMAGE, SOUND) for kinds in group.values() for name in kinds.split()]


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A random model in eval mode with every parameter away from zero, and an input of two rows."""
    group = next(group for group in (TEXT, IMAGE, SOUND) for kinds in group.values() if name in kinds.split())
    auto = next(auto for auto, kinds in group.items() if name in kinds.split())
    cls = CONFIG_MAPPING[name]
    default, own = cls(), OWN.get(name, {})
    default.allow_global_per_layer_attribute_access = True  # sizes that vary by layer are given in OWN
    sizes = {key: size for key, size in SIZES.items() if isinstance(getattr(default, key, ()), (int, type(None)))}  # not one per stage
    sizes = {key: size for key, size in sizes.items() if not isinstance(getattr(cls, key, None), property)}
    config = cls(**{**sizes, **own})
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.05)
    generator = torch.Generator().manual_seed(1)
    if group is IMAGE:
        size, channels = getattr(config, "image_size", 16), getattr(config, "num_channels", 3)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        frames = (config.num_frames,) if name == "vivit" else ()
        return model, {"pixel_values": torch.randn(2, *frames, channels, height, width, generator=generator)}
    if group is SOUND:
        return model, {"input_values": torch.randn(2, 200, generator=generator)}
    ids = torch.randint(3, 60, (2, 8), generator=generator)
    return model, {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if auto == "AutoModelForSeq2SeqLM" else {})
