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
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lightning_lora

PACKAGE = Path(lightning_lora.__file__).parent
ROOT = Path(__file__).parents[1]
NAME = "lightning_lora"

# The order of imports, lowest first; a file outside folders stands by its own name, "" is the package itself. No cycles in a folder.
FOLDERS = [
    "utils",
    "storage",
    "registry",
    "config",
    "ops",
    "quantization",
    "layers",
    "inits",
    "variants",
    "model",
    "adapter_io",
    "optim",
    "experimental",
    "strategies",
    "callbacks",
    "trials",
    "",
    "data",
    "tasks",
    "estimate",
    "cli",
    "__main__",
]
OPTIONAL = {"transformers", "PIL", "bitsandbytes", "torchao", "triton", "datasets", "matplotlib", "peft", "gguf", "pytorch_optimizer"}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
LIGHTNING_FROM = "strategies"
# Start-up is fast because these import what is slow when it is asked for: Lightning, and most of torch.distributed. And who does not
# pull what is frozen does not depend on FSDP2's insides.
DEFERS = {
    "cli.main": {"cli.lightning_cli", "cli.commands", "cli.group_help", "cli.inspect_rows", "cli.sweep", "cli.verify"},
    "cli.messages": {"strategies.namespaces"},
    **{file: {"model.parallel"} for file in ("model.apply", "model.merge")},
    **{file: {"ops.triton_low_rank"} for file in ("ops.fused_linear", "ops.second_derivatives")},
    "ops.gated_mlp": {"ops.triton_low_rank", "ops.triton_gated_mlp"},
    **{f"ops.{file}": {f"ops.triton_{kernels}"} for file, kernels in (("grouped_linear", "grouped"), ("weight_norm", "weight_norm"))},
    "ops.float8_weight": {"ops.triton_float8"},
    "quantization.bitsandbytes": {"ops.triton_nf4"},
    "strategies.fsdp2": {"experimental.pull_frozen"},
}
# Triton's kernels are decorated when their files are imported, so these are imported where they are used.
KERNELS = {f"ops.{path.stem}" for path in (PACKAGE / "ops").glob("triton_*.py")}
# Errors are ValueError (wrong input) or RuntimeError (wrong at run time); beside those:
OURS = ("ValueError", "RuntimeError", "NothingToLearn")
OTHER_ERRORS = {
    ("config", "TypeError"),  # as Python raises for an argument that there is not
    *{("adapter_io.fingerprint", "OtherBase"), ("data.pairs", "kind"), ("storage.folder_commit", "IsADirectoryError")},
    ("tasks.packing_check", "MixesDocuments"),  # which batches without padding catch
    ("", "AttributeError"),  # what the import system expects of a module's __getattr__
    *((file, "twin") for file in ("callbacks.interruption", "trials.one_run")),  # the SIGTERMException of the Trainer's package
    *(("trials.side_by_side", name) for name in ("KeyboardInterrupt", "SystemExit")),  # the exit code of what was stopped
    ("ops.stand_in", "AttributeError"),  # what `hasattr` expects of a class's __getattr__
    ("layers.base", "NotImplementedError"),
    *((file, "NotImplementedError") for file in ("layers.factors", "layers.mergeable", "inits.statistics")),  # what is not finished
    *((file, "NotImplementedError") for file in ("quantization.formats", "quantization.stacks", "ops.stand_in", "ops.frozen_stack")),
    *{("quantization.torchao", "ImportError"), ("quantization.bitsandbytes", "ImportError")},  # an extra is not installed
    *((file, "WrongPath") for file in ("storage.regular_files", "storage.read_checkpoint", "adapter_io.files", "tasks.model_source")),
    *((file, "WrongPath") for file in ("data.reading", "data.hub", "data.templates")),
    ("strategies.checkpoint_io", "OSError"),  # the disk's own, as the single-file writer raises it
    *((file, "ImportError") for file in ("tasks.hf", "data.images", "data.hub", "optim.galore")),  # an extra is not installed
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


@cache
def tree(file: str) -> ast.Module:
    return ast.parse(FILES[file].read_text())


def level(file: str) -> int:
    folder = file.partition(".")[0]
    assert folder in FOLDERS, f"{file} is in no folder of FOLDERS: put it into one, or give its folder a place there"
    return FOLDERS.index(folder)


@cache
def imports(file: str) -> list[Import]:
    return list(read_imports(file))


def read_imports(file: str) -> Iterator[Import]:
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


def test_imports_go_down_the_folders() -> None:
    assert not [
        f"{file}:{i.line} imports {i.module}"
        for file in FILES
        for i in imports(file)
        if (to := own(i.module)) is not None and level(to) > level(file)
    ]


def test_no_circle_inside_a_folder() -> None:
    """A folder's ``__init__`` stands above its files, whatever imports something out of the folder."""
    graph = {file: {to for i in imports(file) if (to := own(i.module)) is not None and level(to) == level(file)} for file in FILES}
    list(TopologicalSorter(graph).static_order())


def test_kinds_variants_and_inits_never_name_each_other() -> None:
    """A file that registers into one of the three tables imports no other file that does; ``__init__`` only imports them."""
    registers = {
        file
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and any("register" in ast.unparse(mark) for mark in node.decorator_list)
    }
    assert len(registers) > 6
    named = {f"{file} imports {to}" for file in registers for i in imports(file) if (to := own(i.module)) in registers}
    assert not named


def test_the_package_has_few_rooms() -> None:
    """What a newcomer sees first: at most 20 folders and files at the top, each folder with a sentence on what it holds and may import."""
    rooms = {file.partition(".")[0] for file in FILES} - {"", "__main__"}
    assert rooms == set(FOLDERS) - {"", "__main__"} and len(rooms) <= 20
    for room in rooms:
        if FILES[room].name == "__init__.py":
            assert "May import:" in (ast.get_docstring(tree(room)) or ""), room


def test_imports_are_at_the_top() -> None:
    """Of the package's own: one inside a function would hide a cycle, or cost time at the first call."""
    for file in FILES:
        hidden = {to: f"{file}:{i.line}" for i in imports(file) if (to := own(i.module)) is not None and not i.top}
        assert hidden.keys() == DEFERS.get(file, set()), hidden


def test_lightning_only_from_the_strategies_on() -> None:
    below = [file for file in FILES if level(file) < level(LIGHTNING_FROM)]
    assert not [f"{file}:{i.line} imports {i.module}" for file in below for i in imports(file) if root(i.module) in LIGHTNING]


def test_optional_libraries_are_imported_when_needed() -> None:
    for file in FILES:
        optional = OPTIONAL - {"triton"} if file in KERNELS else OPTIONAL
        assert not [f"{file}:{i.line} imports {i.module}" for i in imports(file) if root(i.module) in optional and i.top and not i.typing]


@pytest.mark.parametrize("library", sorted(OPTIONAL))
def test_an_optional_library_is_known_to_one_file(library: str) -> None:
    files = {file for file in FILES if any(root(i.module) == library for i in imports(file))}
    assert len(files - KERNELS if library == "triton" else files) <= (0 if library == "triton" else 1), files


def test_the_rules_see_the_package() -> None:
    """That the checks above look at real imports: some that are known to be there are found."""
    assert {"config", "layers.base", "callbacks.lora", ""} <= FILES.keys()
    assert "config" in {own(i.module) for i in imports("layers.spec")}
    assert {i.top for i in imports("tasks.hf") if i.module == "transformers"} == {False}
    assert any(i.typing for i in imports("inits.eva"))
    assert any(root(i.module) in LIGHTNING for i in imports("callbacks.lora"))


def nodes() -> Iterator[tuple[str, ast.AST]]:
    """Everything in every file, with the file."""
    return ((file, node) for file in FILES for node in ast.walk(tree(file)))


def test_no_handler_swallows_what_it_does_not_know() -> None:
    """A handler names what it is for; one for everything only cleans up and raises it again."""
    for file, node in nodes():
        if isinstance(node, ast.ExceptHandler):
            names = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {"nothing"}
            assert not names & {"nothing", "Exception"}, f"{file}:{node.lineno}"
            assert "BaseException" not in names or isinstance(node.body[-1], ast.Raise), f"{file}:{node.lineno}"


def test_errors_are_of_two_kinds() -> None:
    for file, node in nodes():
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func)
            assert name in OURS or (file, name) in OTHER_ERRORS, f"{file}:{node.lineno} raises {name}"
            assert node.exc.args or name == "AttributeError", f"{file}:{node.lineno} says nothing"
        elif isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base) for base in node.bases]
            other = [base for base in bases if base.endswith("Error") and base not in ("ValueError", "RuntimeError")]
            assert not other or (file, node.name) in OTHER_ERRORS, f"{file}:{node.lineno}"


