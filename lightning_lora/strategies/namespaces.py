"""Support both names of Lightning: ``lightning.pytorch`` and ``pytorch_lightning``. Only this file knows the second.

The two packages have the same code, but classes of their own: an object of one is no instance of the other's classes. The callbacks work
under both. So every check against a class of Lightning's asks for its :func:`twins`. ``pytorch_lightning`` is never imported here: where
an object of it exists, it is loaded.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, TypeVar

import lightning
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, Checkpoint, LearningRateFinder, ProgressBar

T = TypeVar("T")

#: Lightning's top-level packages.
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
_SECOND = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}
# Callbacks that a Trainer knows by their class: it saves with them, asks them for the bar, or ends a fit when they raise.
_KNOWN = (Checkpoint, ProgressBar, LearningRateFinder, BatchSizeFinder)
#: A package of the second name → the same of the first.
FIRST = {second: first for first, second in _SECOND.items()}


def twins(*classes: type[T]) -> tuple[type[T], ...]:
    """Return the classes and, where ``pytorch_lightning`` is loaded, its copies of them: the second argument of ``isinstance``."""
    return classes + tuple(copy for cls in classes if (copy := _copy(cls)) is not None)


def twin(cls: type[T], like: Trainer | LightningModule) -> type[T]:
    """Return the one of a class's :func:`twins` that is of the same package as a Trainer or a LightningModule."""
    copy = _copy(cls)
    return copy if of_second(like) and copy is not None else cls


def of_second(like: Trainer | LightningModule) -> bool:
    """Return True for a Trainer or a LightningModule of ``pytorch_lightning``."""
    return any(library(each) == "pytorch_lightning" for each in type(like).__mro__)


def library(cls: type) -> str:
    """Return the top-level package that defines a class."""
    return cls.__module__.partition(".")[0]


def check_namespace(trainer: Trainer, callbacks: list[Callback]) -> None:
    """Refuse mixes of the two packages that Lightning itself accepts.

    Args:
        trainer: a Trainer of either package.
        callbacks: the trainer's.

    Raises:
        ValueError: the Trainer is ``pytorch_lightning``'s, and its minor version is not ``lightning``'s, with which the callbacks are
            tested; or a callback that the Trainer goes by is of the other package.
    """
    mine = twin(Checkpoint, trainer)
    if mine is not Checkpoint:
        theirs: Any = sys.modules["pytorch_lightning"]
        if theirs.__version__.split(".")[:2] != lightning.__version__.split(".")[:2]:
            raise ValueError(
                f"pytorch_lightning is {theirs.__version__} and lightning is {lightning.__version__}: the callbacks of lightning_lora need"
                f" the same version of both. pip install pytorch-lightning=={lightning.__version__}"
            )
    for callback in callbacks:
        if any(isinstance(callback, twins(cls)) and not isinstance(callback, twin(cls, trainer)) for cls in _KNOWN):
            raise ValueError(
                f"callbacks: {type(callback).__name__} is not of the Trainer's package ({mine.__module__.rpartition('.callbacks')[0]}),"
                " which knows such callbacks by their class: import both, and Tuner, from one package."
            )


def loaded(name: str) -> list[ModuleType]:
    """Return a module of ``lightning``'s and its copy of the other package, those of them that are loaded."""
    first = ".".join(name.split(".")[:2])
    return [sys.modules[each] for each in (name, name.replace(first, _SECOND[first], 1)) if each in sys.modules]


def _copy(cls: type[T]) -> type[T] | None:
    """Return ``pytorch_lightning``'s copy of a class of ``lightning``'s; None if it is not loaded, or too old to have it."""
    copies = [getattr(home, cls.__name__, None) for home in loaded(cls.__module__)[1:]]
    return copies[0] if copies else None
