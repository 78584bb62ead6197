"""The README is run: its Python blocks one after another in one namespace, its YAML and its command lines through the real parsers.

Nothing in it can be skipped. The names that it takes for granted (`MyModule`, `model`, `batches`) are tiny stand-ins, made here.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import lightning_lora
from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, load_adapter, save_adapter
from lightning_lora.cli import commands, inspect_rows, main, sweep
from lightning_lora.cli.lightning_cli import LoRACLI
from lightning_lora.layers import LoRALayer
from lightning_lora.registry import INITS, VARIANTS
from tests.tasks import tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def command_lines() -> Iterator[list[str]]:
    """Every command line of the bash blocks, as words."""
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


class MyModule(L.LightningModule):
    """A LightningModule as anyone has it: it knows nothing of LoRA, and hands all its parameters to the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama().train()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("test_loss", self.model(**batch).loss, batch_size=2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(batches(), batch_size=None)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(batches(), batch_size=None)


def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.arange(48).reshape(4, 2, 6)  # four batches of two rows
    return [{"input_ids": rows, "labels": rows} for rows in ids]


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What is there after all Python blocks have run, in an empty folder (under `__folder__`)."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("readme")
        patch.chdir(folder)
        tiny.save(folder / "answerdotai" / "ModernBERT-base", "modernbert")
        (folder / "train.csv").write_text("text,label\n" + "which colour is the sky,sky\nblood is red,blood\n" * 10)
        for name in ("legal", "polite"):
            made = apply_lora(llama(), LoRAConfig())
            for parameter in get_lora_parameters(made):
                torch.nn.init.normal_(parameter)
            save_adapter(made, folder / "runs" / name / "adapter")
        names: dict[str, Any] = {"MyModule": MyModule, "model": llama(), "batches": batches(), "base_model": llama(), "__folder__": folder}
        for block in blocks("python"):
            line = README[: README.index(block)].count("\n")
            exec(compile("\n" * line + block, str(ROOT / "README.md"), "exec"), names)
        yield names


# Lightning's advice where a block leaves out, for brevity, what a long run would set.
ADVICE = pytest.mark.filterwarnings("ignore:.*TensorBoard.*", "ignore:.*tensorboard.*", "ignore:`isinstance.treespec, LeafSpec.`")


@ADVICE
def test_the_callback_block(namespace: dict[str, Any]) -> None:
    """It trained, merged and tested; the base came through."""
    module, config = namespace["module"], LoRAConfig(target_modules=["q_proj", "v_proj"])
    layers = [layer for layer in module.modules() if isinstance(layer, LoRALayer)]
    assert len(layers) == 2 * len(config.target_modules) and all(layer.merged for layer in layers)
    assert module.model.state_dict().keys() == llama().state_dict().keys()
    assert namespace["trainer"].callback_metrics["test_loss"] < MyModule().model.eval()(**batches()[0]).loss
    trials = {each.name: each for each in namespace["found"].outcomes}  # of the block that sweeps
    assert [(each.status, each.steps) for each in trials.values()] == [("complete", 4)] * 2
    assert all(len(list((namespace["__folder__"] / "runs" / "sweep" / name).rglob("*.ckpt"))) == 1 for name in trials)


@ADVICE
def test_the_block_of_named_adapters(namespace: dict[str, Any]) -> None:
    """The first row has an adapter, the second is the base's."""
    plain = llama()(**batches()[0]).logits
    assert namespace["adapters"].active == "polite"
    torch.testing.assert_close(namespace["answers"][1], plain[1])
    assert (namespace["answers"][0] - plain[0]).abs().max() > 1e-2


@ADVICE
def test_the_task_block(namespace: dict[str, Any]) -> None:
    """It learned the labels of the rows, with a new head beside the adapters."""
    task = namespace["task"]
    assert task.labels == ["blood", "sky"] and task.trainer.callback_metrics.keys() >= {"val_loss", "val_accuracy", "val_f1"}
    assert task.model.classifier.weight.requires_grad and all(layer.merged for layer in task.modules() if isinstance(layer, LoRALayer))


@ADVICE
def test_the_plain_loop_block(namespace: dict[str, Any]) -> None:
    """It trained adapters on every linear but the head, saved them as PEFT does, and the base is back bit for bit."""
    model, folder = namespace["model"], namespace["__folder__"]
    assert len(get_lora_parameters(model)) == 2 * 7 * 2
    assert all(layer.lora_B.any() and not layer.merged for layer in model.modules() if isinstance(layer, LoRALayer))
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    base = llama().state_dict()
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items() if ".lora_" not in name)


