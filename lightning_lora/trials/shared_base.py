"""One base in memory for several runs: a frozen parameter that equals another run's is that run's.

Each run makes its model as it would alone, so that it draws the same random numbers. After its adapters are added, what is frozen is
compared by name, and what is equal is shared. So nothing has to be known of how a model was made, quantized or initialized.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lora.strategies.digests import digest
from lightning_lora.utils.names import clean_name, join


class SharedBase:
    """The frozen parameters that several modules share.

    Attributes:
        parameters: precision of the Trainer → name → parameter, and the dtype it had when it was added: precisions such as "bf16-true"
            cast it after that.
    """

    def __init__(self) -> None:
        self.parameters: dict[str, dict[str, tuple[nn.Parameter, torch.dtype]]] = {}

    def share(self, module: nn.Module, precision: str = "32-true") -> list[str]:
        """Replace each frozen parameter by the equal one of the modules before. Return the names of those that differ from them.

        Args:
            module: an adapted module, not yet on its device. The first one gives its parameters.
            precision: the Trainer's.
        """
        pool = self.parameters.setdefault(precision, {})
        differ: list[str] = []
        replaced: dict[int, nn.Parameter] = {}
        for prefix, owner in module.named_modules():
            for name, parameter in owner._parameters.items():
                if parameter is None or parameter.requires_grad or is_lazy(parameter) or parameter.is_meta:
                    continue
                if id(parameter) in replaced:  # tied
                    owner._parameters[name] = replaced[id(parameter)]
                    continue
                fqn = clean_name(join(prefix, name))
                known, dtype = pool.setdefault(fqn, (parameter, parameter.dtype))
                if known is parameter:
                    continue
                if parameter.dtype == dtype and not known.requires_grad and _equal(owner, name, known, parameter):
                    replaced[id(parameter)] = owner._parameters[name] = known
                else:
                    differ.append(fqn)
        return differ

    def trains(self) -> str | None:
        """Return the name of a shared parameter that is not frozen any more, None if all are."""
        return next((name for pool in self.parameters.values() for name, (p, _) in pool.items() if p.requires_grad), None)


def _equal(owner: nn.Module, name: str, known: nn.Parameter, new: nn.Parameter) -> bool:
    """Return True if two parameters have the same bits, once they are on one device and of one dtype."""
    if type(known) is not type(new) or known.shape != new.shape:
        return False
    if type(known) is nn.Parameter and type(known.data) is Tensor:
        return torch.equal(known.detach(), new.detach().to(known.device, known.dtype))
    return digest(owner, name, known) == digest(owner, name, new)
