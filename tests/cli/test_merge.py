import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, load_adapter, quantize_base, save_adapter
from lightning_lora.adapter_io.certificate import CERTIFICATE
from lightning_lora.cli.main import main
from tests import tiny_lm


def test_merge_gives_the_adapted_models_logits_and_plain_classes(model, adapter, tmp_path, capsys):
    out = tmp_path / "merged"
    assert main(["merge", model, adapter, str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    certificate = printed.pop("certificate")
    assert printed == {"model": str(out), "base": model, "adapter": adapter, "merged_layers": 4}
    assert certificate == json.loads((out / CERTIFICATE).read_text())
    ids = torch.arange(4, 14)[None]
    base, merged = (transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (model, out))
    assert merged.state_dict().keys() == base.state_dict().keys()
    with torch.no_grad():
        plain, ours = base(ids).logits, merged(ids).logits
        theirs = load_adapter(base, adapter)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 1e-2
    assert transformers.AutoTokenizer.from_pretrained(out)("blue").input_ids == tiny_lm.tokenizer()("blue").input_ids


def test_an_adapter_with_loftq_is_merged_into_the_base_as_it_was_quantized(model, tmp_path, capsys):
    config = LoRAConfig(rank=4, target_modules="all-linear", init="loftq", modules_to_save=[])
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    trained = apply_lora(quantize_base(base, "fp8", lora=config), config)
    for parameter in get_lora_parameters(trained):
        torch.nn.init.normal_(parameter, std=0.1)
    folder, out, ids = str(save_adapter(trained, tmp_path / "adapter")), tmp_path / "merged", torch.arange(4, 14)[None]
    assert main(["merge", model, folder, str(out), "--json"]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert not hasattr(merged.config, "quantization_config")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trained(ids).logits, rtol=1e-3, atol=1e-3)
    capsys.readouterr()
    assert main(["generate", model, "which colour is the sky", "--adapter", folder, "--max_new_tokens=2"]) == 0
    quantize_base(
        base := transformers.AutoModelForCausalLM.from_pretrained(model),
        "fp8",
        targets=["q_proj"],
        lora=(one := replace(config, target_modules=["q_proj"])),
    )
    other = str(save_adapter(apply_lora(base, one), tmp_path / "other"))
    assert main(["merge", model, other, str(tmp_path / "no")]) == 2
    assert "belongs to quantized weights" in capsys.readouterr().err


def test_the_template_of_the_run_travels_with_a_checkpoint(config, tmp_path, capsys):
    """The base has none. The run's ends turns with another token than the base's texts, and the merged model stops there by itself."""
    words = [*tiny_lm.WORDS, "<end>"]
    base, template = tiny_lm.save(tmp_path / "base", chat=False, words=words), tiny_lm.CHATML.replace("</s>", "<end>")
    tokenizer = tiny_lm.tokenizer(False, words)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.save_pretrained(base)
    (tmp_path / "own.jinja").write_text(template)
    assert main(["fit", "--config", config, "--model.model", base, "--data.template", str(tmp_path / "own.jinja")]) == 0
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    for number, tuned in enumerate((str(checkpoint), str(tmp_path / "run" / "adapter"))):
        merged, served = str(tmp_path / f"merged{number}"), tmp_path / f"served{number}"
        assert main(["merge", base, tuned, merged, "--probe_tokens=0"]) == 0
        assert transformers.AutoTokenizer.from_pretrained(merged).chat_template == template
        stops = transformers.AutoModelForCausalLM.from_pretrained(merged).generation_config.eos_token_id
        assert stops == [words.index("</s>"), words.index("<end>")]
        assert main(["export", tuned, str(served), "--for", "vllm", "--base", base]) == 0
        assert (served / "chat_template.jinja").read_text() == template
        card = (served / "README.md").read_text()
        assert f" --chat-template {served.name}/chat_template.jinja --generation-config {served.name}\n" in card
        assert transformers.GenerationConfig.from_pretrained(served).eos_token_id == stops  # what vLLM adds to each request's stop tokens
    for target, option in (
        ("sglang", f" --json-model-override-args '{{\"eos_token_id\": {stops}}}'\n"),
        ("llama.cpp", f" --override-kv tokenizer.ggml.eot_token_id=int:{stops[1]}\n"),
        ("peft", f"\nmodel.generation_config.eos_token_id = {stops}\n"),
    ):
        assert main(["export", str(tmp_path / "run" / "adapter"), str(tmp_path / target), "--for", target, "--base", base]) == 0
        assert option in (tmp_path / target / "README.md").read_text()
    capsys.readouterr()


DTYPES = {"auto": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize(("trained", "merged"), [(one, other) for one in DTYPES for other in DTYPES])
def test_merge_in_another_dtype_than_the_adapter_was_trained_in(model, tmp_path, capsys, trained, merged):
    """Rounding to float16 and then to the fingerprint's bfloat16 is not rounding once; another base is refused in each dtype."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=trained)
    adapter = str(save_adapter(apply_lora(network, config=LoRAConfig(rank=1, target_modules=["q_proj"])), tmp_path / "adapter"))
    assert main(["merge", model, adapter, str(tmp_path / "merged"), f"--dtype={merged}"]) == 0
    weights = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {DTYPES[merged]}
    if trained == merged:
        other = transformers.AutoModelForCausalLM.from_pretrained(model)
        with torch.no_grad():
            other.model.layers[0].mlp.up_proj.weight += 0.01
        other.save_pretrained(tmp_path / "other")
        transformers.AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "other")
        assert main(["merge", str(tmp_path / "other"), adapter, str(tmp_path / "new"), f"--dtype={merged}"]) == 2
        assert "was trained on another base: fingerprint" in capsys.readouterr().err


def test_merge_never_loses_what_is_there(model, adapter, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("precious")
    assert main(["merge", model, adapter, str(out)]) == 2
    assert "is not empty; name another folder, or pass --overwrite" in capsys.readouterr().err
    assert main(["merge", model, "/no/such/adapter", str(out), "--overwrite"]) == 2
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "old"]
    assert main(["merge", model, adapter, model, "--overwrite"]) == 2
    assert "which it is made from" in capsys.readouterr().err and Path(model, "model.safetensors").is_file()
    assert main(["merge", model, adapter, str(out), "--overwrite"]) == 2
    assert "holds 'old': --overwrite replaces a model" in capsys.readouterr().err and (out / "old").read_text() == "precious"
    (out / "old").unlink()
    for _ in range(2):
        assert main(["merge", model, adapter, str(out), "--overwrite"]) == 0
    assert (out / "model.safetensors").is_file()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert main(["merge", model, adapter, str(out / "model.safetensors")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


def test_merge_writes_a_certificate(model, adapter, tmp_path, capsys):
    """Of the adapter that `inspect` shows, and with the logits' difference on a few tokens unless that is switched off."""
    assert main(["merge", model, adapter, str(tmp_path / "merged"), "--dtype=bfloat16"]) == 0
    printed = capsys.readouterr().out
    certificate = json.loads((tmp_path / "merged" / CERTIFICATE).read_text())
    worst = max(each["lost"] for each in certificate["layers"].values())
    difference = certificate["probe"]["logits"]["max_relative"]
    assert f"rounding loses at most {worst:.2%} of an update (model.layers." in printed
    assert f"output 'logits' differs by at most {difference:.2e} of its largest entry; {CERTIFICATE} has each layer" in printed
    assert certificate["dtype"] == "bfloat16" and 0 < difference < 1
    assert main(["inspect", adapter, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checksum"] == certificate["adapter"]["checksum"]
    assert main(["merge", model, adapter, str(tmp_path / "merged"), "--overwrite", "--probe_tokens=0"]) == 0
    certificate = json.loads((tmp_path / "merged" / CERTIFICATE).read_text())
    assert certificate["dtype"] == "float32" and certificate["probe"] is None


def test_merge_refuses_what_rounding_would_lose(model, adapter, tmp_path, capsys):
    arguments = ["merge", model, adapter, str(tmp_path / "merged"), "--dtype=bfloat16"]
    assert main([*arguments, "--max_lost=1e-6"]) == 2
    assert "of its update by rounding, more than max_lost=1e-06 (4 of 4 weights do)" in capsys.readouterr().err
    for wrong in ("--max_lost=-1", "--max_lost=much", "--probe_tokens=-1", "--probe_tokens=1.5"):
        assert main([*arguments, wrong]) == 2
        assert wrong.partition("=")[0].strip("-") in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    assert main([*arguments, "--max_lost=0.9"]) == 0
