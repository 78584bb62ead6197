"""Several runs in one process, one at a time: each goes on where it stopped, and has random numbers of its own.

A run is ordinary code, such as ``trainer.fit``, that cannot be left in the middle. So each has a thread. Only one thread runs at any time:
:meth:`Turn.resume` runs it until it asks for something with :meth:`Turn.ask`, or ends. Gradient mode, inference mode and autocast belong to
a thread already. What belongs to the process is put aside between two turns (:class:`ProcessState`).
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from lightning_lora.utils.torch_private import own_cuda_graphs

SEED = "PL_GLOBAL_SEED"  # Lightning's, which samplers read


class ProcessState:
    """The random numbers, the default dtype and Lightning's seed, as they are now."""

    def __init__(self) -> None:
        self.torch = torch_random_numbers()
        self.python, self.dtype, self.seed = random.getstate(), torch.get_default_dtype(), os.environ.get(SEED)
        numpy = sys.modules.get("numpy")
        self.numpy = None if numpy is None else numpy.random.get_state()

    def restore(self) -> None:
        """Make them the process's again."""
        set_torch_random_numbers(self.torch)
        random.setstate(self.python)
        torch.set_default_dtype(self.dtype)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        if self.seed is None:
            os.environ.pop(SEED, None)
        else:
            os.environ[SEED] = self.seed


def torch_random_numbers() -> tuple[Tensor, ...]:
    """Return the state of torch's random numbers: on the CPU, and on the current GPU if one is in use."""
    gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return (torch.get_rng_state(), *([torch.cuda.get_rng_state()] if gpu else []))


def set_torch_random_numbers(states: tuple[Tensor, ...]) -> None:
    """Set what :func:`torch_random_numbers` returned."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


class Turn:
    """A run that goes on in turns with others.

    Args:
        work: the run. It begins with the process's state at the time of this call.

    Attributes:
        request: what the run waits for; None before it has begun and after it has ended.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self.request: Any = None
        self._work, self._state = work, ProcessState()
        self._thread: ThreadPoolExecutor | None = None
        self._result: Future[Any] = Future()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._requests: SimpleQueue[Any] = SimpleQueue()

    def resume(self, answer: Any = None) -> bool:
        """Let the run go on. Return True if it asks for something, False if it has ended.

        Args:
            answer: what :meth:`ask` returns to the run; an exception is raised there.
        """
        outside = ProcessState()
        self._state.restore()
        try:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1)
                self._result = self._thread.submit(own_cuda_graphs()(self._work))
                self._result.add_done_callback(lambda _: self._requests.put(None))
            else:
                self._answers.put(answer)
            self.request = self._requests.get()
        finally:
            self._state = ProcessState()
            outside.restore()
        if self.request is None:
            self._thread.shutdown()
        return self.request is not None

    def ask(self, request: Any) -> Any:
        """Stop here until the next turn. Only the run itself calls this."""
        self._requests.put(request)
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def error(self) -> BaseException | None:
        """Return what the ended run raised."""
        return self._result.exception()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within, torch draws this run's random numbers, on behalf of a run that waits."""
        outside = torch_random_numbers()
        set_torch_random_numbers(self._state.torch)
        try:
            yield
        finally:
            self._state.torch = torch_random_numbers()
            set_torch_random_numbers(outside)

    @property
    def random_numbers(self) -> tuple[Tensor, ...]:
        """The state of torch's random numbers of a run that waits."""
        return self._state.torch

    @random_numbers.setter
    def random_numbers(self, states: tuple[Tensor, ...]) -> None:
        self._state.torch = states
