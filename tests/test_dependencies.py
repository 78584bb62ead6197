"""Every package that the library imports is declared in pyproject.toml: what it always imports as a dependency, the others in an extra."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
BROUGHT = {"pyarrow": "datasets"}  # its files are pyarrow's tables, which pyproject.toml says


def table(name: str) -> str:
    """Return the text of one table of pyproject.toml. Python 3.10 has no tomllib."""
    text = (ROOT / "pyproject.toml").read_text()
    return re.split(r"(?m)^\[", text[text.index(f"\n[{name}]\n") + 2 :])[0]


def declared(text: str) -> set[str]:
    code = re.sub(r"(?m)^\s*#.*$", "", text)
    return {match.lower().replace("_", "-") for match in re.findall(r'"([A-Za-z][\w.-]*)(?:\[[\w,]*\])?[<>=!~]', code)}


def imports(statements: Iterable[ast.AST]) -> set[str]:
    """Return the packages that these statements import themselves, but for Python's own and this one."""
    found = set()
    for node in statements:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"lightning_lora"}


FILES = [*sorted((ROOT / "lightning_lora").rglob("*.py")), ROOT / "lightning_lora_command.py"]
NAMES = {module: {name.lower().replace("_", "-") for name in names} for module, names in packages_distributions().items()}


def undeclared(tables: list[str], at_once: bool) -> set[str]:
    """Return which file imports what, and no table has it.

    Args:
        tables: tables of pyproject.toml.
        at_once: look at what is imported with the file itself, not within functions.
    """
    known, found = set().union(*(declared(table(name)) for name in tables)), set()
    for path in FILES:
        tree = ast.parse(path.read_text())
        for name in imports(tree.body if at_once else ast.walk(tree)):
            if not NAMES.get(BROUGHT.get(name, name), {name}) & known:
                found.add(f"{path.name} imports {name}")
    return found


def test_every_import_is_declared() -> None:
    assert not undeclared(["project", "project.optional-dependencies"], at_once=False)


def test_what_a_file_imports_at_once_is_no_extra() -> None:
    """But for the kernels' files, which are imported where there is a GPU."""
    assert {each for each in undeclared(["project"], at_once=True) if not each.startswith("triton_")} == set()


def test_the_tables_are_read_right() -> None:
    assert {"torch", "jsonargparse", "typing-extensions"} <= declared(table("project")) and "triton" not in declared(table("project"))
    assert {"bitsandbytes", "pillow", "triton"} <= declared(table("project.optional-dependencies"))
    assert imports(ast.walk(ast.parse("def f():\n import a.b, os\n from c import d\n from . import e"))) == {"a", "c"}
