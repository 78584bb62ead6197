"""Embeddings: ``y = W₀[ids] + scaling · B·A[:, ids]``.

A one-hot input selects a column of A, so the factors swap roles at the start: A is zero and B is random, as in the authors' own
loralib. Otherwise B's first gradient would depend only on one random column of A per token. There is no dropout: the
inputs are ids, and dropping an id has no meaning. PEFT has none either.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.registry import register_kind
from lightning_lora.utils.autocast import no_autocast
from lightning_lora.utils.sharding import summed


@register_kind(nn.Embedding, name="embedding")
class LoRAEmbedding(LoRALayer):
    """An ``nn.Embedding`` with a low-rank update: ``lora_A`` (r, num_embeddings), ``lora_B`` (dim, r)."""

    peft_names = ("lora_embedding_A", "lora_embedding_B")
    sizes = ("num_embeddings", "embedding_dim")
    padding_idx: int | None
    num_embeddings: int

    @classmethod
    def weight_shape(cls, module: Any) -> tuple[int, ...]:
        """Return (num_embeddings, dim)."""
        return module.num_embeddings, module.embedding_dim

    @classmethod
    def adapter_shapes(cls, module: nn.Embedding, spec: LayerSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A, (r, num_embeddings), and of B, (dim, r)."""
        return (spec.rank, module.num_embeddings), (module.embedding_dim, spec.rank)

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        """Raise ValueError also for ``max_norm``: it rewrites the base weight in the forward pass, but the base is frozen."""
        super().check(module, spec)
        if module.max_norm is not None:
            raise ValueError(f"max_norm={module.max_norm} changes the frozen weight in every forward pass; set it to None")

    @classmethod
    def example_input(cls, module: Any, generator: torch.Generator) -> Tensor:
        """Ids (2, 3)."""
        return torch.randint(module.num_embeddings, (2, 3), generator=generator)

    def lora_factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Return B, which starts at random, and A, which starts at zero."""
        return self.lora_B, self.lora_A

    def lora_update(self, y: Tensor, x: Tensor) -> Tensor:
        """Return ``y + scaling · B·A[:, ids]``; ids of any shape (...), y (..., dim)."""
        # padding_idx stops the gradient of that column, as it does in the base.
        A, B = self.update_factors()
        # Where A is cut along the vocabulary, t is a sum over the ranks. F.linear flattens t, and the sum fails then before torch 2.13.
        t = summed(F.embedding(x, A.t(), padding_idx=self.padding_idx))  # (..., r)
        # Gemma's embeddings scale their output, so the update is scaled too.
        scale = self.scaling * getattr(self, "embed_scale", 1.0)
        with no_autocast(y):  # it does not round the base's output, so it must not round the update
            return y + F.linear((t * scale).to(y.dtype), B.to(y.dtype))

    def to_matrix(self, tensor: Tensor) -> Tensor:
        """Return the tensor as (dim, num_embeddings): the inputs are one-hot."""
        return tensor.t()

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Return the matrix as (num_embeddings, dim)."""
        return matrix.t()
