"""The README of an exported adapter: what it is, what it was trained on, how to load it. The hub reads its first lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_lora.adapter_io.export_targets import TARGETS

CARD = "README.md"
# PEFT's task type → the hub's pipeline tag, and the class of PEFT that loads the base with the adapter.
_TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoPeftModelForCausalLM"),
    "SEQ_2_SEQ_LM": ("text2text-generation", "AutoPeftModelForSeq2SeqLM"),
    "SEQ_CLS": ("text-classification", "AutoPeftModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoPeftModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoPeftModelForQuestionAnswering"),
}
_SHOWN = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules", "modules_to_save")


def model_card(
    fields: dict[str, Any],
    base: dict[str, Any] | None,
    target: str,
    folder: str,
    data: str | None,
    metrics: Mapping[str, float],
    template: bool = False,
    ends: Sequence[int] = (),
    labels: Sequence[str] = (),
) -> str:
    """Return the card's text.

    Args:
        fields: the exported ``adapter_config.json``.
        base: the base's identity (:func:`~lightning_lora.adapter_io.fingerprint.base_identity`); None if the adapter does not say.
        target: name of the target.
        folder: name of the exported folder.
        data: what it was trained on.
        metrics: name → value.
        template: the folder has a chat template.
        ends: tokens that end an answer, if there are others than the tokenizer's end token; these first.
        labels: names of the head's labels.
    """
    rules = TARGETS[target]
    name = fields.get("base_model_name_or_path")
    tag, auto = _TASKS.get(fields.get("task_type") or "", (None, "AutoPeftModel"))
    head: dict[str, Any] = {"library_name": "diffusers" if rules.components else "peft", "tags": ["lora", "lightning-lora"]}
    head |= {key: value for key, value in (("base_model", name), ("pipeline_tag", tag)) if value}
    header = "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items())  # JSON is YAML
    filled = {
        "folder": folder,
        "base": name or "BASE",
        "rank": fields["r"],
        "auto": auto,
        "ends": sorted(ends),
        "end": next(iter(ends), None),
        "options": f", num_labels={len(labels)}" if labels else "",
    }
    stop = rules.stop.format(**filled) if ends else ""
    load = (rules.load + (rules.template if template else "")).format(**filled) + stop
    shown = {key: fields[key] for key in _SHOWN if fields.get(key)}
    identity = f"{base['class']}, fingerprint `{base['fingerprint']}`" if base else "not recorded"
    parts = [
        f"---\n{header}---",
        f"# A LoRA adapter for {name or 'a base model'}",
        f"Exported for {target} by lightning-lora.",
        f"- Base: {name or 'not known'} ({identity})\n- Trained on: {data or 'not recorded'}"
        + (f"\n- Labels: {', '.join(labels)}" if labels else ""),
        "## How to load it\n\n```\n" + load + "\n```",
        "## Configuration\n\n```json\n" + json.dumps(shown, indent=2) + "\n```",
    ]
    if stop:
        parts[4] += (
            f"\n\nThe chat template ends an answer with another token than the base ends a text with. `{stop.strip()}` stops it there."
        )
    if metrics:
        rows = "\n".join(f"| {key} | {value:.4g} |" for key, value in metrics.items())
        parts.insert(4, f"## Metrics\n\n| metric | value |\n|---|---|\n{rows}")
    return "\n\n".join(parts) + "\n"
