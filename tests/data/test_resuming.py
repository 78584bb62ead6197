import torch
from torch.utils.data import TensorDataset

from lightning_lora.data.resuming import Position, ResumableLoader


def loader(position: Position, rows: int = 5) -> ResumableLoader:
    return ResumableLoader(TensorDataset(torch.arange(rows)), position, batch_size=1)


def test_it_goes_on_behind_what_was_given_out() -> None:
    first = loader(Position())
    batches = iter(first)
    assert [int(next(batches)[0]) for _ in range(2)] == [0, 1]
    state = first.state_dict()
    assert state == {"batches": 2, "length": 5}

    resumed = loader(Position())
    resumed.load_state_dict(state)
    batches = iter(resumed)
    assert int(next(batches)[0]) == 2 and resumed.state_dict()["batches"] == 3  # counted from the epoch's beginning
    assert [int(batch) for (batch,) in batches] == [3, 4]
    assert resumed.state_dict()["batches"] == 0  # the epoch is over: nothing to skip in the next
    assert [int(batch) for (batch,) in resumed] == [0, 1, 2, 3, 4]


def test_another_length_begins_anew(caplog) -> None:  # type: ignore[no-untyped-def]
    """As on another number of processes: their batches are others."""
    resumed = loader(Position(), rows=4)
    resumed.load_state_dict({"batches": 2, "length": 5})
    assert [int(batch) for (batch,) in resumed] == [0, 1, 2, 3]
    assert "The epoch begins anew: it has 4 batches, 5 when the checkpoint was saved" in caplog.text
