"""``fit`` that is built from its command line and waits to be started, for commands that make runs of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_lora.cli.lightning_cli import LoRACLI


class WaitingFit(LoRACLI):
    """``fit`` that waits.

    Args:
        words: the options of ``fit``.
        folder: where the run writes.

    Attributes:
        arguments: of the Trainer's ``fit``.
    """

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        self.folder, self.arguments = folder, dict[str, Any]()
        super().__init__(["fit", *words])

    @override
    def fit(self, **kwargs: Any) -> None:
        """Keep the arguments. ``self._run("fit", self.arguments)`` trains."""
        self.arguments = kwargs
