"""The pages that help: an error that a page shows is raised, and says what stands beside it.

In a block, what follows ``print(error)  #`` are the words of the message, ``...`` for what is left out.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, save_adapter
from tests.docs.pages import ADVICE, HELP, MyModule, batches, llama
from tests.docs.test_commands import parsed

DOCS = Path(__file__).parents[2] / "docs"


class MustRaise(ast.NodeTransformer):
    """A ``try`` that is left without an error fails."""

    def visit_Try(self, node: ast.Try) -> ast.Try:
        node.orelse = ast.parse(f"raise AssertionError('line {node.lineno} raised nothing')").body
        return node


@ADVICE
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks transformers so
@pytest.mark.parametrize("page", HELP)
def test_a_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("legal", "polite"):
        made = apply_lora(llama(), LoRAConfig())
        for parameter in get_lora_parameters(made):
            torch.nn.init.normal_(parameter)
        save_adapter(made, tmp_path / "runs" / name / "adapter")
    text = (DOCS / f"{page}.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert blocks
    printed: list[Any] = []
    names: dict[str, Any] = {"MyModule": MyModule, "batches": batches(), "batch": batches()[0], "print": lambda *said: printed.extend(said)}
    names |= {name: llama() for name in ("model", "base_model", "served_model")}
    for block in blocks:
        tree = ast.parse("\n" * text[: text.index(block)].count("\n") + block)
        exec(compile(ast.fix_missing_locations(MustRaise().visit(tree)), f"{page}.md", "exec"), names)
    errors = [str(said) for said in printed if isinstance(said, Exception)]
    shown = re.findall(r"print\(error\)(?:  # (.*))?$", "\n".join(blocks), re.MULTILINE)
    assert len(errors) == len(shown)
    for error, words in zip(errors, shown, strict=True):
        assert re.search(".*".join(map(re.escape, re.split(r"\s*\.\.\.\s*", words))), error, re.DOTALL), error


def test_every_field_of_pefts_config_is_on_its_page() -> None:
    page = (DOCS / "coming-from-peft.md").read_text()
    assert not [each.name for each in dataclasses.fields(peft.LoraConfig) if f"`{each.name}" not in page]


@pytest.mark.parametrize("page", ["coming-from-torchtune", "coming-from-trl-axolotl"])
def test_our_options_in_the_tables_exist(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ``section.key`` in backticks is a key of the command line's config."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI 2.6 itself calls what is deprecated there
    config = parsed("fit", "--model.model", "owner/model", "--data.train", "train.jsonl", "--lora.config.rank", "4")
    text = re.sub(r"^```.*?^```$", "", (DOCS / f"{page}.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    keys = set(re.findall(r"`((?:model|data|lora|trainer)\.[a-z_.]+)", text))
    assert keys and not [key for key in keys if key not in config and key.replace(".", ".init_args.", 1) not in config]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("fields", "adapted"),
    [({"target_modules": ["q_proj", "v_porj"]}, 2), ({"target_modules": "all-linear", "exclude_modules": ["mlp"]}, 14)],
    ids=["one wrong name", "a module around targets excluded"],
)
def test_peft_is_silent_where_the_pages_say_so(fields: dict[str, Any], adapted: int) -> None:
    """Warnings are errors here."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(**fields))
    assert len([name for name, _ in model.named_modules() if name.endswith(".lora_A")]) == adapted
    with pytest.raises(ValueError, match=r"v_porj|mlp"):
        apply_lora(llama(), LoRAConfig(**fields))
