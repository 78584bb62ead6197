"""The peak memory of this process, which Linux tells."""

from __future__ import annotations

from pathlib import Path

import pytest

_RESET = Path("/proc/self/clear_refs")
#: For tests that measure it.
on_linux = pytest.mark.skipif(not _RESET.exists(), reason="only Linux tells a process its peak memory")


def peak() -> int:
    """Return the largest memory since the last call, in bytes; 0 where it is not told. It counts from there on."""
    try:
        status = Path("/proc/self/status").read_text()
        _RESET.write_text("5")
    except OSError:
        return 0
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
