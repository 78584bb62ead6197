"""Find copies of an adapted part that user code moves in training and that have no adapters: averages, momentum encoders, target networks.

Such code pairs parameters by place or by name, or calls ``load_state_dict``. With adapters on one side only, it fails, or it meets the
frozen base alone, which never moves.
"""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_lora.model.frozen_parts import plain_copies
from lightning_lora.utils.checksums import checksum
from lightning_lora.utils.messages import append_line

_CURE = (
    "For a copy that follows its original, adapters too: freeze it in __init__ (requires_grad_(False)), with equal weights, and let"
    " target_modules match in both, under a LoRACallback without module=."
)


class CopyCheck:
    """Watches frozen copies of adapted parts. A reference model is one, too, which nothing changes.

    Args:
        module: the LightningModule, adapted.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.copies = module, plain_copies(module)
        self._versions: dict[str, list[int]] = {}
        self._values: dict[str, list[str]] = {}

    def before_batch(self) -> None:
        """Note the copies before the first batch."""
        if not self._versions:
            self._versions = {name: [p._version for p in self._part(name).parameters()] for name in self.copies}
            self._values = {name: self._checksums(name) for name in self.copies}

    def after_batch(self) -> None:
        """Warn once of a copy that something wrote into."""
        self._warn([name for name, versions in self._versions.items() if versions != [p._version for p in self._part(name).parameters()]])

    def finish(self) -> None:
        """Compare values too: torch does not count writes through ``.data``."""
        self.after_batch()
        self._warn([name for name, values in self._values.items() if name in self.copies and values != self._checksums(name)])

    def advise(self, exception: BaseException) -> None:
        """Append the cure to an error of torch's that names adapters, or says that shapes do not match."""
        if self.copies and isinstance(exception, RuntimeError) and any(word in str(exception) for word in ("lora_", "match", "shape")):
            append_line(exception, f"{self._named(next(iter(self.copies)))}. If the error is of code that pairs these two: {_CURE}")

    def _warn(self, written: list[str]) -> None:
        for name in written:
            if name in self.copies and not any(p.requires_grad for p in self._part(name).parameters()):
                named = self._named(name)
                del self.copies[name]
                rank_zero_warn(f"{named}, and training wrote into it: what it got is the frozen base's, without what is learnt. {_CURE}")

    def _part(self, name: str) -> nn.Module:
        return self.module.get_submodule(name)

    def _checksums(self, name: str) -> list[str]:
        return [checksum(p.detach()) for p in self._part(name).parameters()]

    def _named(self, name: str) -> str:
        return f"{name!r} is a copy of {self.copies[name]!r}, without its adapters"
