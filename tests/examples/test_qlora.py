"""The QLoRA config on a tiny random model and made-up questions, through the command line: no network, seconds."""

import csv
from pathlib import Path

import pytest
import torch
import transformers

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, load_adapter, quantize_base
from lightning_lora.cli.lightning_cli import LoRACLI
from lightning_lora.cli.main import main
from lightning_lora.quantization.formats import format_of
from tests import quantized, tiny_lm
from tests.conftest import fill

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LAYERS = ["--config", str(CONFIGS / "quickstart.yaml"), "--config", str(CONFIGS / "qlora.yaml")]


@pytest.fixture
def overrides(tmp_path, monkeypatch):
    """What stands in for the quickstart's model and data."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    tiny_lm.save(tmp_path / "model")
    files = {split: tiny_lm.write(tmp_path / f"{split}.jsonl", tiny_lm.rows(24)) for split in ("train", "val", "test", "predict")}
    return [
        *(f"--data.{split}={file}" for split, file in files.items()),
        f"--model.model={tmp_path / 'model'}",
        "--model.gguf_file=null",
        "--model.learning_rate=0.01",
        "--trainer.accelerator=cpu",
        "--trainer.log_every_n_steps=1",
        f"--trainer.logger.init_args.save_dir={tmp_path / 'runs'}",
        f"--trainer.callbacks.init_args.dirpath={tmp_path / 'checkpoints'}",
    ]


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_one_line_makes_a_run_qlora(overrides, tmp_path):
    """It learns, every linear but the head is packed, and what it leaves is an adapter of the model before it was packed."""
    assert main(["fit", *LAYERS, *overrides, "--trainer.max_epochs=6"]) == 0
    with (tmp_path / "runs" / "quickstart" / "metrics.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file) if row.get("train_loss")]
    assert len(losses) == 18 and sum(losses[-5:]) < 0.2 * sum(losses[:5])
    plain = load_adapter(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "checkpoints" / "best.ckpt")
    assert plain.model.layers[0].mlp.up_proj.lora_B.any()
    assert main(["test", *LAYERS, *overrides, f"--ckpt_path={tmp_path / 'checkpoints' / 'best.ckpt'}"]) == 0


@pytest.mark.parametrize("how", [how for how in quantized.QUANTIZERS if how != "torchao-nf4"])  # whose layers have to be larger
def test_every_format_from_the_command_line(how, overrides):
    cli = LoRACLI([*LAYERS, *overrides, f"--lora.quantize={how}", "--trainer.limit_train_batches=1"], run=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    packed = [name for name, module in cli.model.model.named_modules() if format_of(module) is not None]
    assert len(packed) == 2 * 7 and "lm_head" not in packed


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", ["nf4", "int8", "torchao-int8", "fp8"])
def test_gradient_checkpointing_changes_nothing(how, reentrant):
    """On a packed base too: the same gradients with activations computed twice."""
    ids, gradients = torch.randint(len(tiny_lm.WORDS), (2, 7), generator=torch.Generator().manual_seed(1)), []
    for checkpointing in (False, True):
        model = quantize_base(tiny_lm.llama(), how).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
        fill(apply_lora(model, LoRAConfig(rank=2, target_modules="all-linear")))
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in get_lora_parameters(model)])
    assert len(gradients[0]) == 2 * 7 * 2
    for once, twice in zip(*gradients, strict=True):
        assert torch.allclose(once, twice, rtol=1e-5, atol=1e-7) and once.any()
