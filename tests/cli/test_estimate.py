"""`estimate`: of a model and of a run's config, without weights."""

import json
from pathlib import Path

import pytest
import yaml

from lightning_lora.cli.main import main


def numbers(capsys, *words):
    assert main(["estimate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_model(model, capsys):
    found = numbers(capsys, model, "--batch", "2", "--length", "16", "--lora.rank", "2")
    parts = found["bytes"]
    assert parts.pop("peak") == sum(parts.values()) and found["setting"]["batch"] == 2 and found["seconds"][0] < found["seconds"][1]
    wider = numbers(capsys, model, "--batch", "2", "--length", "16", "--lora.rank", "4")
    assert wider["bytes"]["adapters"] == 2 * parts["adapters"]
    assert main(["estimate", model, "--fits", "1MiB", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "peak" in output and "not estimated" in output and "in 1MiB: " in output


def test_one_offload_needs_no_list(model, capsys):
    words = (model, "--checkpointing", "full", "--offload")
    assert numbers(capsys, *words, "activations") == numbers(capsys, *words, "[activations]")


def test_a_runs_config(config, capsys):
    found = numbers(capsys, config)
    assert found["setting"]["precision"] == "32-true"
    more = numbers(capsys, config, "--batch", "64", "--fits", "24GiB")
    assert more["setting"]["batch"] == 64 and more["bytes"]["activations"] > found["bytes"]["activations"]
    assert more["fits"]["knobs"] == [] and more["fits"]["batch"] >= 64


TENSOR = {"class_path": "lightning_lora.LoRAFSDP2Strategy", "init_args": {"tensor_parallel_size": 2}}


@pytest.mark.parametrize(
    ("trainer", "wanted"),
    [
        ({"devices": 2}, ("ddp", 2)),
        ({"devices": [0, 1, 2]}, ("ddp", 3)),
        ({"devices": "0,1", "num_nodes": 2, "strategy": "ddp_find_unused_parameters_true"}, ("ddp", 4)),
        ({"devices": 2, "strategy": "lora_fsdp2"}, ("lora_fsdp2", 2)),
        ({"devices": 2, "strategy": {"class_path": "lightning_lora.LoRAFSDP2Strategy"}}, ("lora_fsdp2", 2)),
        ({"devices": "auto"}, ("single", 1)),
        ({"devices": 2, "strategy": TENSOR}, "tensor_parallel_size=2: estimate does not know"),
        ({"devices": 2, "strategy": "fsdp"}, "strategy='fsdp' is not known to estimate"),
    ],
    ids=str,
)
def test_the_devices_of_a_run(trainer, wanted, config, capsys, tmp_path):
    content = yaml.safe_load(Path(config).read_text())
    content["trainer"] |= trainer
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(content))
    if isinstance(wanted, str):
        assert main(["estimate", str(tmp_path / "more.yaml")]) == 2
        assert wanted in capsys.readouterr().err
    else:
        setting = numbers(capsys, str(tmp_path / "more.yaml"))["setting"]
        assert (setting["strategy"], setting["devices"]) == wanted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fits", "24"], "fits='24' is not a memory"),
        (["--fits", "0GiB"], "fits='0GiB'"),
        (["--batch", "0"], "batch=0"),
        (["--device", "tpu"], "device='tpu'"),
        (["--quantize", "int3"], "quantize='int3'"),
        (["--cuda_graphs"], "cuda_graphs=True (recorded) needs compile"),
        (["--offload", "frozn"], "offload='frozn' is not known"),
        (["--fit", "24GiB"], "no option 'fit'; did you mean 'fits'?"),
        (["24GiB"], "'24GiB' is one argument too many"),
        (["--lora.target_modules=nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_named(model, words, message, capsys):
    assert main(["estimate", model, *words]) == 2
    assert message in capsys.readouterr().err
