"""Runs in turns: one at a time, each with its own random numbers, default dtype and errors."""

import random
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lightning_lora.model.compile import compile_layers, uncompile_layers
from lightning_lora.trials.turns import ProcessState, Turn


def draws(n):
    return [(float(torch.rand(())), random.random(), float(np.random.rand())) for _ in range(n)]


def seed(n):
    torch.manual_seed(n)
    random.seed(n)
    np.random.seed(n)


@pytest.fixture(autouse=True)
def as_before():
    state = ProcessState()
    yield
    state.restore()


def test_each_run_draws_as_if_it_were_alone():
    expected = []
    for n in (1, 2):
        seed(n)
        expected.append(draws(3))
    found = {1: [], 2: []}
    turns = {}

    def run(n):
        seed(n)
        for _ in range(3):
            found[n] += draws(1)
            assert turns[n].ask("next") == n

    for n in (1, 2):
        turns[n] = Turn(lambda n=n: run(n))
    seed(7)
    mine = draws(2)
    seed(7)
    assert draws(1) == mine[:1]
    going = {n: turn.resume() for n, turn in turns.items()}
    while any(going.values()):
        going = {n: turn.resume(n) for n, turn in turns.items()}
    assert [found[1], found[2]] == expected
    assert draws(1) == mine[1:], "and outside nothing was drawn"
    assert [turn.error() for turn in turns.values()] == [None, None]


def test_others_may_draw_on_behalf_of_a_run():
    seed(3)
    both = torch.rand(2)
    drawn = []

    def run():
        torch.manual_seed(3)
        drawn.append(float(torch.rand(())))
        turn.ask("mask")

    turn = Turn(run)
    assert turn.resume() and turn.request == "mask"
    seed(9)
    with turn.drawing():
        assert [*drawn, float(torch.rand(()))] == pytest.approx(both.tolist())
    ours = torch.rand(())
    seed(9)
    assert torch.equal(ours, torch.rand(()))
    assert not turn.resume()


def test_the_default_dtype_is_a_runs_own():
    def run():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        turn.ask(0)
        seen.append(torch.get_default_dtype())
        torch.set_default_dtype(before)

    seen, turn = [], Turn(run)
    assert turn.resume() and torch.get_default_dtype() == torch.float32
    assert not turn.resume() and seen == [torch.float64] and torch.get_default_dtype() == torch.float32


def test_errors_go_in_and_out():
    def run():
        turn.ask(0)

    turn = Turn(run)
    turn.resume()
    assert not turn.resume(RuntimeError("stop"))
    assert isinstance(turn.error(), RuntimeError)


@pytest.fixture
def trees(monkeypatch):
    """Torch's module of CUDA graphs as before 2.13: it has a place for them in one thread alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, at this import, in some releases
        from torch._inductor import cudagraph_trees
    monkeypatch.delattr(cudagraph_trees, "_initialize_tls", raising=False)
    return cudagraph_trees


def test_each_run_can_record_cuda_graphs(trees):
    """Autograd's threads look among what is stashed."""
    found = []

    def run():
        containers = torch._C._get_obj_in_tls("tree_manager_containers")
        assert containers is trees.get_obj(trees.local, "tree_manager_containers")
        containers["a device"] = "graphs"
        found.append(containers)

    for _ in range(2):
        turn = Turn(run)
        assert not turn.resume() and turn.error() is None
    assert found == [{}, {}] and found[0] is not found[1], "graphs are freed with their run"


def test_a_thread_that_compiles_has_a_place_for_cuda_graphs(trees):
    """The process's own thread records after runs that recorded in theirs."""

    def run():
        model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(2)))
        compile_layers(model, cuda_graphs=True)
        uncompile_layers(model)
        return trees.get_obj(trees.local, "tree_manager_containers") is torch._C._get_obj_in_tls("tree_manager_containers")

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(run).result()
