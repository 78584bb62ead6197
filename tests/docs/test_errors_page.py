"""Every message that the package raises stands on ``docs/troubleshooting.md``, under a heading that says what to do.

A comment on the page, ``<!-- messages: config.py data/ -->``, names files and folders of the package, and their messages follow it.
``python -m tests.docs.test_errors_page --write`` renews these lists; what stands above each is written by hand.
"""

from __future__ import annotations

import ast
import html
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lightning_lora.utils.messages import counted
from tests.test_structure import PACKAGE

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
LIST = re.compile(r"^<!-- messages: (.+?) -->\n(?:<details>\n.*?^</details>\n)?", re.MULTILINE | re.DOTALL)
#: Raised for those who write a subclass here, not for users; and what Python's own protocols expect.
NOT_FOR_USERS = ("NotImplementedError", "AttributeError", "KeyboardInterrupt", "SystemExit", "twin", "MixesDocuments")


def text_of(node: ast.expr) -> str:
    """A message as one sees it, with ``…`` for what varies."""
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else "…"
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "counted":
        return f"…{counted(2, *(ast.literal_eval(each) for each in node.value.args[1:])).removeprefix('2')}"
    return "…"


def parts(node: ast.expr) -> Iterator[ast.expr]:
    """Both sides of a choice, the items of a list, each by itself."""
    inner = {ast.IfExp: ("body", "orelse"), ast.BoolOp: ("values",), ast.List: ("elts",), ast.ListComp: ("elt",)}.get(type(node))
    if inner is None:
        yield node
        return
    for found in (getattr(node, name) for name in inner):
        for each in found if isinstance(found, list) else [found]:
            yield from parts(each)


def said(tree: ast.Module) -> Iterator[ast.expr]:
    """What becomes a message: arguments of an exception, what is collected in ``problems``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) not in NOT_FOR_USERS:
            yield from (each for argument in node.exc.args for each in parts(argument))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "problems.append":
            yield from parts(node.args[0])
        elif isinstance(node, (ast.Assign, ast.AugAssign)) and "problems" in ast.unparse(getattr(node, "target", None) or node.targets[0]):
            yield from parts(node.value)


@cache
def asked() -> set[str]:
    """Names of functions and variables of which a message is made elsewhere."""
    found = [node for path in PACKAGE.rglob("*.py") for node in said(ast.parse(path.read_text()))]
    calls = {each.func.id for node in found for each in ast.walk(node) if isinstance(each, ast.Call) and isinstance(each.func, ast.Name)}
    return calls | {node.id for node in found if isinstance(node, ast.Name)}


def messages(path: Path) -> Iterator[str]:
    """What a file raises, and the reasons that its functions return to those who raise; what has no words of its own is left out."""
    tree = ast.parse(path.read_text())
    yield from (text for text in map(text_of, said(tree)) if len(re.findall(r"[A-Za-z]", text)) > 3)
    for node in ast.walk(tree):
        reasons: list[ast.expr] = []
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            if ast.unparse(node.returns) == "str | None" or (ast.unparse(node.returns) == "str" and node.name in asked()):
                reasons = [each.value for each in ast.walk(node) if isinstance(each, ast.Return) and each.value is not None]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in asked():
            reasons = [node.value]
        yield from (text for value in reasons for each in parts(value) if (text := text_of(each)).count(" ") > 3)


@cache
def by_file() -> dict[str, list[str]]:
    found = {path.relative_to(PACKAGE).as_posix(): list(dict.fromkeys(messages(path))) for path in sorted(PACKAGE.rglob("*.py"))}
    return {file: each for file, each in found.items() if each}


def named(page: str) -> list[str]:
    return [entry for entries in LIST.findall(page) for entry in entries.split()]


def owner(file: str, entries: list[str]) -> str | None:
    """The entry that a file belongs to: itself, or the folder."""
    return next((entry for entry in entries if entry == file), next((entry for entry in entries if file.startswith(entry)), None))


def renewed(page: str) -> str:
    files, entries = by_file(), named(page)

    def write(match: re.Match[str]) -> str:
        own = [file for file in files if owner(file, entries) in match[1].split()]
        lines = sorted({" ".join(text.split()) for file in own for text in files[file]}, key=lambda text: text.lstrip("…'\": ").lower())
        shown = "\n".join(html.escape(line, quote=False) for line in lines)
        return (
            f"<!-- messages: {match[1]} -->\n<details>\n<summary>All {len(lines)} messages</summary>\n<pre>\n{shown}\n</pre>\n</details>\n"
        )

    return LIST.sub(write, page)


def test_the_lists_are_those_of_the_source() -> None:
    page = PAGE.read_text()
    assert renewed(page) == page, "run `python -m tests.docs.test_errors_page --write`"


def test_every_file_that_raises_is_under_a_heading() -> None:
    entries = named(PAGE.read_text())  # one test of all files: naming them takes seconds, which a parametrized one spends in every worker
    missing = [file for file in by_file() if not owner(file, entries)]
    assert not missing, f"name {', '.join(missing)} in a comment of {PAGE.name}, under the heading that says what to do"


def test_every_list_has_what_to_do_above_it() -> None:
    """Words of a person, and every name in the comments exists once."""
    page = PAGE.read_text()
    entries = named(page)
    assert len(set(entries)) == len(entries) and all((PACKAGE / entry).exists() for entry in entries)
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        if LIST.search(section):
            written = LIST.sub("", section)
            assert len(written.split()) > 40, section.splitlines()[0]


def test_what_is_quoted_is_in_the_lists() -> None:
    """Words in italics above a list are a message's; ``…`` stands for anything."""
    page = PAGE.read_text()
    listed = html.unescape(" ".join(match[0] for match in LIST.finditer(page)))
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        if LIST.search(section):
            quoted = re.findall(r"(?<![*\w])\*([^*\n]+)\*", section[: section.index("<!--")])
            missing = [text for text in quoted if not re.search(".*".join(map(re.escape, text.split("…"))), listed)]
            assert not missing, f"{section.splitlines()[0]}: {missing}"


def test_the_messages_are_what_one_sees() -> None:
    """That the reading of the source finds what is known to be there."""
    files = by_file()
    assert "dropout=…: give a probability in [0, 1), such as 0.05." in files["config.py"]
    assert "its adapter is disabled: merge outside of disabled_lora(model)" in files["layers/mergeable.py"]
    assert sum(map(len, files.values())) > 600


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(renewed(PAGE.read_text()))
