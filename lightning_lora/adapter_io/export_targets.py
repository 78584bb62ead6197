"""What each program that serves an adapter loads, as data: one :class:`Target` per program, with the source of every rule.

Rules are those of the programs' own loaders in 2026: vLLM (``vllm/lora/peft_helper.py``, ``lora_model.py``, ``config/lora.py``), SGLang
(``srt/lora/lora.py``, ``lora_config.py``, ``utils.py``), llama.cpp (``convert_lora_to_gguf.py``), diffusers 0.42
(``utils/peft_utils.py``, ``loaders/lora_base.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

MERGE = "merge it (`lightning-lora merge BASE ADAPTER OUT`, export_merged) and serve that folder"

CHAT_TEMPLATE = "chat_template.jinja"  # as transformers saves a tokenizer's

#: What an adapter may have beyond low-rank pairs on linear layers → what it is, in words for a refusal.
PARTS: dict[str, str] = {
    "dora": "DoRA's magnitude",
    "vera": "VeRA's vectors, with a projection that all layers share",
    "saved": "a tensor trained in full (modules_to_save, token rows, a bias, running statistics)",
    "base": "a base weight beside it (of a resized vocabulary, or PEFT's copy of an unchanged one: load_adapter, then export the model)",
    "token_embedding": "an adapter on the token embedding",
    "embedding": "an adapter on an embedding that is not the token embedding",
    "conv": "an adapter on a convolution",
    "transposed": "an adapter on a weight that is stored as (in, out), such as GPT-2's Conv1D",
    "parameter": "an adapter on a tensor of experts (target_parameters)",
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A program that loads adapters.

    Attributes:
        takes: the :data:`PARTS` that it loads.
        own_format: True if it reads PEFT's format whole: the files stay as they are.
        ranks: ranks that it can be started with, ascending; the adapter's is padded to one of them. Empty: any.
        names: pattern that a layer's name must contain; others are never looked at.
        stacks: names of layers that it computes as one → for each, the neighbour with an equal shape. A zero adapter stands in for an
            absent one. A layer without such a neighbour must be adapted.
        stacks_unless: names of layers beside which nothing is stacked.
        file: name of the file with the tensors.
        components: beginning or end of a base's class name → the component that the tensors' names begin with.
        load: how to load the exported folder, for its README. ``{folder}``, ``{base}`` and ``{rank}`` are filled in.
        template: what follows ``load`` if a chat template comes with the adapter. Without it the server takes the base's, or none.
        stop: what follows if the template ends an answer with another token than the tokenizer's end token. ``{ends}`` are both, ``{end}``
            is the other one. Without it the server takes the base's own end tokens.
    """

    takes: frozenset[str] = frozenset()
    own_format: bool = False
    ranks: tuple[int, ...] = ()
    names: re.Pattern[str] = re.compile("")
    stacks: tuple[Mapping[str, str | None], ...] = ()
    stacks_unless: frozenset[str] = frozenset()
    file: str = "adapter_model.safetensors"
    components: Mapping[str, str] = field(default_factory=dict)
    load: str
    template: str = ""
    stop: str = ""


TARGETS: dict[str, Target] = {
    "peft": Target(
        takes=frozenset(PARTS),
        own_format=True,
        load='from peft import {auto}\n\nmodel = {auto}.from_pretrained("{folder}"{options})',
        stop="\nmodel.generation_config.eos_token_id = {ends}",
    ),
    "vllm": Target(
        # PEFTHelper: one scaling from r, lora_alpha and use_rslora; rank_pattern and alpha_pattern are never read. It refuses DoRA and
        # modules_to_save, and validate_legal a bias. LoRAModel skips tensors of a base embedding without a word.
        # Embeddings: only those in a model's embedding_modules (embed_tokens).
        takes=frozenset({"token_embedding"}),
        ranks=(8, 16, 32, 64, 128, 256, 320, 512),  # config/lora.py, MaxLoRARanks without 1
        load="vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter={folder}",
        template=f" --chat-template {{folder}}/{CHAT_TEMPLATE}",
        # ModelConfig.generation_config: "If set to a folder path, the generation config will be loaded from the specified folder path".
        # SamplingParams.update_from_generation_config adds its eos_token_id, one or several, to the stop tokens of each request.
        stop=" --generation-config {folder}",
    ),
    "sglang": Target(
        # LoRAAdapter: scaling = lora_alpha / r, whatever use_rslora and the patterns say. _process_weight keeps what is in layers.N,
        # embed_tokens and lm_head. It has no place for modules_to_save, DoRA or biases.
        takes=frozenset({"token_embedding"}),
        names=re.compile(r"(^|\.)layers\.\d+\.|(^|\.)(embed_tokens|lm_head)$"),
        # normalize_qkv_proj stacks q, k and v where q is adapted, and reads v without asking whether it is there.
        # In DeepSeek's latent attention it leaves q alone. normalize_gate_up_proj stacks gate and up.
        stacks=({"q_proj": None, "k_proj": "v_proj", "v_proj": "k_proj"}, {"gate_proj": None, "up_proj": "gate_proj"}),
        stacks_unless=frozenset({"kv_a_proj_with_mqa", "kv_b_proj"}),
        load="python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths adapter={folder}",
        template=f" --chat-template {{folder}}/{CHAT_TEMPLATE}",
        # ModelConfig._get_hf_eos_token_id: the end tokens of the base's config, which this option overrides, and of its generation config.
        stop=" --json-model-override-args '{{\"eos_token_id\": {ends}}}'",
    ),
    "llama.cpp": Target(
        # convert_lora_to_gguf.py: writes lora_alpha and A, B; the runtime's scaling is lora_alpha over B's rank, so rsLoRA's and the
        # patterns' are lost. It exits at any other tensor, and skips base_layer weights. It permutes and splits A and B as it does the
        # base's weight, which fails for weights that it transposes.
        takes=frozenset({"token_embedding"}),
        load="python convert_lora_to_gguf.py {folder} --outfile adapter.gguf\nllama-cli -m base.gguf --lora adapter.gguf",
        template=f" --jinja --chat-template-file {{folder}}/{CHAT_TEMPLATE}",
        stop=" --override-kv tokenizer.ggml.eot_token_id=int:{end}",  # beside the GGUF file's own end token
    ),
    "diffusers": Target(
        # load_lora_weights: names begin with the pipeline's component. get_peft_kwargs reads ranks from the tensors, and takes alpha = r
        # where the file says none; releases before 0.42 take one alpha for all ranks.
        takes=frozenset({"dora", "conv"}),
        file="pytorch_lora_weights.safetensors",
        components={"UNet": "unet", "Transformer": "transformer", "CLIPText": "text_encoder"},
        load='pipe = DiffusionPipeline.from_pretrained("{base}")\npipe.load_lora_weights("{folder}")',
    ),
}
