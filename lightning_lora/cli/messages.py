"""Say on one line what went wrong: the option, its value, and for a mistyped key the nearest existing one."""

from __future__ import annotations

import difflib
import inspect
import pydoc
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, get_args, get_type_hints

from jsonargparse import ArgumentError, Namespace

from lightning_lora.utils.peft_words import in_our_words

_KEY = re.compile(r'Parser key "([^"]+)":?')
_UNKNOWN = (
    re.compile(r"[Oo]ption '([^']+)' is not accepted"),
    re.compile(r"does not accept option '([^']+)'"),
    re.compile(r"unrecognized arguments: -+([^\s=]+)"),
)
_STRAY = re.compile(r"unrecognized arguments: ([^-].*)")
_CLASS = re.compile(r"Problem with given class_path '([^']+)':")
_LITERAL = re.compile(r"Expected an? typing\.Literal\[([^\]]*)\](?:\. Got value: (.*))?")
_TYPE = re.compile(r"Expected (?:an? )?<class '(?:[\w.]*\.)?(\w+)'>(?:\. Got value: (.*))?")
_RESTRICTED = re.compile(r"Not of type (\w+): (?:(.+) )?does not conform to restriction (.+)")
_UNREAD = re.compile(r"Not of type (\w+): (?:could not convert string to float|invalid literal for int\(\) with base 10): '(.*)'")
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "dict": "a mapping"}
_WORDS |= dict.fromkeys(("list", "tuple", "Sequence"), "a list")
_SUBCLASS = re.compile(r"Not a valid subclass of (\w+)")
_MISSING = re.compile(r"the following arguments are required: (.+)")
_DASH = re.compile(r"unrecognized arguments: -([^-\s=][^\s=]*)")
_NOISE: tuple[str, ...] = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a <class 'NoneType'>",
    "Not a valid subclass of",
    "a dict with",
)
_NOISE += ("Subclass types expect one of", "a class path (str)", "a dict without")
_ELSEWHERE = {"optimizer", "lr_scheduler"}


@contextmanager
def usage(*also: type[Exception], known: Callable[[], Iterable[str]] = tuple, where: str = "") -> Iterator[None]:
    """Turn what is raised within into a ValueError on one line.

    Args:
        also: Errors that mean a wrong option here, beside ``ValueError`` and the parser's own.
        known: Returns all options.
        where: The beginning of the message.
    """
    wrong: tuple[type[Exception], ...] = (ArgumentError, ValueError, *also)
    try:
        yield
    except wrong as error:
        raise ValueError(where + one_line(error, known())) from error


def check_not_null(function: Callable[..., Any], arguments: dict[str, Any], prefix: str = "") -> None:
    """Refuse null for arguments that cannot be None; the parser takes it for all.

    Args:
        function: A function or a class.
        arguments: The arguments that it will be called with.
        prefix: Text before the arguments' names.

    Raises:
        ValueError: An argument is None whose type does not allow it.
    """
    for name, (parameter, hint) in arguments_of(function).items():
        optional = hint is Any or type(None) in get_args(hint) or parameter.default is None
        if name in arguments and arguments[name] is None and not optional:
            raise ValueError(f"{prefix}{name}=null: give a value, or leave it out")


def check_groups(config: Namespace, names: Iterable[str]) -> None:
    """Raise ValueError for groups of options that hold something else, such as null: the parser takes it."""
    for name in names:
        if not isinstance(config[name], Namespace):
            raise ValueError(f"{name}={config[name]!r}: write its options under it, or leave it out")


def check_seed(seed: int | bool) -> None:
    """Raise ValueError for a number that is no seed. Lightning would not name the option."""
    if not isinstance(seed, bool) and not 0 <= seed < 2**32:  # numpy's limit
        raise ValueError(f"seed_everything={seed}: give a whole number from 0 to {2**32 - 1}")


