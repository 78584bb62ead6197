"""The public names and their signatures, held against ``public_api.txt``: a rename, a new default, a new order is a decision.

``python -m tests.test_public_api --write`` renews the file.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lightning_lora

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_name("public_api.txt")


def described(name: str, thing: Any) -> str:
    """One line: names, order, which are keywords only, defaults; no annotations, which are the type checker's."""
    if isinstance(thing, property):
        return f"{name}: property"
    signature = inspect.signature(thing)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return f"{name}{signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)}"


def lines() -> Iterator[str]:
    public = {name: getattr(lightning_lora, name) for name in sorted(lightning_lora.__all__)}
    for name, thing in public.items():
        yield described(name, thing)
        if inspect.isclass(thing):
            # Methods of ours, each under the first public class that has it: not what a public parent's line says already.
            parents = [cls for cls in thing.__mro__[1:] if cls in public.values()]
            ours = {method for cls in thing.__mro__ if cls.__module__.startswith("lightning_lora.") for method in vars(cls)}
            for method in sorted(method for method in ours if not method.startswith("_")):
                found = inspect.getattr_static(thing, method)
                inherited = any(inspect.getattr_static(parent, method, None) is found for parent in parents)
                if not inherited and (isinstance(found, (property, classmethod, staticmethod)) or inspect.isfunction(found)):
                    yield described(f"  {name}.{method}", found if isinstance(found, property) else getattr(thing, method))


def test_every_signature_is_the_one_that_was_decided() -> None:
    now, before = list(lines()), FILE.read_text().splitlines()
    assert not any(" at 0x" in line for line in now)
    gone, new = [line for line in before if line not in now], [line for line in now if line not in before]
    assert now == before, (
        "the public API changed. If that is meant: `python -m tests.test_public_api --write`, and a line in CHANGELOG.md.\n"
        + "\n".join([*(f"- {line}" for line in gone), *(f"+ {line}" for line in new)])
    )


def test_what_may_be_given_by_position_is_few() -> None:
    """After the first arguments keywords only: at most three without a default, or what the design gives by position."""
    by_position = {"LoRALinear", "chunked_cross_entropy", "apply_lora_plus"}
    for name in lightning_lora.__all__:
        parameters = inspect.signature(getattr(lightning_lora, name)).parameters.values()
        optional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty]
        assert optional in ([], ["config"]) or name in by_position, (name, optional)


def test_dir_shows_the_public_names_and_nothing_else() -> None:
    assert dir(lightning_lora) == sorted([*lightning_lora.__all__, "__version__"])
    namespace: dict[str, Any] = {}
    exec("from lightning_lora import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(lightning_lora.__all__)


def test_no_module_has_the_name_of_a_public_function() -> None:
    modules = {path.stem for path in (ROOT / "lightning_lora").iterdir()}
    assert "layers" in modules and not modules & set(lightning_lora.__all__)
    assert not {"export", "fuse", "quantize", "merge_model", "checkpoint"} & set(vars(lightning_lora)), "modules that look like functions"


def test_the_version_is_said_once() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert not re.search(r"^version *=", project, re.MULTILINE) and 'dynamic = ["version"]' in project
    (path,) = re.findall(r'^\[tool\.hatch\.version\]\npath = "(.+)"$', project, re.MULTILINE)
    (said,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / path).read_text(), re.MULTILINE)
    assert lightning_lora.__version__ == said


def test_what_is_lazy_is_there() -> None:
    """`test_the_import_is_light` holds that it costs the import nothing."""
    for name, where in lightning_lora._LAZY.items():
        assert getattr(lightning_lora, name) is getattr(importlib.import_module(f"lightning_lora.{where}"), name)


DOCUMENTS = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_import_public_names_from_the_package(document: str) -> None:
    """No public name by way of the module that it is defined in."""
    text = (ROOT / document).read_text()
    names = "|".join(lightning_lora.__all__)
    assert not re.findall(rf"lightning_lora\.[a-z_.]+\.(?:{names})\b", text)
    assert not re.findall(rf"`(?:{names})`? ?(?:\([^`]*\)`)? of `lightning_lora\.", text)
    assert not re.findall(rf"^from lightning_lora\.\S+ import .*\b(?:{names})\b", text, re.MULTILINE)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        FILE.write_text("\n".join(lines()) + "\n")
