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
import tomllib

import lightning_lora
from tests.test_structure import python

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
    for name in sorted(lightning_lora.__all__):
        public = getattr(lightning_lora, name)
        yield described(name, public)
        if inspect.isclass(public):
            ours = [cls for cls in public.__mro__ if cls.__module__.startswith("lightning_lora.")]
            methods = {method for cls in ours for method in vars(cls) if not method.startswith("_")}
            for method in sorted(methods):
                thing = inspect.getattr_static(public, method)
                if isinstance(thing, property) or (callable(getattr(public, method)) and not inspect.isclass(getattr(public, method))):
                    yield described(f"  {name}.{method}", thing if isinstance(thing, property) else getattr(public, method))


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
    assert not modules & set(lightning_lora.__all__)
    # These were modules that looked like functions.
    assert not [
        name for name in ("export", "fuse", "merge", "quantize", "ops", "checkpoint") if callable(getattr(lightning_lora, name, None))
    ]


def test_the_version_is_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    (said,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / project["tool"]["hatch"]["version"]["path"]).read_text(), re.MULTILINE)
    assert lightning_lora.__version__ == said


def test_what_is_lazy_costs_the_import_nothing() -> None:
    slow = ["lightning", "torch.distributed.fsdp", "torch._dynamo"]
    code = (
        f"import torch, sys; there = set(sys.modules); import lightning_lora; print(*[n for n in {slow} if n in set(sys.modules) - there])"
    )
    assert python(code).split() == []
    assert all(getattr(lightning_lora, name) is getattr(importlib.import_module(f"lightning_lora.{where}"), name) for name, where in LAZY)


LAZY = list(lightning_lora._LAZY.items())


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
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
