"""AdaLoRA: the update as a singular value decomposition, ``W + scaling · B·diag(E)·A`` (arXiv:2303.10512, equation 3).

A row of A, an entry of E and a column of B form a *triplet*. Training prunes triplets by setting their E to zero
(:mod:`lightning_lora.variants.rank_allocation` chooses them), so that layers end with different ranks. The paper's regularizer pulls
A and B towards orthogonal matrices. These make the triplets of a layer independent, as in an SVD, without computing an SVD.

AdaLoRA is a training method, not a file format. With E multiplied into B and the pruned triplets removed, it is plain LoRA with one
rank per layer. :func:`shrink_adalora` converts a model to that, and adapter files store that. Every LoRA reader can load it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.adapting import shallow_copy
from lightning_lora.layers.base import LoRALayer, lora_layers
from lightning_lora.layers.factors import Exported
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.layers.whole_factors import check_pairs
from lightning_lora.registry import register_variant
from lightning_lora.utils.gradient_reducer import hand_over
from lightning_lora.utils.names import adapter_root, clean_name, join
from lightning_lora.utils.parameters import make_parameter
from lightning_lora.utils.patterns import by_name
from lightning_lora.utils.sharding import is_sharded

_STD = 0.02  # standard deviation of A and B at the start, as in the authors' code and in PEFT
_INIT = LoRAConfig().init


@register_variant("adalora")
class AdaLoRA(LoRALayer):
    """The mixin: ``lora_E`` (r, 1) between A and B.

    Works with every kind where row i of A is multiplied with column i of B only.
    """

    prunes = True  # ranks change in training, so a frozen copy would not stay alike
    lora_E: nn.Parameter

    @classmethod
    def parameter_shapes(cls, module: Any, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Return the kind's shapes of A and B, and E (r, 1)."""
        return {**super().parameter_shapes(module, spec), "lora_E": (spec.rank, 1)}

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        """Raise ValueError also for an init that is not the default, and for layers that cannot be pruned.

        Row i of A and column i of B must form a pair. No row may have to stay zero.
        """
        if spec.config.init != _INIT:
            raise ValueError(
                f"init={spec.config.init!r} and variant='adalora': AdaLoRA defines its own start (A and B normal, E zero); leave init out"
            )
        super().check(module, spec)
        check_pairs(module, spec, *cls.adapter_shapes(module, spec), "variant='adalora'")

    @classmethod
    def adapter_placements(cls, placement: Any) -> dict[str, Any]:
        """Return the kind's placements, and E replicated: every rank has all triplets."""
        from torch.distributed.tensor import Replicate

        return super().adapter_placements(placement) | {"lora_E": Replicate()}

    def reset_lora_parameters(self) -> None:
        """Reset A and B to normal values with standard deviation 0.02, and E to zero."""
        nn.init.normal_(self.lora_A, std=_STD)
        nn.init.normal_(self.lora_B, std=_STD)
        nn.init.zeros_(self.lora_E)

    @property
    def scaling(self) -> float:
        """α over the rank at the start, even after pruning, with the 1e-5 that PEFT adds to the rank."""
        spec = self.lora_state.spec
        return spec.config.scaling_of(spec.rank + 1e-5, spec.alpha)

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``diag(E)·A`` and B."""
        return self.lora_A * self.lora_E.view(-1, *(1 for _ in self.lora_A.shape[1:])), self.lora_B

    def exported(self) -> Exported:
        """Return the plain LoRA that this layer computes, with the remaining rank."""
        return _made_plain(shallow_copy(self), replace(self.lora_config, variant="plain")).exported()


def shrink_adalora(model: nn.Module) -> dict[str, int]:
    """Convert a model's AdaLoRA layers to plain LoRA of the ranks that training found, in place. The outputs stay the same.

    A triplet whose E is zero adds nothing, so removing it is exact. A layer that lost all triplets keeps one, with B zero:
    every reader of adapters supports rank 1, few support rank 0.

    Args:
        model: adapted with ``variant="adalora"``, not merged, not sharded. Optimizers that hold its adapters are not updated.

    Returns:
        Module name → number of remaining triplets, 0 included, in the model's order.

    Raises:
        ValueError: the model has no AdaLoRA layers, or is merged or sharded; nothing is changed then.

    Examples:
        >>> model = apply_lora(model, LoRAConfig(variant="adalora", rank=4))
        >>> ranks = shrink_adalora(model)  # after training; AdaLoRACallback does it at the end of fit
    """
    prefix, root = adapter_root(model)
    layers = {clean_name(name): layer for name, layer in lora_layers(root) if isinstance(layer, AdaLoRA)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no AdaLoRA layers to shrink; apply a LoRAConfig with variant='adalora' first.")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name!r} is merged and cannot shrink; call unmerge_lora(model) first.")
        if is_sharded(layer.lora_A):
            raise ValueError(f"{name!r} is sharded and cannot shrink; load a checkpoint into the model on one process and shrink it there.")
    found = {join(prefix, name): len(kept_triplets(layer)) for name, layer in layers.items()}
    config = _plain_config(layers.items())
    for layer in layers.values():
        before = layer.lora_parameters().values()
        hand_over(before, _made_plain(layer, config).lora_parameters().values())
    return found


def kept_triplets(layer: AdaLoRA) -> list[int]:
    """Return the indices of the triplets that add something."""
    return layer.lora_E.detach().flatten().nonzero().flatten().tolist()


def _plain_config(layers: Iterable[tuple[str, Any]]) -> LoRAConfig:
    """Return the config of the plain LoRA: the largest rank found, and all ranks by name."""
    found = {name: (layer, max(1, len(kept_triplets(layer)))) for name, layer in layers}
    config = next(iter(found.values()))[0].lora_config
    ranks = by_name({name: rank for name, (_, rank) in found.items()})
    return replace(config, variant="plain", rank=max(ranks.values()), rank_pattern=ranks)


@torch.no_grad()
def _made_plain(layer: LoRALayer, config: LoRAConfig) -> LoRALayer:
    """Convert a layer to the plain LoRA that it computes, with its own parameters, and return it."""
    assert isinstance(layer, AdaLoRA)
    kept = kept_triplets(layer) or [0]
    # Plain LoRA divides alpha by the remaining rank, AdaLoRA by the rank at the start. B is multiplied by the quotient.
    ratio = layer.scaling / config.scaling_of(len(kept), layer.alpha)
    E = (layer.lora_E[kept] * ratio).view(1, -1, *(1 for _ in layer.lora_B.shape[2:]))
    factors = {"lora_A": layer.lora_A[kept].clone(), "lora_B": layer.lora_B[:, kept] * E}
    del layer._parameters["lora_E"]
    for name, factor in factors.items():
        layer._parameters[name] = make_parameter(factor, layer._parameters[name].requires_grad)  # type: ignore[union-attr]
    layer.lora_state.spec = replace(layer.spec, config=config, rank=len(kept))
    layer.rebase_class(layer.lora_base)
    return layer
