"""Each value of a recipe follows from what was seen, and the file that `init` writes runs."""

import dataclasses
import json
from pathlib import Path

import numpy
import pytest
import torch
import transformers
import yaml
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lightning_lora.cli import recipe
from lightning_lora.cli.main import main
from lightning_lora.cli.recipe import Seen, batch_size, lora_rank, max_length
from lightning_lora.tasks import CausalLMTask
from tests import tiny_lm
from tests.tasks import tiny

SEEN = Seen(lengths=[10] * 97 + [100, 500, 9000], learnt=1000, context=2048, parameters=10**8, per_rank=10**5, device="cpu")


def test_max_length_covers_most_rows_within_the_context():
    assert max_length(SEEN) == 512
    assert max_length(dataclasses.replace(SEEN, context=400)) == 400
    assert max_length(dataclasses.replace(SEEN, lengths=[64])) == 64 and max_length(dataclasses.replace(SEEN, lengths=[65])) == 128


@pytest.mark.parametrize(
    ("length", "device", "size"), [(64, "cpu", 16), (512, "cpu", 4), (700, "cpu", 2), (9000, "cpu", 1), (1024, "cuda", 8)]
)
def test_batches_fit(length, device, size):
    assert batch_size(length, device) == size


def test_the_rank_holds_what_is_learnt():
    assert lora_rank(SEEN) == 8
    assert lora_rank(dataclasses.replace(SEEN, learnt=4 * 10**6)) == 32  # 2 million parameters are 20 of rank 1
    assert lora_rank(dataclasses.replace(SEEN, learnt=10**12)) == 128


def test_what_init_writes_runs(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_lm.write(tmp_path / "rows 1.jsonl", tiny_lm.rows(60))
    assert main(["init", model, "rows 1.jsonl"]) == 0
    written = Path("run.yaml").read_text()
    assert written in capsys.readouterr().out
    config = yaml.safe_load(written)
    assert config["data"] == {"train": "rows 1.jsonl", "val": 0.1, "max_length": 64, "batch_size": 16}
    assert config["lora"]["config"]["target_modules"] == "all-linear" and config["model"]["learning_rate"] == "auto"
    assert main(["init", model, "rows 1.jsonl"]) == 2
    assert "out='run.yaml' exists; name another file, or pass --overwrite" in capsys.readouterr().err
    assert main(["fit", "--config", "run.yaml", "--trainer.accelerator=cpu", "--trainer.max_steps=1"]) == 0
    assert main(["init", model, "rows 1.jsonl", "--overwrite", "--json", "--val=0.5"]) == 0
    assert yaml.safe_load(Path("run.yaml").read_text())["data"]["val"] == 0.5


@pytest.mark.parametrize(("dtype", "slow", "written"), [("bfloat16", True, "float32"), ("bfloat16", False, None), ("float32", True, None)])
def test_half_weights_are_widened_where_the_processor_has_no_instructions_for_them(dtype, slow, written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "multiplies_half_slowly", lambda device: slow)
    tiny_lm.save(tmp_path / "model")
    tiny_lm.llama().to(getattr(torch, dtype)).save_pretrained(tmp_path / "model")
    tiny_lm.write(tmp_path / "rows.jsonl", tiny_lm.rows(4))
    assert main(["init", "model", "rows.jsonl"]) == 0
    assert yaml.safe_load(Path("run.yaml").read_text())["model"].get("dtype") == written


PAIRS = [{"prompt": "the sky", "chosen": "blue", "rejected": "red"}] * 4


@pytest.mark.parametrize(
    ("rows", "options"), [(tiny_lm.rows(4), []), (PAIRS, []), ([{"text": "the sky"}] * 4, []), (tiny_lm.rows(4), ["--task=CausalLMTask"])]
)
def test_rows_to_write_are_not_for_an_encoder(rows, options, tmp_path, capsys, monkeypatch):
    """`AutoModelForCausalLM` has a class for BERT, whose loss goes to zero because it sees the answer. A fit says the same."""
    monkeypatch.chdir(tmp_path)
    model, file = tiny.save(tmp_path / "bert", "bert"), tiny_lm.write(tmp_path / "rows.jsonl", rows)
    for command in (["init", model, file, *options], ["inspect", file, f"--model={model}"]):
        assert main(command) == 2 or (options and command[0] == "inspect")
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.endswith(
            "bert' is an encoder (bert), which reads a text in both directions and cannot write one: name a model that"
            + " writes, or rows with labels and a task for them"
        )
    assert not Path("run.yaml").exists()
    with pytest.raises(ValueError, match="is an encoder"):
        CausalLMTask(model)


def test_an_encoder_that_is_configured_to_write_may(tmp_path):
    tiny.save(tmp_path / "bert", "bert")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "bert")
    config.is_decoder = True
    config.save_pretrained(tmp_path / "bert")
    assert CausalLMTask(str(tmp_path / "bert")).model.config.is_decoder


class Small:
    total_memory = 100_000


@pytest.mark.parametrize("value", ["all-linear", "no", "null", "q_proj: a", "1e-3", "a#b", 1e-3, 0.5, 8, ["fc1", "yes"], True])
def test_a_value_is_read_as_it_was_written(value):
    assert yaml.safe_load(recipe._scalar(value)) == value


