"""``nn.MultiheadAttention``: an adapter on its packed input projection, and one on its output projection.

torch's module calls neither: it passes both weights to one function. So the adapted module's forward computes the projections itself, as
linears with an update, and gives torch's function the projected inputs with identity matrices as weights. Masks, ``bias_k``, the zero
attention and the returned weights stay torch's own, and each projection has its dropout. PEFT names one target for both projections and
has no dropout there; without dropout the outputs are the same.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.factors import Exported
from lightning_lora.layers.several_weights import SeveralWeights
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.ops import low_rank
from lightning_lora.registry import register_kind


class InProjection(LoRALayer, nn.Linear):
    """The packed projection of query, key and value, as a linear: weight (3·embed_dim, embed_dim)."""

    lora_base = nn.Linear
    is_linear = False  # to variants that span layers, which find layers by module

    @classmethod
    def adapter_shapes(cls, module: Any, spec: LayerSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A, (r, embed_dim), and of B, (3·embed_dim, r)."""
        return (spec.rank, module.embed_dim), (3 * module.embed_dim, spec.rank)

    def lora_update(self, y: Tensor, x: Tensor) -> Tensor:
        """Return ``y + scaling · B·A·dropout(x)``."""
        return low_rank.lora_update(y, x, *self.update_factors(), self.scaling, self.dropout_now())


@register_kind(nn.MultiheadAttention, name="multihead_attention")
class LoRAMultiheadAttention(SeveralWeights):
    """An ``nn.MultiheadAttention`` with an update of ``in_proj_weight``; ``out_proj`` is adapted with it, as a linear.

    ``lora_A_in_proj_weight`` (r, embed_dim), ``lora_B_in_proj_weight`` (3·embed_dim, r). Inputs that are one tensor are projected once.
    """

    is_linear = True
    adapted = ("in_proj_weight",)
    weight_kind = InProjection
    children_too = ("out_proj",)
    file_names: ClassVar[dict[str, str]] = {"lora_A": "lora_A_in_proj_weight", "lora_B": "lora_B_in_proj_weight"}

    @classmethod
    def unfit(cls, module: Any) -> str | None:
        """Return a reason if a subclass has a forward of its own, whose place the adapter's forward would take, or if keys or values have
        another size than queries: such a module has a weight for each of the three.
        """
        if getattr(type(module), "lora_base", type(module)).forward is not nn.MultiheadAttention.forward:
            return "it has a forward of its own, in whose place the adapter's would run"
        if module._parameters.get("in_proj_weight", module) is None:
            return f"it has no in_proj_weight, but three weights (embed_dim={module.embed_dim}, kdim={module.kdim}, vdim={module.vdim})"
        return None

    @classmethod
    def _alone(cls, module: Any, name: str) -> Any:
        layer = super()._alone(module, name)
        layer._parameters["bias"] = module._parameters["in_proj_bias"]
        return layer

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        """Raise ValueError also for a variant that writes a layer as another adapter: in files both projections are one."""
        super().check(module, spec)
        if cls.weight_class.exported is not LoRALayer.exported:
            what = f"variant={spec.config.variant!r}"
            raise ValueError(f"{what} writes each layer as plain LoRA of its own, and both projections are one entry in files; exclude it")

    def exported(self) -> Exported:
        """Return A and B as PEFT names those of the input projection: as the module's own."""
        return self.by_weight()["in_proj_weight"].exported()

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention's output and its weights, as ``nn.MultiheadAttention`` does."""
        options: Any = dict(
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        mine: Any = self
        if all(map(_adds_nothing, (self, mine.out_proj))):
            plain: Any = self.base_forward
            return plain(query, key, value, **options)
        layer, size, turned = self.by_weight()["in_proj_weight"], mine.embed_dim, mine.batch_first and query.dim() == 3
        q = layer(query)
        k = q if key is query else layer(key)
        v = k if value is key else q if value is query else layer(value)
        parts = [part[..., i * size : (i + 1) * size] for i, part in enumerate((q, k, v))]
        parts = [part.transpose(0, 1) for part in parts] if turned else parts
        same = torch.eye(size, dtype=q.dtype, device=q.device)
        attend: Any = F.multi_head_attention_forward
        y, weights = attend(
            *parts,
            size,
            mine.num_heads,
            None,
            None,
            mine.bias_k,
            mine.bias_v,
            mine.add_zero_attn,
            mine.dropout,
            same,
            None,
            training=self.training,
            use_separate_proj_weight=True,
            q_proj_weight=same,
            k_proj_weight=same,
            v_proj_weight=same,
            **options,
        )
        return mine.out_proj(y.transpose(0, 1) if turned else y), weights


def _adds_nothing(layer: nn.Module) -> bool:
    """True if a layer computes what its base computes with its present weight. torch's own forward is right then."""
    return not isinstance(layer, LoRALayer) or layer.merged or layer.disabled
