"""What the layers share some of whose weight's rows are replaced: which modules they may be, and what they compute."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.ops.token_rows import replace_embedded, replace_projected
from lightning_lora.quantization.formats import format_of


class Rows(LoRALayer):
    """An ``nn.Embedding`` or an ``nn.Linear`` some of whose weight's rows are replaced in what it computes.

    Attributes, of the layer that has the rows:
        lora_rows: the rows, (n, dim), in fp32 or wider.
        lora_index: their numbers in the weight, (n,). No buffer: it is a constant.
        lora_sorted: the same, ascending.
        lora_order: which of the rows is the k-th in ``lora_sorted``, (n,).
    """

    low_rank = False
    #: Its weight is computed with as it is, but for the rows.
    replaces_rows: ClassVar[bool] = True
    padding_idx: int | None
    lora_rows: nn.Parameter
    lora_index: Tensor
    lora_sorted: Tensor
    lora_order: Tensor

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        """Raise ValueError for a weight whose rows cannot be replaced, or that has no such rows."""
        weight, field = module._parameters["weight"], "trainable_token_indices"
        if not spec.rows:
            raise ValueError(f"{field} names the rows of this kind, so kind_pattern cannot choose it")
        if not isinstance(module, (nn.Embedding, nn.Linear)) or format_of(module) is not None:
            raise ValueError(f"{field} is for embeddings and linear layers with a plain weight")
        if getattr(module, "max_norm", None) is not None:
            raise ValueError(f"max_norm={module.max_norm} changes the frozen weight in every forward pass; set it to None")
        if getattr(module, "scale_grad_by_freq", False):
            raise ValueError("scale_grad_by_freq=True is not supported for rows that train; set it to False")
        if weight.ndim != 2:
            raise ValueError("FSDP1 has flattened its weight: apply LoRA before wrapping")
        if max(spec.rows) >= len(weight):
            raise ValueError(
                f"{field} names row {max(spec.rows)}, and it has {len(weight)} here: call resize_token_embeddings({max(spec.rows) + 1})"
                " first, or with the size that the adapter was trained with"
            )

    @classmethod
    def adapter_shapes(cls, module: Any, spec: LayerSpec) -> Any:
        """Return no shapes: there is no A and no B."""
        return ()

    @classmethod
    def adapter_placements(cls, placement: Any) -> dict[str, Any]:
        """Raise ValueError: the rows are not split."""
        raise ValueError(f"trainable_token_indices on a tensor-parallel base ({placement}) is not supported")

    @property
    def replaced_rows(self) -> tuple[int, ...]:
        """Numbers of the rows, in the order of the parameter."""
        return self.spec.rows

    def lora_factors(self) -> tuple[()]:  # type: ignore[override]
        """Return none."""
        return ()

    @property
    def source(self) -> Rows:
        """The layer that has the rows, by default this one."""
        return self

    @property
    def rows_now(self) -> tuple[Tensor, Tensor] | None:
        """Numbers (n,) and values (n, dim) of the rows that are computed with; None while the base's own are."""
        source = self.source
        return None if self.disabled or source.lora_state.merge is not None else (source.lora_index, source.lora_rows)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output, with what belongs to the rows replaced."""
        y = self.base_forward(input, *args, **kwargs)
        return y if self.rows_now is None else self.lora_update(y, input)

    def lora_update(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the base's output ``y`` with what belongs to the rows replaced; x are ids, or a linear's input."""
        source = self.source
        if isinstance(self, nn.Embedding):
            padding = self.spec.rows.index(self.padding_idx) if self.padding_idx in self.spec.rows else None
            scale = getattr(self, "embed_scale", 1.0)  # Gemma's embeddings scale their output
            return replace_embedded(y, x, source.lora_rows, source.lora_sorted, source.lora_order, padding, scale)
        return replace_projected(y, x, source.lora_rows, source.lora_index, self._parameters.get("bias"))

    def extra_repr(self) -> str:
        """Return the base's text, then the number of rows."""
        return ", ".join(filter(None, (super(LoRALayer, self).extra_repr(), f"rows={len(self.spec.rows)}, merged={self.merged}")))
