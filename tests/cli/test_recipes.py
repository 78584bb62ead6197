"""Every recipe of ``configs/`` trains two steps, with a tiny random model of its architecture in place of its model."""

import csv
import logging
import math
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file

from lightning_lora import LoRAConfig, find_targets
from lightning_lora.cli.main import main
from tests import tiny_lm
from tests.tasks import tiny

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = {path.stem: path for path in CONFIGS.glob("*.yaml")}
QUICKSTART = FILES["quickstart"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = {"vocab_size": len(tiny_lm.WORDS), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 8}
#: Beginning of a recipe's model → the configuration class of its architecture, and sizes of its own.
LANGUAGE_MODELS = {
    "meta-llama/Llama-3": (transformers.LlamaConfig, {}),
    "Qwen/Qwen3-8B": (transformers.Qwen3Config, {"head_dim": 8}),
    "Qwen/Qwen3-30B-A3B": (transformers.Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 16, **EXPERTS}),
    "unsloth/gpt-oss-20b": (transformers.GptOssConfig, {"num_local_experts": 4, "sliding_window": 16, **EXPERTS}),
    "google/gemma-3-1b": (transformers.Gemma3TextConfig, {"head_dim": 8, "sliding_window": 16}),
    "mistralai/Mistral-7B": (transformers.MistralConfig, {}),
    "microsoft/Phi-4-mini": (transformers.Phi3Config, {}),
    "HuggingFaceTB/SmolLM3": (transformers.SmolLM3Config, {}),
    "HuggingFaceTB/SmolLM2": (transformers.LlamaConfig, {}),
    ".cache/quickstart": (transformers.LlamaConfig, {}),
}
#: Models of other tasks → kinds of `tests.tasks.tiny`.
OTHERS = {
    "google-bert/bert-base-uncased": "bert",
    "answerdotai/ModernBERT-base": "modernbert",
    "google/flan-t5-base": "t5",
    "google/vit-base-patch16-224-in21k": "vit",
}
LEFT_OUT = "ignore:target_modules='all-linear' leaves out"  # what is large in a tiny model only, and experts
SPLITS = ("train", "val", "test", "predict")
THINGS = ["the sky", "the grass", "blood"]
#: Task → rows of a user's file; images are a folder.
ROWS = {
    "CausalLMTask": tiny_lm.rows(80),
    "DPOTask": [{"prompt": THINGS[i % 3], "chosen": "red", "rejected": "blue"} for i in range(20)],
    "SequenceClassificationTask": [{"text": THINGS[i % 3], "label": ["red", "blue"][i % 2]} for i in range(80)],
    "Seq2SeqTask": [{"prompt": THINGS[i % 3], "response": "red apple"} for i in range(40)],
}
#: Recipe → what a tiny model cannot do: ranks above its width, long rows.
SMALLER = {
    "packed_chat": {"data": {"max_length": 64}},
    "galore": {"model": {"galore": {"rank": 4}}},
    "rslora": {"lora": {"config": {"rank": 16}}},
    "vera": {"lora": {"config": {"rank": 16}}},
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


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """Return the folder of a tiny model of the same architecture, made once."""
    made: dict[str, str] = {}

    def of(model: str) -> str:
        if model not in made:
            folder = tmp_path_factory.mktemp("model")
            made[model] = tiny.save(folder, OTHERS[model]) if model in OTHERS else save(language_model(model), folder)
        return made[model]

    return of


def language_model(model: str) -> transformers.PreTrainedModel:
    config, sizes = next(entry for begin, entry in LANGUAGE_MODELS.items() if model.startswith(begin))
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config(**SIZES, **TOKENS, **sizes))


def save(network: transformers.PreTrainedModel, folder: Path) -> str:
    network.to(torch.bfloat16).save_pretrained(folder)
    tiny_lm.tokenizer().save_pretrained(folder)
    return str(folder)


def data_for(task: str, folder: Path) -> str:
    if task in ROWS:
        return tiny_lm.write(folder / "my.jsonl", ROWS[task])
    for i in range(80):
        label = folder / "photos" / ("dark" if i % 2 else "light")
        label.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * (i % 5), 0, 0)).save(label / f"{i}.png")
    return str(folder / "photos")


def content_of(words: list[str]) -> dict:
    """Return what the config files of a command line set, section by section."""
    found: dict = {}
    for file in (words[i + 1] for i, word in enumerate(words) if word == "--config"):
        for section, values in yaml.safe_load(Path(file).read_text()).items():
            found[section] = {**found.get(section, {}), **values} if isinstance(values, dict) else values
    return found


