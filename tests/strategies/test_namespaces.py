"""Checks against Lightning's classes hold for both of its packages: what ``twins`` returns, and that no check goes around it.

Read from the source by its syntax tree, as in ``tests/test_structure.py``. What the runs do: ``tests/callbacks/test_namespaces.py``.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator

import lightning as L
import pytest
import pytorch_lightning as pl
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning_fabric.plugins.io import torch_io

from lightning_lora.strategies.namespaces import LIGHTNING, loaded, twin, twins
from tests.test_structure import FILES, imports, level, root, tree

HOME = "strategies.namespaces"
#: The command line, its data and tasks are for ``lightning.pytorch`` alone.
BOTH = [file for file in FILES if file and level("strategies") <= level(file) < level("data")]
EQUAL = {"TrainerFn"}  # an enum of strings, equal to its twin


def lightnings(source: ast.Module) -> set[str]:
    """Names in a file of Lightning's classes, of tuples of them, and of the function that knows one package's base classes only."""
    found = {
        alias.asname or alias.name
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom) and root(node.module or "") in LIGHTNING
        for alias in node.names
        if alias.name.lstrip("_")[0].isupper() or alias.name == "is_overridden"
    }
    for node in source.body:
        if isinstance(node, ast.Assign) and set(bare(node.value)) & found:
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found - EQUAL


def bare(node: ast.AST | None) -> Iterator[str]:
    """Names in an expression that do not go through ``twins`` or ``twin``."""
    if isinstance(node, ast.Name):
        yield node.id
    elif node is not None and not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("twins", "twin")):
        for child in ast.iter_child_nodes(node):
            yield from bare(child)


def around(source: ast.Module) -> Iterator[int]:
    """Lines that compare with a class of Lightning's, or raise one, and leave its twin out."""
    names = lightnings(source)
    for node in ast.walk(source):
        asked: list[ast.AST | None] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            asked = [node.args[1]]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "is_overridden":
            asked = [*node.args[2:]] or [node.func]
        elif isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.ExceptHandler):
            asked = [node.type]
        elif isinstance(node, ast.Raise):
            asked = [node.exc]
        elif isinstance(node, ast.MatchClass):
            asked = [node.cls]
        if any(name in names for each in asked for name in bare(each)):
            yield node.lineno


def test_no_check_goes_around_twins() -> None:
    assert len(BOTH) > 20
    assert not [f"{file}:{line}" for file in BOTH if file != HOME for line in around(tree(file))]


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("isinstance(x, A)", "isinstance(x, twins(A))"),
        ("issubclass(type(x), (int, A))", "issubclass(type(x), (int, *twins(A)))"),
        ("isinstance(x, SEVERAL)", "isinstance(x, twins(*SEVERAL))"),
        ("type(x) is A", "type(x) in twins(A)"),
        ("try: x\nexcept A: pass", "try: x\nexcept twins(A): pass"),
        ("raise A", "raise twin(A, trainer)"),
        ("is_overridden('setup', x)", "is_overridden('setup', x, twin(A, x))"),
    ],
)
def test_a_check_around_twins_is_seen(line: str, right: str) -> None:
    head = "from lightning.pytorch import A, B, is_overridden\nSEVERAL = (A, B)\n"
    assert list(around(ast.parse(head + line))) and not list(around(ast.parse(head + right)))


def test_every_class_that_is_checked_has_a_twin() -> None:
    """One that has moved, or that is named otherwise where it is defined, would have none."""
    asked = {}
    for file in BOTH:
        home = importlib.import_module(f"lightning_lora.{file}")
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("twins", "twin"):
                first = node.args if ast.unparse(node.func) == "twins" else node.args[:1]
                asked |= {name: getattr(home, name) for each in first for name in bare(each) if hasattr(home, name)}
    classes = [cls for found in asked.values() for cls in (found if isinstance(found, tuple) else (found,))]
    assert len(set(classes)) > 12
    for cls in classes:
        mine, theirs = twins(cls)
        assert mine is cls and theirs is not cls and theirs.__name__ == cls.__name__


def test_a_twin_is_of_the_same_package() -> None:
    mine, theirs = L.pytorch.utilities.exceptions.SIGTERMException, pl.utilities.exceptions.SIGTERMException
    for like, expected in ((L.LightningModule(), mine), (type("Own", (pl.LightningModule,), {})(), theirs)):
        assert twin(mine, like) is expected


def test_without_the_other_package_there_are_no_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, torch_io.__name__)
    assert twins(TorchCheckpointIO) == (TorchCheckpointIO,)
    assert twin(TorchCheckpointIO, pl.LightningModule()) is TorchCheckpointIO
    assert [module.__name__ for module in loaded(TorchCheckpointIO.__module__)] == [TorchCheckpointIO.__module__]


def test_only_one_file_knows_the_other_name() -> None:
    """None imports it: it is looked up where it is loaded."""
    others = LIGHTNING - {"lightning"}
    for file in (file for file, path in FILES.items() if any(name in path.read_text() for name in others)):
        assert not {root(i.module) for i in imports(file)} & others, file
        named = {node.value for node in ast.walk(tree(file)) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert file == HOME or not named & others, file
