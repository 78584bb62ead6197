"""What servers compute from an exported folder, written down from their loaders: each reads the files alone and returns layer → update.

They are references, not the servers: :mod:`lightning_lora.adapter_io.export_targets` names the files that they follow.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Updates = dict[str, Tensor]


def files(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return json.loads((folder / "adapter_config.json").read_text()), {k.removeprefix("base_model.model."): t for k, t in tensors.items()}


def pairs(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer → A and B; a server stops at any other name."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))", name)
        assert match, f"{name} is unsupported LoRA weight"
        found.setdefault(match[1], {})[match[2] or match[3]] = tensor.double()
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def vllm(folder: Path, max_lora_rank: int = 512) -> Updates:
    """PEFTHelper's one scaling for all layers; its refusals; one rank in the server's list."""
    config, tensors = files(folder)
    assert not config["modules_to_save"] and not config.get("use_dora") and config["bias"] == "none"
    assert config["r"] in (8, 16, 32, 64, 128, 256, 320, 512) and config["r"] <= max_lora_rank
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    assert all(len(a) <= config["r"] for a, _ in pairs(tensors).values())
    return {name: scaling * b @ a for name, (a, b) in pairs(tensors).items()}


def sglang(folder: Path) -> Updates:
    """lora_alpha / r, whatever else the config says; layers by their number; q, k and v stacked, gate and up stacked."""
    config, tensors = files(folder)
    assert isinstance(config["target_modules"], list)
    targets = {name.rpartition(".")[2] for name in config["target_modules"]}
    found = {}
    for name, (a, b) in pairs(tensors).items():
        parent, _, last = name.rpartition(".")
        assert len(a) == config["r"] and last in targets  # the buffers have one rank
        if re.search(r"layers\.\d+\.", name) or last in ("embed_tokens", "lm_head"):
            found[name] = config["lora_alpha"] / config["r"] * b @ a
        for stack in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if last in stack:
                assert all(f"{parent}.{other}.lora_A.weight" in tensors for other in stack)
    return found


def llama_cpp(folder: Path) -> Updates:
    """The converter writes lora_alpha; the runtime divides it by the number of B's columns."""
    config, tensors = files(folder)
    return {name: config["lora_alpha"] / b.shape[1] * b @ a for name, (a, b) in pairs(tensors).items()}


READERS = {"vllm": vllm, "sglang": sglang, "llama.cpp": llama_cpp}


def largest_difference(mine: Updates, theirs: Updates) -> float:
    """Over all layers; a layer that one side lacks is zero there."""
    return max(
        float((mine.get(name, torch.zeros(())) - theirs.get(name, torch.zeros(()))).abs().max()) for name in mine.keys() | theirs.keys()
    )
