"""What the pages say that can be checked: files and names that they mention, the family's members, every public name in the reference."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import lightning_lora
import lightning_lora.data
import lightning_lora.estimate
import lightning_lora.tasks
from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters
from lightning_lora.registry import INITS, VARIANTS
from tests.docs.pages import PAGES, ROOT, TEXT, blocks, pages_with, path_of, table

REFERENCE = {path.stem: path.read_text() for path in (ROOT / "docs" / "api").glob("*.rst")}


def documented() -> list[str]:
    """The full names that the reference takes from docstrings."""
    found: list[str] = []
    for text in REFERENCE.values():
        module = ""
        for directive, argument in re.findall(r"^\.\. (currentmodule|autoclass|autofunction):: (\S+)$", text, re.MULTILINE):
            module, found = (argument, found) if directive == "currentmodule" else (module, [*found, f"{module}.{argument}"])
    return found


@pytest.mark.parametrize("module", [lightning_lora, lightning_lora.tasks, lightning_lora.data, lightning_lora.estimate])
def test_every_public_name_is_in_the_reference_and_its_index_once(module) -> None:
    names = {f"{module.__name__}.{name}" for name in module.__all__}
    assert sorted(name for name in documented() if name.rpartition(".")[0] == module.__name__) == sorted(names)
    parts = re.split(r"^\.\. currentmodule:: ", REFERENCE["index"], flags=re.MULTILINE)[1:]
    listed = [f"{part.split()[0]}.{name}" for part in parts for name in re.findall(r"^   (\w+)$", part, re.MULTILINE)]
    assert sorted(name for name in listed if name.rpartition(".")[0] == module.__name__) == sorted(names)


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_the_text_exist(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    files = re.findall(r"`((?:tests|benchmarks|examples|configs|docs|lightning_lora)/[\w./-]+|[A-Z]{5,}\.md)`", text)
    assert not [name for name in files if not (ROOT / name).exists() and not name.startswith("docs/_build")]  # made by `make docs`


def anchors(file: Path) -> set[str]:
    """The headings of a Markdown file as a repository's pages link to them; an included file's too."""
    text = re.sub(r"^```(?!{).*?^```$", "", file.read_text(), flags=re.DOTALL | re.MULTILINE)
    included = re.findall(r"^```{include} (\S+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    return slugs.union(*(anchors(file.parent / name) for name in included))


@pytest.mark.parametrize("page", PAGES)
def test_links_work_in_the_repository_too(page: str) -> None:
    """`make docs` checks those of the site."""
    folder = path_of(page).parent
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)):
        name, _, anchor = link.partition("#")
        file = folder / name if name else path_of(page)
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_the_samples_train_all_that_apply_lora_says_trains() -> None:
    """On a model with a fresh head and trained biases too: what the optimizer gets, and what a recorded step keeps."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
    model = apply_lora(BertForSequenceClassification(BertConfig(**sizes)), LoRAConfig(target_modules=["query"], bias="all"))
    names = {**vars(lightning_lora), "torch": torch, "model": model}
    optimizers = [eval(text, names) for text in re.findall(r"^optimizer = (.+?)(?:  #.*)?$", PAGES["loop"], re.MULTILINE)]
    samples = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    for text in (PAGES["performance"], str(lightning_lora.cuda_graph_step.__doc__)):
        (parameters,) = re.findall(r"with cuda_graph_step(\(.+\)):", text)
        samples.append(list(eval(parameters, names)))
    trains = {id(p) for p in model.parameters() if p.requires_grad}
    assert id(model.classifier.weight) in trains and len(trains) > len(get_lora_parameters(model))
    assert all({id(p) for p in sample} == trains for sample in samples)


def test_every_variant_and_init_is_documented() -> None:
    """In the table of methods, in the table of the config's fields, and in the docstring of the config."""
    methods = str(table("family", "method"))
    fields = str(table("layers", "field"))
    for name in (*VARIANTS, *INITS):
        assert name in {"plain", "kaiming", "gaussian"} or re.search(rf"(?<!\w){re.escape(name)}(?!\w)", methods), name
        assert f"``{name}``" in str(LoRAConfig.__doc__), f"{name} is not in the docstring of LoRAConfig"
        assert f"`{name}`" in fields, name
    assert set(next(iter(table("family", "kind").values()))) == set(VARIANTS)


def test_every_field_of_the_config_is_in_its_table() -> None:
    named = set(re.findall(r"`(\w+)`", " ".join(table("layers", "field"))))
    assert named == set(LoRAConfig.__dataclass_fields__)


def test_the_pages_have_what_is_run_here() -> None:
    """Every fence has a language that a test takes, or is a directive."""
    fences = re.findall(r"^```(\S*)$", TEXT, re.MULTILINE)
    known = {"python", "yaml", "bash", "text"}
    assert {fence for fence in fences if fence and not fence.startswith("{")} <= known
    opened = [fence for fence in re.findall(r"^```(.*)$", TEXT, re.MULTILINE)]
    assert len(opened) == 2 * sum(fence != "" for fence in opened), "a fence without a language is not run"
    assert all(pages_with(language) for language in ("python", "yaml", "bash"))


@pytest.mark.parametrize("page", PAGES)
def test_code_is_as_wide_as_a_window_shows(page: str) -> None:
    lines = [line for language in ("python", "yaml", "bash", "text") for block in blocks(page, language) for line in block.splitlines()]
    assert not [line for line in lines if len(line) > 106]