def train(words: list[str], own: dict, tiny_model, folder: Path) -> Path:
    """Run a recipe's command line with a tiny model and a user's data, on one CPU. Return the run's folder."""
    content = content_of(words)
    model = content["model"].get("init_args", content["model"])
    data = data_for(content["model"].get("class_path", "CausalLMTask"), folder)
    replaced = {"model": tiny_model(model["model"]), **({"gguf_file": None} if "gguf_file" in model else {})}
    given = {name: data for name, value in content["data"].items() if name in SPLITS and isinstance(value, str)}
    given |= {"num_workers": 0} if "num_workers" in content["data"] else {}
    machine = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "accumulate_grad_batches": 1, "enable_progress_bar": False}
    machine |= {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    sections = {"model": replaced, "data": given, "trainer": machine, "lora": {}}
    override = {name: {**values, **own.get(name, {})} for name, values in sections.items()}
    if "init_args" in content["model"]:
        override["model"] = {"init_args": override["model"]}
    (folder / "own.yaml").write_text(yaml.safe_dump(override))
    assert main([*words, "--config", str(folder / "own.yaml")]) == 0
    (run,) = (path.parent for path in folder.rglob("metrics.csv"))
    return run


def check(run: Path, adapts: bool) -> None:
    """It took two steps, left one checkpoint, and its adapter changes what it is on."""
    with open(run / "metrics.csv", newline="") as rows:
        losses = [float(row["train_loss"]) for row in csv.DictReader(rows) if row.get("train_loss")]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    assert len(list(run.rglob("*.ckpt"))) == 1
    assert (run / "adapter").is_dir() == adapts
    if adapts:
        tensors = load_file(run / "adapter" / "adapter_model.safetensors")
        changed = [tensor for name, tensor in tensors.items() if "lora_B" in name or "vera_lambda_b" in name]
        assert sum(bool(tensor.any()) for tensor in changed) > len(changed) / 3  # AdaLoRA has pruned the others


@pytest.mark.filterwarnings("ignore:Experiment logs directory", LEFT_OUT)
@pytest.mark.parametrize("recipe", sorted(FILES))
def test_a_recipe_trains(recipe, tiny_model, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(FILES[recipe].read_text())
    whole = "train" in content.get("data", {})
    files = [FILES[recipe]] if whole else [QUICKSTART, FILES[recipe]]
    run = train(["fit", *(word for file in files for word in ("--config", str(file)))], SMALLER.get(recipe, {}), tiny_model, tmp_path)
    check(run, adapts=not content.get("full_finetuning"))
    model = content.get("model", {})
    if model.get("init_args", model).get("learning_rate") == "auto":
        assert "learning_rate: " in caplog.text


def test_the_job_script_runs_a_recipe(tiny_model, tmp_path, monkeypatch):
    (line,) = (line for line in (CONFIGS / "slurm.sh").read_text().splitlines() if not line.startswith("#") and line)
    launcher, command, *words = shlex.split(line)
    assert (launcher, command) == ("srun", "lightning-lora")
    monkeypatch.chdir(tmp_path)
    words = [str(CONFIGS.parent / word) if word.startswith("configs/") else word for word in words]
    check(train(words, {"trainer": {"strategy": "auto"}}, tiny_model, tmp_path), adapts=True)


@pytest.mark.parametrize("recipe", ["qwen3_moe", "gpt_oss"])
@pytest.mark.filterwarnings(LEFT_OUT)
def test_what_a_mixture_of_experts_says_of_all_linear(recipe):
    content = yaml.safe_load(FILES[recipe].read_text())
    network = language_model(content["model"]["model"])
    reached = [
        [target.fqn for target in find_targets(network, LoRAConfig(rank=2, target_modules=targets)).targets]
        for targets in (content["lora"]["config"]["target_modules"], "all-linear")
    ]
    more = {fqn.rpartition(".")[2] for fqn in {*reached[1]} - {*reached[0]}}
    assert {*reached[0]} <= {*reached[1]} and more == {"experts"} and "`all-linear` reaches the experts too" in FILES[recipe].read_text()


def test_the_table_has_every_recipe():
    there = {path.name for path in CONFIGS.iterdir()} - {"README.md"}
    assert set(re.findall(r"^\| `([\w.]+)`", (CONFIGS / "README.md").read_text(), flags=re.MULTILINE)) == there
