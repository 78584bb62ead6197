"""Every recipe of ``configs/recipes`` trains two steps, with a tiny random model of its architecture in place of its model."""

import csv
import logging
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from lightning_lora.cli.main import main
from tests import tiny_lm

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = {"vocab_size": len(tiny_lm.WORDS), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
#: Beginning of a recipe's model → the configuration class of its architecture, and sizes of its own.
ARCHITECTURES = {
    "meta-llama/Llama-3": (transformers.LlamaConfig, {}),
    "Qwen/Qwen3-8B": (transformers.Qwen3Config, {"head_dim": 8}),
    "Qwen/Qwen3-30B-A3B": (transformers.Qwen3MoeConfig, EXPERTS),
    "google/gemma-3-1b": (transformers.Gemma3TextConfig, {"head_dim": 8, "sliding_window": 16}),
    "mistralai/Mistral-7B": (transformers.MistralConfig, {}),
    "microsoft/Phi-4-mini": (transformers.Phi3Config, {}),
    "HuggingFaceTB/SmolLM3": (transformers.SmolLM3Config, {}),
}


@pytest.fixture(autouse=True)
def alone_again():
    """A sharding strategy starts a process group, of one process here; take it and its environment away again."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def tiny(model: str, folder: Path) -> str:
    config, sizes = next(entry for begin, entry in ARCHITECTURES.items() if model.startswith(begin))
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(config(**SIZES, **TOKENS, **sizes))
    network.to(torch.bfloat16).save_pretrained(folder)
    tiny_lm.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_a_recipe_trains(recipe, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    file = RECIPES / f"{recipe}.yaml"
    content = yaml.safe_load(file.read_text())
    data = tiny_lm.write(tmp_path / "rows.jsonl", tiny_lm.rows(4 * content["data"]["batch_size"]))
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "run", "version": ""}}
    machine = {"accelerator": "cpu", "devices": 1, "max_steps": 2, "accumulate_grad_batches": 1, "log_every_n_steps": 1}
    machine |= {"num_sanity_val_steps": 0, "limit_val_batches": 1, "enable_progress_bar": False, "logger": logger}
    own = {
        "model": {"model": tiny(content["model"]["model"], tmp_path / "model")},
        "data": {"train": data, "val": data},
        "trainer": machine,
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    assert main(["fit", "--config", str(file), "--config", str(tmp_path / "own.yaml")]) == 0
    with open(tmp_path / "run" / "metrics.csv", newline="") as rows:
        losses = [float(row["train_loss"]) for row in csv.DictReader(rows) if row.get("train_loss")]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    assert len(list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))) == 1
    assert "learning_rate: " in caplog.text


def test_the_job_script_is_one_that_the_shell_reads():
    script = RECIPES / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    named = [word for word in script.read_text().split() if word.endswith(".yaml")]
    assert named and all((RECIPES.parents[1] / word).is_file() for word in named)
