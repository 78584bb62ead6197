"""Rows of an embedding that train, such as those of added tokens: ``W[index] = rows``, and the rest of W is the base's.

:class:`TokenRows` holds the rows as one parameter, (n, dim), of absolute values: a vocabulary that is resized anew has other random values
in its new rows, to which a difference would not fit. So rows are no part of the base's fingerprint either. Its forward computes the base's
output and replaces what belongs to these rows (:mod:`lightning_lora.ops.token_rows`).

A merge writes the rows into the weight, and so into all modules that share it. An unmerge writes the base's rows back. Source: PEFT 0.21,
``TrainableTokensLayer``, which copies the whole weight in every forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers import merging
from lightning_lora.layers.factors import Exported
from lightning_lora.layers.merge_plans import Plan
from lightning_lora.layers.replaced_rows import Rows
from lightning_lora.layers.rounding import Rounding, measure
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.layers.state import AdapterState, MergeRecord, Quantized
from lightning_lora.registry import register_kind
from lightning_lora.utils.checksums import checksum, sampled_digest
from lightning_lora.utils.parameters import make_parameter
from lightning_lora.utils.pieces import piece_of
from lightning_lora.utils.sharding import full_tensor, local_shard, local_tensor, shard_groups

IN_PEFT = "token_adapter.trainable_tokens_delta"  # values, not differences, in spite of its name
KIND = "token_rows"


@register_kind(name=KIND)
class TokenRows(Rows):
    """An embedding or a linear layer with rows of its own.

    Attributes:
        lora_followed: True if every other module that has the weight computes with these rows.
    """

    lora_followed: bool = False

    @property
    def followed(self) -> bool:
        """True if a merge is meant for all modules that have the weight."""
        return self.lora_followed

    @classmethod
    def parameter_shapes(cls, module: Any, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Return the shape of the rows, (n, dim)."""
        return {"lora_rows": (len(spec.rows), module._parameters["weight"].shape[1])}

    def init_adapter(self, spec: LayerSpec) -> None:
        """Freeze the base's parameters. Add the rows on the weight's device, in fp32 or wider, with the base's values."""
        self.lora_state = AdapterState(spec)
        for parameter in self.base_parameters().values():
            parameter.requires_grad_(False)
        self.__dict__["lora_dropout"] = nn.Dropout(0.0)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        (shape,) = self.parameter_shapes(self, spec).values()
        self.register_parameter("lora_rows", make_parameter(torch.empty(shape, device=self.weight.device, dtype=dtype), True))
        self._place_index()
        self.reset_lora_parameters()

    def _place_index(self) -> None:
        """Put the rows' numbers where the weight is."""
        if "lora_index" not in self.__dict__ or self.lora_index.device != self.weight.device:
            index = torch.tensor(self.spec.rows, device=self.weight.device)
            ascending, order = index.sort()
            self.__dict__.update(lora_index=index, lora_sorted=ascending, lora_order=order)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenRows:
        super()._apply(fn, recurse)
        self._place_index()
        return self

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Set the rows to the base's."""
        if not self.weight.is_meta:
            local_tensor(self.lora_rows).copy_(local_shard(self._base_rows(), self.lora_rows))

    def _base_rows(self) -> Tensor:
        """Return the weight's rows, (n, dim), in the order of the parameter; a collective under sharding."""
        return full_tensor(self.weight.detach())[self.lora_index]

    def adds_nothing(self) -> bool:
        """True if the rows are the base's."""
        rows = full_tensor(self.lora_rows.detach())
        return torch.equal(rows.to(self.weight.dtype), self._base_rows())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        comes = prefix + "weight" in state_dict and prefix + "lora_rows" not in state_dict
        follows = comes and not self.merged and self._starts()  # asked before the base's rows are replaced
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._place_index()  # with assign=True the weight may be on another device than before
        if follows:
            _, _, missing, _, _ = args
            self.reset_lora_parameters()
            missing[:] = [key for key in missing if key != prefix + "lora_rows"]

    def base_was_loaded(self, loaded: set[str]) -> None:
        """Do nothing: loading follows the base's rows itself."""

    # Merging.

    def lora_delta(self) -> Tensor:
        """Return what the rows change of the weight, as a dense tensor."""
        change = full_tensor(self.lora_rows) - self._base_rows()
        dense = change.new_zeros(self.weight.shape)
        return dense.index_copy(0, self.lora_index, change)

    def merged_weight(self, device: torch.device | str | None = None) -> tuple[Tensor, Rounding]:
        """Return the full weight with the rows in it, and what rounding lost of their change."""
        base, weight = self._base_rows(), full_tensor(self.weight.detach())
        rows = full_tensor(self.lora_rows.detach())
        new = rows.to(base.dtype)
        merged = weight.index_copy(0, self.lora_index, new)
        return merged.to(device or merged.device), _rounding(base, rows, new)

    def merge_plan(self, device: torch.device | str | None, reversible: bool, quantized: Quantized | None) -> Plan:
        """Plan to write the rows into the weight. The undo record has the base's rows, and a checksum of the whole weight."""
        weight, shared = self.weight, self.lora_state.shares_weight
        mine = local_tensor(weight.detach())
        here, which = self._local_rows()
        rows, base = full_tensor(self.lora_rows.detach())[which], mine[here]
        new = rows.to(mine.dtype)
        undo: merging.SparseUndo | merging.OriginalUndo | None = None
        if reversible:
            undo = merging.OriginalUndo(weight) if shared else merging.SparseUndo(here, base, checksum(mine))
        own = make_parameter(mine.index_copy(0, here, new), False) if shared else None
        digest = sampled_digest(piece_of(weight, self.spec.rows))
        record = MergeRecord(undo, digest, weight.device, _rounding(base, rows, new, shard_groups(weight)))

        def carry_out() -> None:
            if own is not None:
                self.weight = own
            else:
                mine.index_copy_(0, here, new)
            self.lora_state.merge = record

        return carry_out

    def unmerge_plan(self) -> Plan:
        """Plan to write the base's rows back.

        Raises:
            ValueError: no undo record was kept, or another part of the weight changed since the merge.
        """
        undo = self.lora_state.merge.undo if self.lora_state.merge is not None else None
        if not isinstance(undo, merging.SparseUndo):
            return super().unmerge_plan()
        mine = local_tensor(self.weight.detach())
        base = mine.index_copy(0, undo.index.to(mine.device), undo.value.to(mine.device))
        if checksum(base) != undo.checksum:
            raise ValueError("the base weight would not come back bit for bit: the merged weight changed since the merge")

        def carry_out() -> None:
            mine.copy_(base)
            self.lora_state.merge = None

        return carry_out

    def _local_rows(self) -> tuple[Tensor, Tensor]:
        """Return where rows are in this rank's part of the weight, and which of ``lora_rows`` each of them is."""
        order = torch.full((len(self.weight), 1), -1)
        order[list(self.spec.rows), 0] = torch.arange(len(self.spec.rows))
        which = local_shard(order.expand(self.weight.shape), self.weight)[:, 0]
        here = (which >= 0).nonzero()[:, 0]
        return here.to(self.weight.device), which[here].to(self.weight.device)

    # Files.

    def exported(self) -> Exported:
        """Return the rows under PEFT's name."""
        return Exported({IN_PEFT: self.lora_rows}, self.rank, self.alpha, self.lora_config)


def _rounding(base: Tensor, rows: Tensor, merged: Tensor, groups: Any = ()) -> Rounding:
    wide = base.to(rows.dtype)
    return measure(wide, rows - wide, merged, groups)
