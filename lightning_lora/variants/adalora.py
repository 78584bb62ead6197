"""AdaLoRA: the update as a singular value decomposition, ``W + scaling · B·diag(E)·A`` (arXiv:2303.10512, equation 3).

A row of A, an entry of E and a column of B are a *triplet*. Training prunes triplets by setting their E to zero
(:mod:`lightning_lora.variants.rank_allocation` says which), so that layers end with different ranks. Orthogonal A and B, which the paper's
regularizer asks for, make the triplets of a layer independent, as in an SVD, without computing one.

It is a way to train, not a format: with E multiplied into B and the pruned triplets left out it is a plain LoRA with a
rank for every layer, which is what :func:`shrink_adalora` leaves and what adapter files hold. Every reader of LoRA reads those.
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
from lightning_lora.registry import register_variant
from lightning_lora.utils.names import adapter_root, clean_name
from lightning_lora.utils.sharding import is_sharded

_STD = 0.02  # of A and B at the start, as in the authors' code and in PEFT
_INIT = LoRAConfig().init


@register_variant("adalora")
class AdaLoRA(LoRALayer):
    """The mixin: ``lora_E`` (r, 1) between A and B.

    Works with every kind where row i of A meets column i of B and nothing else.
    """

    lora_E: nn.Parameter

    @classmethod
    def parameter_shapes(cls, module: Any, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """A and B as the kind has them, E (r, 1)."""
        return {**super().parameter_shapes(module, spec), "lora_E": (spec.rank, 1)}

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        """Refuse layers whose rows of A and columns of B are no pairs, and rows that must stay at zero."""
        super().check(module, spec)
        A, B = cls.adapter_shapes(module, spec)
        if (A[0], B[1]) != (spec.rank, spec.rank):
            raise ValueError(
                "variant='adalora' prunes a row of A with its column of B, and here they are no pairs (a grouped convolution); exclude it"
            )
        if getattr(module, "padding_idx", None) is not None:
            raise ValueError(
                f"variant='adalora' starts with a random A, which would change the row of padding_idx={module.padding_idx}; exclude it"
            )

    @classmethod
    def adapter_placements(cls, placement: Any) -> dict[str, Any]:
        """The kind's, and E whole: every rank has all triplets."""
        from torch.distributed.tensor import Replicate

        return super().adapter_placements(placement) | {"lora_E": Replicate()}

    def init_adapter(self, spec: LayerSpec) -> None:
        """As every variant; the start is AdaLoRA's own, so ``config.init`` has to be the default."""
        if spec.config.init != _INIT:
            raise ValueError(
                f"init={spec.config.init!r} and variant='adalora': AdaLoRA has a start of its own (A and B normal, E zero); leave init out."
            )
        super().init_adapter(spec)

    def reset_lora_parameters(self) -> None:
        """A and B normal with standard deviation 0.02, E zero."""
        nn.init.normal_(self.lora_A, std=_STD)
        nn.init.normal_(self.lora_B, std=_STD)
        nn.init.zeros_(self.lora_E)

    @property
    def scaling(self) -> float:
        """α over the rank at the start, whatever was pruned since; with the 1e-5 that PEFT adds to the rank."""
        spec = self.lora_state.spec
        return spec.config.scaling_of(spec.rank + 1e-5, spec.alpha)

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """``diag(E)·A`` and B."""
        return self.lora_A * self.lora_E.view(-1, *(1 for _ in self.lora_A.shape[1:])), self.lora_B

    def exported(self) -> Exported:
        """The plain LoRA that this layer computes, of the rank that is left."""
        return _made_plain(shallow_copy(self), replace(self.lora_config, variant="plain")).exported()


def shrink_adalora(model: nn.Module) -> dict[str, int]:
    """Turn a model's AdaLoRA layers into plain LoRA of the ranks that were found, in place; its outputs stay what they are.

    A triplet whose E is zero adds nothing, so leaving it out is exact. A layer that lost all of them keeps one, with B zero:
    every reader of adapters knows rank 1, few know rank 0.

    Args:
        model: adapted with ``variant="adalora"``, not merged, not sharded; optimizers that hold its adapters do not follow.

    Returns:
        FQN → number of triplets that were left, 0 included, in the model's order.

    Raises:
        ValueError: there is no AdaLoRA in the model, or it is merged or sharded; nothing is changed then.
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
    found = {f"{prefix}.{name}" if prefix else name: len(kept_triplets(layer)) for name, layer in layers.items()}
    config = _plain_config(layers.items())
    for layer in layers.values():
        _made_plain(layer, config)
    return found


def kept_triplets(layer: AdaLoRA) -> list[int]:
    """Indices of the triplets that add something."""
    return layer.lora_E.detach().flatten().nonzero().flatten().tolist()


def _plain_config(layers: Iterable[tuple[str, Any]]) -> LoRAConfig:
    """The config of the plain LoRA: its rank the largest found, all ranks by name."""
    found = {name: (layer, max(1, len(kept_triplets(layer)))) for name, layer in layers}
    config = next(iter(found.values()))[0].lora_config
    # The first pattern that matches wins, and a name matches what ends in it too: longer names go first.
    ranks = {name: found[name][1] for name in sorted(found, key=lambda name: (-len(name), name))}
    return replace(config, variant="plain", rank=max(ranks.values()), rank_pattern=ranks)


@torch.no_grad()
def _made_plain(layer: LoRALayer, config: LoRAConfig) -> LoRALayer:
    """A layer turned into the plain LoRA that it computes, with parameters of its own."""
    assert isinstance(layer, AdaLoRA)
    kept = kept_triplets(layer) or [0]
    # Plain LoRA divides alpha by the rank that is left, AdaLoRA by the one at the start: the quotient goes into B.
    ratio = layer.scaling / config.scaling_of(len(kept), layer.alpha)
    E = (layer.lora_E[kept] * ratio).view(1, -1, *(1 for _ in layer.lora_B.shape[2:]))
    factors = {"lora_A": layer.lora_A[kept].clone(), "lora_B": layer.lora_B[:, kept] * E}
    del layer._parameters["lora_E"]
    for name, factor in factors.items():
        layer._parameters[name] = nn.Parameter(factor, requires_grad=layer._parameters[name].requires_grad)  # type: ignore[union-attr]
    layer.lora_state.spec = replace(layer.spec, config=config, rank=len(kept))
    layer.rebase_class(layer.lora_base)
    return layer