def test_the_samples_train_all_that_apply_lora_says_trains() -> None:
    """On a model with a fresh head and trained biases too: what the optimizer gets, and what a recorded step keeps."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
    model = apply_lora(BertForSequenceClassification(BertConfig(**sizes)), LoRAConfig(target_modules=["query"], bias="all"))
    names = {**vars(lightning_lora), "torch": torch, "model": model}
    (optimizer,) = re.findall(r"^optimizer = (.+?)(?:  #.*)?$", README, re.MULTILINE)
    groups = eval(optimizer, names).param_groups
    samples = [[p for group in groups for p in group["params"]]]
    for text in (README, str(lightning_lora.cuda_graph_step.__doc__)):
        (parameters,) = re.findall(r"with cuda_graph_step(\(.+\)):", text)
        samples.append(list(eval(parameters, names)))
    trains = {id(p) for p in model.parameters() if p.requires_grad}
    assert id(model.classifier.weight) in trains and len(trains) > len(get_lora_parameters(model))
    assert all({id(p) for p in sample} == trains for sample in samples)


@ADVICE
def test_the_reference_block(namespace: dict[str, Any]) -> None:
    """Logits of the base, by a model whose adapters are trained and on again."""
    assert torch.equal(namespace["reference"], llama().train()(**namespace["batch"]).logits)
    assert not torch.equal(namespace["reference"], namespace["model"](**namespace["batch"]).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks transformers so
def test_the_table_for_those_who_come_from_peft(tmp_path: Path) -> None:
    """Each row is run as written, in PEFT and here, on models with the same adapter: the logits are the same after it."""
    table = README[README.index("### Coming from PEFT") :].partition("\n## ")[0]
    rows = [[re.findall("`(.+?)`", cell) for cell in line.split("|")[1:3]] for line in table.splitlines()[4:] if line.startswith("|")]
    assert len(rows) == 10
    filled = apply_lora(llama(), LoRAConfig(rank=8, alpha=16))
    for parameter in get_lora_parameters(filled):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(parameter)))
    adapter = save_adapter(filled, tmp_path / "adapter")
    for row, cells in enumerate(rows):
        logits = []
        for module, code in zip((peft, lightning_lora), cells, strict=True):
            names: dict[str, Any] = {name: getattr(module, name) for name in module.__all__} | {"batch": batches()[0]}
            names["folder"] = adapter if "from_pretrained" in cells[0][0] else tmp_path / f"{module.__name__}-{row}"
            make = peft.LoraConfig if module is peft else LoRAConfig
            names["config"] = make(target_modules=["q_proj", "v_proj"])
            names["model"] = llama().eval()
            if not re.search("get_peft_model|from_pretrained", cells[0][0]):  # others have an adapter already
                names["model"] = adapted_by(module, names["model"], adapter)
            for call in code:
                if call.startswith("with "):
                    exec(f"{call}\n    logits = model(**batch).logits", names)
                elif call.startswith("modules_to_save"):
                    assert list(make(target_modules=["q_proj"], **eval(f"dict({call})")).modules_to_save) == ["score"]
                elif isinstance(made := eval(call, names), torch.nn.Module):
                    names["model"] = made
            logits.append(names.get("logits", names["model"](**batches()[0]).logits))
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4, msg=f"{cells}")


def adapted_by(module: Any, model: Any, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(model, adapter) if module is peft else load_adapter(model, adapter)


class ParseOnly(LoRACLI):
    """The command line's parser, without what follows: no model is made and nothing runs."""

    def _set_seed(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def parsed(*words: str) -> Any:
    """The configuration of a training command."""
    return ParseOnly(args=list(words)).config[words[0]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, but for `run.yaml`, the README's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI 2.6 itself calls what is deprecated there
    (tmp_path / "run.yaml").write_text(blocks("yaml")[0])
    return tmp_path


@pytest.mark.parametrize("number", range(len(blocks("yaml"))))
def test_yaml_is_a_config(folder: Path, number: int) -> None:
    """The parser knows every key and accepts every value; what the file says of LoRA makes a valid config."""
    file = folder / "block.yaml"
    file.write_text(blocks("yaml")[number])
    config = parsed("fit", "--config", str(file))
    assert LoRAConfig(**config.lora.config.as_dict()) != LoRAConfig()
    file.write_text(blocks("yaml")[number].replace("lora:", "lora:\n  colour: blue"))
    with pytest.raises(Exception, match="colour"):  # and would know a wrong one
        parsed("fit", "--config", str(file))


@pytest.mark.parametrize("words", list(command_lines()), ids=" ".join)
def test_command_lines(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """make's targets are in the Makefile, scripts are in the repository, and our own commands take these options."""
    program, *rest = words
    if program == "make":
        assert set(rest) <= targets() and rest
    elif program == "python":
        assert (ROOT / rest[0]).is_file()
    elif program == "lightning-lora" and rest[0] in {*main.TRAIN, *main.VERIFY}:
        assert parsed(*("fit" if word in main.VERIFY else word for word in rest))
    elif program == "lightning-lora" and rest[0] in main.SWEEP:
        trials = folder / "trials.yaml"
        trials.write_text("- {rank: 2}\n")
        described, left = sweep.take_settings([str(trials) if word == trials.name else word for word in sweep.own_options(rest[1:])[1]])
        assert all(parsed("fit", *left, *each.options()) for each in described)
    elif rest[0] == "inspect" and (run := inspect_rows.run_words(rest[1:])) is not None:
        assert parsed("fit", *run)
    elif program == "lightning-lora":
        called: dict[str, Any] = {}
        original = getattr(commands, rest[0])
        monkeypatch.setattr(commands, rest[0], functools.wraps(original)(lambda **arguments: called.update(arguments)))
        assert main.main(rest) == 0, capsys.readouterr().err
        written = [word for word in rest[1:] if not word.startswith("--")]
        called |= {name: field for value in called.values() if is_dataclass(value) for name, field in vars(value).items()}
        values = {str(value) for value in called.values()} | {str(getattr(called.get("lora"), "target_modules", ""))}
        assert written and set(written) <= values, "what was written arrived"
    else:
        assert words[:2] == ["pip", "install"], "a command that this test does not know"


def targets() -> set[str]:
    return {name for line in re.findall(r"^([\w ]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE) for name in line.split()}


def test_what_is_named_in_the_text_exists() -> None:
    text = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"`make (\w+)", text)) <= targets()
    named = {name for group in re.findall(r"`lightning-lora ([\w|]+)", text) for name in group.split("|")}
    assert named <= {*main.TRAIN, *main.SWEEP, *main.VERIFY, *main.TOOLS}
    files = re.findall(r"`((?:tests|benchmarks|examples|configs|docs|lightning_lora)/[\w./-]+|[A-Z]{5,}\.md)`", text)
    assert files and not [name for name in files if not (ROOT / name).exists()]


def test_every_variant_and_init_is_in_the_readme() -> None:
    """In the text that lists the config's fields, in the table of methods and in the docstring of the config."""
    table = README[README.index("## The family") : README.index("A base that is quantized already")]
    for name in {*VARIANTS, *INITS} - {"plain", "kaiming", "gaussian"}:
        assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", table), f"{name} is not in the family's table"
    for name in (*VARIANTS, *INITS):
        assert f"``{name}``" in str(LoRAConfig.__doc__), f"{name} is not in the docstring of LoRAConfig"
    (header,) = re.findall(r"^\| kind \| (.*) \|$", README, re.MULTILINE)
    assert set(header.split(" | ")) == set(VARIANTS)


def test_the_readme_has_what_is_run_here() -> None:
    """Every fence has a language that one of these tests takes."""
    languages = re.findall(r"^```(\w*)$", README, re.MULTILINE)
    assert set(languages) - {""} <= {"python", "yaml", "bash", "text"}
    assert len(languages) == 2 * sum(language != "" for language in languages), "a fence without a language is not run"
    assert blocks("python") and blocks("yaml") and blocks("bash")
