"""What the fields of PEFT's ``LoraConfig`` are called here: for messages to people who write those."""

from __future__ import annotations

_SAID_BY_MODEL = "leave it out, the model says it"
# PEFT 0.21's field → ours. `docs/coming-from-peft.md` has the whole table.
OURS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "layers_to_transform": "layers",
    "layers_pattern": "layers",
    "target_parameters": "target_modules=['experts']",
    "lora_bias": "variant='lora_bias'",
    "use_dora": "variant='dora'",
    "use_rslora": "scaling='rslora'",
    "init_lora_weights": "init",
    "corda_config": "init_options",
    "lora_ga_config": "init_options",
    "eva_config": "init_options",
    "loftq_config": "init='loftq'",
    "fan_in_fan_out": _SAID_BY_MODEL,
    "task_type": _SAID_BY_MODEL,
    "base_model_name_or_path": _SAID_BY_MODEL,
    "peft_type": "variant",
    "inference_mode": "leave it out, what is trained is what the callback or the loop trains",
}


def in_our_words(name: str) -> str:
    """Return ``PEFT's r is rank here`` and the like; nothing for a name that PEFT does not have or that is the same here."""
    ours = OURS.get(name, "")
    return f"it is PEFT's; {ours}" if ours.startswith("leave") else f"PEFT's {name} is {ours} here" if ours else ""
