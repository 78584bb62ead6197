"""The tests, and what keeps libraries from doing work in each of them that no test needs."""

import functools
import importlib.metadata

# Each Trainer reads the metadata of all installed packages, for callbacks: 5 ms. They stay the same while tests run.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)


def seed_no_gpus() -> None:
    """Keep ``torch.manual_seed`` on a machine without GPUs from formatting the stack three times, for when they come: 1 ms."""
    import torch

    for module in (torch.cuda.random, torch.xpu.random, torch.mtia):
        module._lazy_call = lambda call, **kwargs: None
