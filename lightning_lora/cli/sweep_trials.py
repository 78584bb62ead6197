"""Which trials a command line or a file describes: their settings, their names, and their options of ``fit``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_lora.cli.messages import nearest
from lightning_lora.cli.yaml_files import key_twice
from lightning_lora.trials.naming import name_trials, text_of

# Short name → the options of fit that it sets.
SHORT = {
    "rank": ["lora.config.rank"],
    "alpha": ["lora.config.alpha"],
    "dropout": ["lora.config.dropout"],
    "learning_rate": ["model.learning_rate"],
    "seed": ["seed_everything", "data.seed"],
}


@dataclass(frozen=True)
class Settings:
    """A trial as it is described.

    Attributes:
        name: its name, also of its folder.
        values: short or dotted name → value.
    """

    name: str
    values: Mapping[str, Any]

    def options(self, without: Sequence[str] = ()) -> list[str]:
        """Return the options of ``fit``, but none of those in ``without``."""
        pairs = [(option, value) for name, value in self.values.items() for option in SHORT.get(name, [name])]
        return [f"--{option}={text_of(value)}" for option, value in pairs if option not in without]


def take_settings(words: Sequence[str]) -> tuple[list[Settings], list[str]]:
    """Return the trials that a command line describes, and the words that are left for ``fit``.

    ``--rank 4,8 --seed 0,1`` makes a trial of each combination. ``--trials FILE`` names a YAML list of mappings instead. Without either
    there is no trial.

    Raises:
        ValueError: a trial is described wrongly or twice.
    """
    left, grid, file = [], dict[str, list[str]](), ""
    queue = list(words)
    while queue:
        word = queue.pop(0)
        option, equals, value = word.partition("=")
        name = option.removeprefix("--")
        if not option.startswith("--") or name not in (*SHORT, "trials"):
            left.append(word)
            continue
        value = value if equals else queue.pop(0) if queue else ""
        if not value or value.startswith("--"):
            raise ValueError(f"--{name}: give a value, or several with commas")
        if name == "trials":
            file = value
        else:
            grid[name] = [each.strip() for each in value.split(",")]
            if "" in grid[name]:
                raise ValueError(f"--{name} {value}: a value between commas is empty; leave the comma out")
    if file and grid:
        raise ValueError(f"--trials {file} and --{next(iter(grid))} are two descriptions; put all of it into the file")
    given = {word.partition("=")[0] for word in left}
    for name, values in grid.items():
        if twice := next((option for option in SHORT[name] if f"--{option}" in given), None):
            raise ValueError(f"--{name} {','.join(values)} and --{twice} set the same option; leave one out")
    found = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
    found = _of_file(Path(file)) if file else found
    return [Settings(name, values) for name, values in name_trials(found)], left


def _of_file(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise ValueError(f"--trials {file}: no such file; name a YAML list of mappings, such as - {{rank: 4, learning_rate: 1.0e-3}}")
    try:
        content = yaml.safe_load(text := file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--trials {file} is not YAML: {' '.join(str(error).split())}") from error
    if (twice := key_twice(text)) is not None:
        raise ValueError(f"--trials {file}, line {twice[1]}: the key {twice[0]!r} is there twice; remove one")
    if not isinstance(content, list) or not all(isinstance(each, dict) and each for each in content):
        raise ValueError(f"--trials {file} must be a list of mappings, such as - {{rank: 4, learning_rate: 1.0e-3}}")
    for number, each in enumerate(content):
        for key in each:
            if key not in SHORT and key != "name" and "." not in str(key):
                raise ValueError(
                    f"--trials {file}, trial {number + 1}: {key!r} is neither {', '.join(SHORT)} nor an option of fit, such as "
                    f"lora.config.variant{nearest(str(key), list(SHORT))}"
                )
    return content
