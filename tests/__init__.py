"""The tests."""

import functools
import importlib.metadata

# Each Trainer reads the metadata of all installed packages, for callbacks: 5 ms. They stay the same while tests run.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)