def arguments_of(function: Callable[..., Any]) -> dict[str, tuple[inspect.Parameter, Any]]:
    """Return name → argument and its type: of a function, or of a class with those that it passes on to its parents."""
    inits = [vars(base)["__init__"] for base in getattr(function, "__mro__", ()) if "__init__" in vars(base)]
    found: dict[str, tuple[inspect.Parameter, Any]] = {}
    for each in inits or [function]:
        parameters, hints = inspect.signature(each).parameters.values(), get_type_hints(each)
        for parameter in parameters:
            if parameter.name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                found.setdefault(parameter.name, (parameter, hints.get(parameter.name, Any)))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def default_of(cls: type, name: str) -> Any:
    """Return the default of an argument that a class has itself or passes on."""
    return found[0].default if (found := arguments_of(cls).get(name)) is not None else None


def one_line(error: BaseException, known: Iterable[str] = ()) -> str:
    """Return an error's message on one line.

    Args:
        error: Any error. The parser's nested messages are reduced to the option's full name and the part that says what is wrong.
        known: All options, to find the one nearest to an unknown one.
    """
    text = str(error)
    option = ""
    for key in _KEY.findall(text):  # a nested message names the rest of the option; another branch of a union repeats the same part
        option = option if f".{option}".endswith(f".{key}") else f"{option}.{key}".strip(".")
    problems: list[str] = []
    for line in text.splitlines():
        line = _CLASS.sub("", _KEY.sub("", re.sub(r"^\s*- ", "", line))).strip()
        if line and not line.startswith(_NOISE) and line.replace('"', "'") not in [other.replace('"', "'") for other in problems]:
            problems.append(line)
    if _KEY.search(text) and len(problems) > 1:  # every branch of a union says what it expects
        problems = [line for line in problems if not line.startswith("Expected a path but ")]
    if option and (what := _all_expected(problems, text)):
        return f"{option}: {what}{_nearest_choice(what)}"
    what = ("; " if _KEY.search(text) else " ").join(map(_plain, problems)) or type(error).__name__
    if stray := _STRAY.fullmatch(what):
        return f"{stray[1]!r} is one argument too many; options have names, such as --config run.yaml"
    dashed = _DASH.match(what)
    if dashed and dashed[1] in list(known):
        return f"no option '-{dashed[1]}'; options begin with two dashes: --{dashed[1]}"
    unknown = next((found[1] for pattern in _UNKNOWN if (found := pattern.search(what))), None)
    if unknown is not None:
        return _unknown(unknown, option, known, _CLASS.findall(text))
    missing = _MISSING.fullmatch(what)
    if option and missing:
        return ", ".join(f"{option}.{name} is not set" for name in missing[1].split(", ")) + "; give it in the YAML file or as an option"
    given = _given(text)
    if option and given and not re.search(rf"(?<!\w){re.escape(given)}(?!\w)", what):
        what = f"{what.rstrip('.')}, got {given}"
    if option and given and "to a subclass of" in what and (hint := _of_other_package(given)):
        return f"{option}: {hint}"
    return f"{option}: {what}" if option else what


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the nearest of the known names, or nothing."""
    known = list(dict.fromkeys(known))
    found = difflib.get_close_matches(name, known, 1, 0.7)
    if not found:  # the last part may be right or nearly right, but under another key
        last = {key.rpartition(".")[2]: key for key in reversed(known)}
        found = [last[key] for key in difflib.get_close_matches(name.rpartition(".")[2], list(last), 1, 0.75)]
    return f"; did you mean {found[0]!r}?" if found else ""


def _of_other_package(given: str) -> str:
    """Return what to write in place of a class of ``pytorch_lightning``, or of one that is derived from it; nothing for another value."""
    from lightning_lora.strategies.namespaces import FIRST  # imports Lightning, which the command's start does without

    path = re.search(r"[A-Za-z_]\w*(?:\.\w+)+", given)
    cls = pydoc.locate(path[0]) if path else None
    if not path or not isinstance(cls, type):
        return ""
    package, _, rest = path[0].partition(".")
    if package in FIRST:
        return f"this command runs {FIRST[package]}, and {path[0]} is of another package; write {FIRST[package]}.{rest}"
    there = [base for base in cls.__mro__ if base.__module__.partition(".")[0] in FIRST]
    return f"{path[0]} is derived from {there[0].__module__}.{there[0].__name__}; derive it from lightning.pytorch's" if there else ""


def _nearest_choice(what: str) -> str:
    """Return "; did you mean ...?" for a value that is nearly one of the choices that a message lists."""
    choices, _, value = what.partition(", got ")
    return nearest(value, re.findall(r"'([^']*)'", choices)) if value else ""


def _unknown(name: str, option: str, known: Iterable[str], classes: list[str]) -> str:
    """Name the nearest option beside an unknown one."""
    if name.partition(".")[0] in _ELSEWHERE:
        return f"no option {name!r}: the optimizer is the model class's, see model.learning_rate, or configure_optimizers of your own class"
    last = name.rpartition(".")[2]
    full = f"{option}.{name}".strip(".")
    if (words := in_our_words(last)) and (full.startswith("lora.") or classes[-1:] == ["lightning_lora.LoRAConfig"]):
        return f"no option {full!r}; {words}"
    if not classes:
        return f"no option {name!r}{nearest(name, known) or '; --help lists the options'}"
    there = {parameter: f"{option}.{parameter}" for parameter in _parameters(classes[-1])}
    close = difflib.get_close_matches(name, list(there), 1, 0.7)
    hint = f"did you mean {there[close[0]]!r}?" if close else f"there are {', '.join(there.values())}"
    return f"no option {f'{option}.{name}'!r} of {classes[-1]}; {hint}"


def _parameters(path: str) -> list[str]:
    """Return the names of the arguments of a class."""
    cls = pydoc.locate(path)
    return list(arguments_of(cls)) if isinstance(cls, type) else []


def _plain(line: str) -> str:
    """Return one line of the parser in words."""
    kind, value = _expected(line)
    if kind:
        return f"expected {kind}" + (f", got {value}" if value else "")
    return re.sub(r"Expected a dot import path string: (\w+)$", r"no class \1 is known; write its import path, as package.module.\1", line)


def _all_expected(problems: list[str], text: str) -> str | None:
    """Return what the parser expected in place of which value, if none of the problems says anything else."""
    found = [_expected(line) for line in problems]
    kinds = [kind for kind, _ in found if kind] or [f"the fields of {each}" for each in _SUBCLASS.findall(text)[:1]]
    if not kinds or not all(kind for kind, _ in found):
        return None
    got = next((value for _, value in found if value), _given(text))
    return f"expected {' or '.join(dict.fromkeys(kinds))}" + (f", got {got}" if got else "")


def _given(text: str) -> str:
    """Return the first value that an error says was given, which is the innermost."""
    found = re.search(r"Given value: ([^\n]+)", text)
    return found[1] if found and not re.match(r"NestedArg|Namespace", found[1]) else ""


def _expected(line: str) -> tuple[str, str | None]:
    """Return in words what the parser expected, and the value that the line names, if any; "" for a line that says something else."""
    if found := _LITERAL.fullmatch(line):
        return f"{'one of ' * (',' in found[1])}{found[1]}", found[2]
    if found := _TYPE.fullmatch(line):
        return _WORDS.get(found[1], found[1]), found[2]
    if found := _RESTRICTED.fullmatch(line) or _UNREAD.fullmatch(line):
        number = "a whole number" if found[1].lower().endswith("int") else "a number"  # "ClosedUnitInterval" is none
        limits = found[3] if found.re is _RESTRICTED else ""
        for sign, word in (("v>=", "≥ "), ("v<=", "≤ "), ("v>", "> "), ("v<", "< ")):
            limits = limits.replace(sign, word)
        return f"{number} {limits}".rstrip(), found[2]
    return "", None
