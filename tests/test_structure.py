"""The shape of the package: which file may import which, what an import costs, what every file has to have.

Read from the source by its syntax tree, so that an import inside a function counts as much as one at the top.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

import lightning_lora

PACKAGE = Path(lightning_lora.__file__).parent
NAME = "lightning_lora"

# Lowest first; a file imports from lower levels only. So there are no cycles, and kinds, variants and inits, which share a level,
# never name each other. A new file belongs to the level of its pattern, or gets one here. "" is the package itself.
LEVELS = [
    ["patterns", "files", "names", "registry", "sharding", "opaque", "autocast", "forwards", "blocks"],
    ["kernels", "kernels.plain", "kernels.dropout"],
    ["ops", "stored"],
    ["config", "digests", "losses", "compiling", "kernels.low_rank"],
    ["merging", "packing", "fused_ops", "kernels.gated", "kernels.norms"],
    ["heads", "layers.classes", "layers.mergeable", "gated_ops", "gains", "norms"],
    ["layers.base"],
    ["layers.siblings", "layers.pieces", "layers.adapting"],
    ["layers.*", "variants.*", "inits", "data_inits", "packings.*"],
    ["layers", "variants", "packings"],
    ["targeting", "parallel", "fuse"],
    ["inject", "merge_model", "quantize"],
    ["allocation", "fingerprint", "peft_format", "optim.groups"],
    ["adapter_files", "optim.*"],
    ["checkpoint", "export", "optim"],
    ["strategies.peers"],
    ["strategies.pulling"],
    ["strategies.io", "strategies.support", "strategies.pulled"],
    ["strategies.*"],
    ["strategies"],
    ["callbacks.lora"],
    ["callbacks.*"],
    ["callbacks"],
    [""],
    ["data.batching", "data.chat", "tasks.hf"],
    ["data.*", "tasks.*"],
    ["data", "tasks"],
    ["tools", "lightning_cli"],
    ["cli"],
]
OPTIONAL = {"transformers", "bitsandbytes", "torchao", "triton", "datasets", "matplotlib", "peft", "gguf", "pytorch_optimizer"}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
LIGHTNING_FROM = "strategies.io"
# Start-up is fast because these import what is slow when it is asked for: Lightning, and most of torch.distributed. And who does not
# pull what is frozen does not depend on FSDP2's insides.
DEFERS = {
    "": {"callbacks", "strategies"},
    "cli": {"lightning_cli", "tools"},
    "inject": {"parallel"},
    "merge_model": {"parallel"},
    "fused_ops": {"kernels.low_rank"},
    "gated_ops": {"kernels.low_rank", "kernels.gated"},
    "norms": {"kernels.norms"},
    "strategies.ours": {"strategies.pulled"},
}
# Triton's kernels are decorated when their files are imported, so these are imported where they are used.
KERNELS = {"kernels.dropout", "kernels.low_rank", "kernels.gated", "kernels.norms"}
# Errors are ValueError (wrong input) or RuntimeError (wrong at run time); beside those:
OTHER_ERRORS = {
    ("", "AttributeError"),  # what the import system expects of a module's __getattr__
    ("layers.base", "NotImplementedError"),  # a kind that is not finished
    ("layers.mergeable", "NotImplementedError"),  # a kind that is not finished
    ("packing", "NotImplementedError"),  # a packing that is not finished
    ("packings.ao", "ImportError"),  # an extra is not installed
    ("packings.bnb", "ImportError"),  # an extra is not installed
    ("tasks.hf", "ImportError"),  # an extra is not installed
    ("optim.galore", "ImportError"),  # likewise
}


@dataclass(frozen=True)
class Import:
    file: str
    line: int
    module: str  # what is imported, with the name if that is a module of the package
    top: bool  # at the top of the file, not inside a function
    typing: bool  # under `if TYPE_CHECKING:`


def module_name(path: Path) -> str:
    """The name inside the package: `layers.base`, and "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
each_file = pytest.mark.parametrize("file", FILES, ids=lambda name: name or NAME)


@cache
def tree(file: str) -> ast.Module:
    return ast.parse(FILES[file].read_text())


def level(file: str) -> int:
    found = [index for index, patterns in enumerate(LEVELS) if any(fnmatchcase(file, pattern) for pattern in patterns)]
    assert found, f"{file} has no level: give it one in LEVELS, where DESIGN.md draws it"
    return found[0]


def imports(file: str) -> Iterator[Import]:
    top = [node for statement in tree(file).body for node in outside_functions(statement)]
    guarded = {
        id(node) for block in top if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test) for node in ast.walk(block)
    }
    at_top = {id(node) for node in top}
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(file, node.lineno, name, id(node) in at_top, id(node) in guarded)


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the file is imported."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from outside_functions(child)


def own(name: str) -> str | None:
    """The file of the package that an imported name comes from; None for other packages."""
    root, _, rest = name.partition(".")
    if root != NAME:
        return None
    return rest if rest in FILES else rest.rpartition(".")[0]


