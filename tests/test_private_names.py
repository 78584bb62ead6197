"""Other libraries' private names stand in one file per library, which says of each what breaks when it goes.

Read from the source by its syntax tree. A name counts as private if it begins with one underscore.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

import pytest

from tests.test_structure import FILES, tree

HOMES = {
    "utils.torch_private",
    "utils.torch_private_parallel",
    "utils.transformers_conventions",
    "utils.transformers_experts",
    "strategies.lightning_private",
    "quantization.bitsandbytes",
    "quantization.bitsandbytes_quantize",
    "quantization.torchao",
}
EXPERIMENTAL = {"experimental.pull_frozen", "experimental.pulling_group", "experimental.peer_memory"}  # FSDP2's insides

# As good as public: subclasses of nn.Module, of its convolutions and of tuples have relied on these for years.
STABLE = {
    *("_parameters", "_modules", "_buffers", "_non_persistent_buffers_set", "_apply", "_save_to_state_dict", "_load_from_state_dict"),
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_conv_forward"),
    *("_version", "_replace", "_asdict"),
}
DOCUMENTED = ("_foreach_", "_current_frames")  # torch's and Python's references list these functions
MARKS = ("_lora_",)  # what we put on objects of others
# FSDP2's list of what a unit shards, taken from the guarded `fsdp2_group`: there is no other way to take adapters out of it.
ALSO = {("model.parallel", "_module_info"), ("model.parallel", "_post_load_hook_handle")}


def private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name != "_"


@cache
def ours() -> frozenset[str]:
    """Attributes that classes of the package define: in their body, or on self."""
    found: set[str] = set()
    for file in FILES.keys() - HOMES - EXPERIMENTAL:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ClassDef):
                for statement in node.body:
                    if isinstance(statement, ast.FunctionDef):
                        found.add(statement.name)
                    elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
                        found |= {name.id for name in ast.walk(statement) if isinstance(name, ast.Name)}
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "cls"):
                found.add(node.attr)
    return frozenset(found)


def uses(source: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of every private name that is read, written, imported or asked for by a string."""
    for node in ast.walk(source):
        if isinstance(node, ast.Attribute) and private(node.attr):
            yield node.lineno, node.attr
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from ((node.lineno, part) for module in modules for part in module.split(".") if private(part))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and private(name.value):
                yield node.lineno, name.value
        elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Constant) and "__dict__" in ast.unparse(node):
            yield from [(node.lineno, str(node.left.value))] * private(node.left.value)


def strangers(file: str, source: ast.Module) -> list[str]:
    return [
        f"{file}:{line} {name}"
        for line, name in uses(source)
        if name not in STABLE | ours() and not name.startswith(DOCUMENTED + MARKS) and (file, name) not in ALSO
    ]


def test_private_names_of_others_are_at_home() -> None:
    found = [stranger for file in FILES.keys() - HOMES - EXPERIMENTAL for stranger in strangers(file, tree(file))]
    assert not found, f"{found}: wrap them in {sorted(HOMES)}, with a line that says what breaks when they go"


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._current_graph_task_id()",
        "import torch._dynamo",
        "from torch._functorch import config",
        "from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher",
        "getattr(model, '_no_split_modules', None)",
        "'_require_grads_hook' in module.__dict__",
        "unit._get_fsdp_state()",
        "self._data_parallel_size",
    ],
)
def test_a_private_name_is_seen(line: str) -> None:
    assert strangers("layers.base", ast.parse(line))


def test_homes_are_where_the_names_are() -> None:
    for file in HOMES | EXPERIMENTAL:
        assert list(uses(tree(file))), f"{file} has no private name any more: take it off the list"
