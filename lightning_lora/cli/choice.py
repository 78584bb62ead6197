"""Which task and data module a command line chooses, read before it is parsed: they decide which options there are."""

from __future__ import annotations

import pydoc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from lightning_lora import data, tasks
from lightning_lora.cli.messages import nearest
from lightning_lora.cli.yaml_files import content_of
from lightning_lora.data.reading import READERS

# With a default class, its arguments can be set directly under `model:` and `data:`, without class_path and init_args.
DEFAULT_TASK, DEFAULT_DATA = tasks.CausalLMTask, data.InstructionDataModule
CONFIGS = (".yaml", ".yml", ".json")  # of files that may stand in a class's place, with its arguments


def chosen_task(words: Sequence[str]) -> type[LightningModule]:
    """Return the class that ``--model`` or a config file names, or the default task."""
    return _chosen(words, "model", tasks, DEFAULT_TASK)


def chosen_data(words: Sequence[str]) -> type[LightningDataModule]:
    """Return the class that ``--data`` or a config file names, or the chosen task's ``data_class``."""
    return _chosen(words, "data", data, default_data(chosen_task(words)))


def default_data(task: type) -> type[LightningDataModule]:
    """Return the data module of a task: what its ``data_class`` names, which the package's tasks have."""
    named = pydoc.locate(getattr(task, "data_class", ""))
    return named if isinstance(named, type) else DEFAULT_DATA


def class_path(cls: type) -> str:
    """Return the shortest path of one of the package's classes, and the full path of any other."""
    home = next((module for module in (tasks, data) if getattr(module, cls.__name__, None) is cls), None)
    return f"{home.__name__ if home else cls.__module__}.{cls.__qualname__}"


def _chosen(words: Sequence[str], key: str, home: Any, default: type) -> type:
    named = [name for name in _named(words, key) if name]
    fits = LightningModule if issubclass(default, LightningModule) else LightningDataModule
    there = [name for name in home.__all__ if isinstance(each := getattr(home, name), type) and issubclass(each, fits)]
    if not named:
        return default
    name = named[-1]
    if not isinstance(name, str) or (("/" in name or name.endswith(tuple(READERS))) and not name.endswith(CONFIGS)):
        own = f"{key}.model" if key == "model" else f"{key}.train"
        raise ValueError(f"{key}={name!r} is no class; write {own}: in YAML, or --{own} as an option")
    if "." not in name and name not in there:
        like = f"; for a folder of this name write {key}.model" if key == "model" and Path(name).is_dir() else nearest(name, there)
        raise ValueError(f"{key}={name!r}: there are {', '.join(there)}, and a class of your own by its full path{like}")
    cls = pydoc.locate(name) if "." in name else getattr(home, name)
    if not isinstance(cls, type):
        return default  # the parser will refuse the name
    if not issubclass(cls, fits):
        raise ValueError(f"{key}={name!r} is no {fits.__name__} of lightning.pytorch; derive it from that, not from pytorch_lightning's")
    return cls


def _named(words: Sequence[str], key: str) -> Iterator[Any]:
    """Yield the class paths that stand under a key, or what else stands there, in the order in which the parser reads them."""
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        value = value if equals else "".join(words[index + 1 : index + 2])
        if option in ("--config", "-c"):
            spec = content_of(value).get(key)
            if isinstance(spec, dict) and "class_path" in spec and (beside := spec.keys() - {"class_path", "init_args", "dict_kwargs"}):
                name = min(map(str, beside))
                raise ValueError(f"{key}.{name} stands beside class_path; with a class_path the arguments go under {key}.init_args")
            yield spec.get("class_path") if isinstance(spec, dict) else spec
        elif option in (f"--{key}", f"--{key}.class_path") and not value.lstrip().startswith("{"):
            yield value