def root(name: str) -> str:
    return name.partition(".")[0]


@each_file
def test_imports_go_one_way(file: str) -> None:
    upward = [
        f"{i.file}:{i.line} imports {i.module}" for i in imports(file) if (to := own(i.module)) is not None and level(to) >= level(file)
    ]
    assert not upward


@each_file
def test_imports_are_at_the_top(file: str) -> None:
    """Of the package's own: one inside a function would hide a cycle, or cost time at the first call."""
    hidden = {to: f"{i.file}:{i.line}" for i in imports(file) if (to := own(i.module)) is not None and not i.top}
    assert hidden.keys() == DEFERS.get(file, set()), hidden


@each_file
def test_lightning_only_from_the_strategies_on(file: str) -> None:
    named = [f"{i.file}:{i.line}" for i in imports(file) if root(i.module) in LIGHTNING]
    assert not named or level(file) >= level(LIGHTNING_FROM), named


@each_file
def test_optional_libraries_are_imported_when_needed(file: str) -> None:
    optional = OPTIONAL - {"triton"} if file in KERNELS else OPTIONAL
    assert not [f"{i.file}:{i.line} imports {i.module}" for i in imports(file) if root(i.module) in optional and i.top and not i.typing]


@pytest.mark.parametrize("library", sorted(OPTIONAL))
def test_an_optional_library_is_known_to_one_file(library: str) -> None:
    files = {file for file in FILES if any(root(i.module) == library for i in imports(file))}
    assert len(files - KERNELS if library == "triton" else files) <= (0 if library == "triton" else 1), files


def test_the_rules_see_the_package() -> None:
    """That the checks above look at real imports: some that are known to be there are found."""
    assert {"config", "layers.base", "callbacks.lora", ""} <= FILES.keys()
    assert "config" in {own(i.module) for i in imports("layers.base")}
    assert [i.top for i in imports("tasks.hf") if i.module == "transformers"] == [False] * 2
    assert any(i.typing for i in imports("inits"))
    assert any(root(i.module) in LIGHTNING for i in imports("callbacks.lora"))


@each_file
def test_no_handler_swallows_what_it_does_not_know(file: str) -> None:
    """A handler names what it is for; one for everything only cleans up and raises it again."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ExceptHandler):
            names = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {"nothing"}
            assert not names & {"nothing", "Exception"}, f"{file}:{node.lineno}"
            assert "BaseException" not in names or isinstance(node.body[-1], ast.Raise), f"{file}:{node.lineno}"


@each_file
def test_errors_are_of_two_kinds(file: str) -> None:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func)
            assert name in ("ValueError", "RuntimeError") or (file, name) in OTHER_ERRORS, f"{file}:{node.lineno} raises {name}"
            assert node.exc.args or name == "AttributeError", f"{file}:{node.lineno} says nothing"
        elif isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base) for base in node.bases]
            assert not any(base.endswith("Error") and base not in ("ValueError", "RuntimeError") for base in bases), f"{file}:{node.lineno}"


@each_file
def test_a_file_owns_one_idea(file: str) -> None:
    """It says which, and keeps to a size that can be read."""
    assert ast.get_docstring(tree(file))
    assert len(FILES[file].read_text().splitlines()) <= 400


@pytest.mark.parametrize("name", sorted(lightning_lora.__all__))
def test_public_names_are_documented(name: str) -> None:
    public = getattr(lightning_lora, name)
    assert public.__doc__ and len(public.__doc__) > 60
    if inspect.isfunction(public):
        assert "Raises:" in public.__doc__ or "raise" not in inspect.getsource(public)
        assert all(f"{argument}:" in public.__doc__ for argument in list(inspect.signature(public).parameters)[1:])


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_import_is_light() -> None:
    """No optional library, no Lightning, and well under a second beyond torch. The smallest of three, for the machine is shared."""
    code = f"""
import sys, time, torch
there, start = set(sys.modules), time.perf_counter()
import {NAME}
print(time.perf_counter() - start, *{{name.partition(".")[0] for name in set(sys.modules) - there}})
"""
    runs = [python(code).split() for _ in range(3)]
    assert min(float(run[0]) for run in runs) < 0.3
    assert NAME in runs[0]
    assert not set(runs[0]) & (OPTIONAL | LIGHTNING | {"torchmetrics", "jsonargparse"})


def test_an_unknown_name_is_an_attribute_error() -> None:
    """The package has a `__getattr__`, for the callbacks and the strategy."""
    with pytest.raises(AttributeError, match=f"module '{NAME}' has no attribute 'nothing'"):
        getattr(lightning_lora, "nothing")  # noqa: B009
    assert lightning_lora.LoRACallback.__module__ == f"{NAME}.callbacks.lora"
    assert lightning_lora.AdaLoRACallback.__module__ == f"{NAME}.callbacks.adalora"
