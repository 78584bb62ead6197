"""Find copies of an adapted part that user code moves in training and that have no adapters: averages, momentum encoders, target networks.

Such code pairs parameters by place or by name, or calls ``load_state_dict``. With adapters on one side only, it fails, or it meets the
frozen base alone, which never moves.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_lora.model.frozen_parts import plain_copies
from lightning_lora.strategies.digests import digest
from lightning_lora.utils.messages import append_line

_CURE = (
    "For a copy that follows its original, adapters too: freeze it in __init__ (requires_grad_(False)), with equal weights, and let"
    " target_modules match in both, under a LoRACallback without module=."
)


class CopyCheck:
    """Watches frozen copies of adapted parts. A reference model is one, too, which nothing changes.

    A copy that the module drops or replaces in training, as by a new ``copy.deepcopy``, is not watched any further.

    Args:
        module: the LightningModule, adapted.
    """

    def __init__(self, module: nn.Module) -> None:
        self.copies = plain_copies(module)
        self._parts = WeakValueDictionary({name: module.get_submodule(name) for name in self.copies})
        self._versions: dict[str, list[int]] = {}
        self._values: dict[str, list[str | None]] = {}

    def before_batch(self) -> None:
        """Note the copies before the first batch."""
        if not self._versions:
            self._versions = {name: _versions(part) for name, part in self._parts.items()}
            self._values = {name: _values(part) for name, part in self._parts.items()}

    def after_batch(self) -> None:
        """Warn once of a copy that something wrote into."""
        self._warn([name for name, part in self._parts.items() if _versions(part) != self._versions.get(name)])

    def finish(self) -> None:
        """Compare values too: torch does not count writes through ``.data``."""
        self.after_batch()
        self._warn([name for name, part in self._parts.items() if name in self.copies and _values(part) != self._values.get(name)])

    def advise(self, exception: BaseException) -> None:
        """Append the cure to an error of torch's that names adapters, or says that shapes do not match."""
        if self.copies and isinstance(exception, RuntimeError) and any(word in str(exception) for word in ("lora_", "match", "shape")):
            append_line(exception, f"{self._named(next(iter(self.copies)))}. If the error is of code that pairs these two: {_CURE}")

    def _warn(self, written: list[str]) -> None:
        for name in written:
            if name in self.copies and not any(p.requires_grad for p in self._parts[name].parameters()):
                named = self._named(name)
                del self.copies[name]
                rank_zero_warn(f"{named}, and training wrote into it: what it got is the frozen base's, without what is learnt. {_CURE}")

    def _named(self, name: str) -> str:
        return f"{name!r} is a copy of {self.copies[name]!r}, without its adapters"


def _versions(part: nn.Module) -> list[int]:
    return [0 if p.is_inference() else p._version for p in part.parameters()]  # a tensor made in inference mode counts no writes


def _values(part: nn.Module) -> list[str | None]:
    return [digest(part, "", p) for p in part.parameters()]