def test_a_file_owns_one_idea() -> None:
    """It says which."""
    for file in FILES:
        assert ast.get_docstring(tree(file)), file


@pytest.mark.parametrize("folder", [PACKAGE, ROOT / "benchmarks", ROOT / "tests"], ids=lambda folder: folder.name)
def test_files_keep_to_a_size_that_can_be_read(folder: Path) -> None:
    lines = {str(path.relative_to(folder)): len(path.read_text().splitlines()) for path in folder.rglob("*.py")}
    assert lines and not {file: count for file, count in lines.items() if count > 300}


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
    """It brings its own files, safetensors and Python's library: no Lightning, nothing optional, no part of torch that torch leaves out.

    That takes 0.1 s beyond torch; what is imported is counted, for times differ between machines.
    """
    code = f"import sys, torch; there = set(sys.modules); import {NAME}; print(*set(sys.modules) - there)"
    brought = set(python(code).split())
    assert NAME in brought and len(brought) < 200
    others = {module for module in brought if root(module) not in {NAME, "safetensors", *sys.stdlib_module_names}}
    assert not others


def test_an_unknown_name_is_an_attribute_error() -> None:
    """The package has a `__getattr__`, for the callbacks and the strategy."""
    with pytest.raises(AttributeError, match=f"module '{NAME}' has no attribute 'nothing'"):
        getattr(lightning_lora, "nothing")  # noqa: B009
    assert lightning_lora.LoRACallback.__module__ == f"{NAME}.callbacks.lora"
    assert lightning_lora.AdaLoRACallback.__module__ == f"{NAME}.callbacks.adalora"