def test_a_large_model_is_packed_on_a_small_gpu(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Small)
    rows = tiny_lm.write(tmp_path / "rows.jsonl", tiny_lm.rows(4))
    for memory, quantize in ((10**6, None), (40_000, "nf4")):
        Small.total_memory = memory
        assert main(["init", model, rows, f"--out={tmp_path / 'run.yaml'}", "--overwrite"]) == 0
        assert yaml.safe_load((tmp_path / "run.yaml").read_text())["lora"].get("quantize") == quantize


# The patches' convolution is a third of a tiny ViT, and a tiny ResNet's layers are smaller than the rank.
@pytest.mark.filterwarnings("ignore:target_modules='all-linear' leaves out", "ignore:rank=8 of", "ignore:.is_gradient_checkpointing")
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_an_image_folder(kind, tmp_path, capsys, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    model = tiny.save(tmp_path / "model", kind)
    for label, colour in (("cat", "red"), ("cow", "green"), ("dog", "blue")):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(20):
            image.new("RGB", (40, 40), colour).save(tmp_path / "images" / label / f"{number}.png")
    assert main(["init", model, "images"]) == 0, capsys.readouterr().err
    config = yaml.safe_load(Path("run.yaml").read_text())
    assert config["model"]["class_path"] == "lightning_lora.tasks.ImageClassificationTask"
    assert config["data"] == {"train": "images", "val": 0.1, "batch_size": 16}  # an image has no length in tokens
    assert config["lora"]["config"]["target_modules"] == ("all-linear" if kind == "vit" else ["convolution"])
    assert "60 rows, 60 labels to learn" in Path("run.yaml").read_text()
    capsys.readouterr()
    assert main(["inspect", "run.yaml", "--json"]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["train"]["examples"] == 54
    short = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    assert main(["fit", "--config", "run.yaml", *short, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["last"].keys() >= {"val_loss", "val_accuracy"}
    assert main(["merge", model, *report["adapter"], "merged"]) == 0
    merged = transformers.AutoModelForImageClassification.from_pretrained("merged")
    assert list(merged.config.id2label.values()) == ["cat", "cow", "dog"]
    assert main(["export", *report["adapter"], "served"]) == 0
    assert 'AutoPeftModel.from_pretrained("served", num_labels=3)' in Path("served", "README.md").read_text()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # PEFT looks for a tokenizer, which images have none of, on the hub too
    theirs = pytest.importorskip("peft").AutoPeftModel.from_pretrained("served", num_labels=3)
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixel_values=pixels).logits, merged(pixels).logits, rtol=1e-4, atol=1e-5)
    assert main(["merge", model, "served", "merged again"]) == 0  # the labels are there too
    assert main(["predict", "--config", report["config"], "--data.predict=images", "--trainer.logger=false"]) == 0
    assert {json.loads(line)["label"] for line in capsys.readouterr().out.splitlines() if line.startswith("{")} <= {"cat", "cow", "dog"}
    (tmp_path / "images" / "cat" / "0.png").write_bytes(b"no image")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it would try for 20 s
    assert main(["init", model, "none", "--out=other.yaml", "--task=ImageClassificationTask"]) == 2
    assert "data.train='none': no such f" in capsys.readouterr().err


def gguf_model(folder: Path) -> str:
    """A folder with a GGUF file: the header and the vocabulary of a model, and a weight that would not fit."""
    gguf = pytest.importorskip("gguf")
    folder.mkdir()
    tokens = [*bytes_to_unicode().values(), "th", "<pad>", "</s>"]
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_name("tiny")
    sizes = {
        "context_length": 256,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 48,
        "head_count": 4,
        "head_count_kv": 2,
    }
    for name, size in sizes.items():
        getattr(writer, f"add_{name}")(size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_pad_token_id(len(tokens) - 2)
    writer.add_chat_template(tiny_lm.CHATML)
    writer.add_tensor("output.weight", numpy.zeros((7, 32), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(folder)


def test_of_a_gguf_file_only_the_metadata_is_read(tmp_path, capsys, monkeypatch):
    model, asked = gguf_model(tmp_path / "model"), []
    read = transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *args, **kwargs: asked.append(args) or read(*args, **kwargs))
    rows, out = tiny_lm.write(tmp_path / "rows.jsonl", tiny_lm.rows(6)), str(tmp_path / "run.yaml")
    assert main(["init", model, rows, "--gguf_file=m.gguf", f"--out={out}"]) == 0, capsys.readouterr().err
    assert len(asked) == 1  # it has the vocabulary, which takes seconds to read
    config = yaml.safe_load(Path(out).read_text())["model"]
    assert config["gguf_file"] == "m.gguf" and "# 0.0 M parameters" in Path(out).read_text()
    capsys.readouterr()
    assert main(["inspect", model, "--gguf_file=m.gguf", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    head = (256 + 3) * 32
    assert len(seen["targets"]) == 14 and seen["parameters"] == 2 * head + 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48 + 2 * 32) + 32
