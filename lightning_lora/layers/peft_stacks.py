"""PEFT's form of the factors of stacked weights (``target_parameters``), which two releases write in two ways.

A has the rows of all experts, (E·r, size of one axis of a matrix), expert after expert. B has one row per entry of the other axis and
r·E columns, the experts of one r side by side. PEFT 0.19 and later put A on a matrix's last axis, or on the first where the module says
``is_transposed``. PEFT 0.18 and earlier always put A on the first axis. So B·A may be the transposed update, which is the same pair
exchanged: ``(B·A)ᵀ = Aᵀ·Bᵀ``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_lora.layers.factors import Exported
from lightning_lora.layers.several_weights import SeveralWeights
from lightning_lora.layers.spec import LayerSpec

_FLIPPED = (0, 19)  # the release from which A is on the input's axis, for most models


def to_file(A: Tensor, B: Tensor, *, exchanged: bool) -> tuple[Tensor, Tensor]:
    """Return PEFT's A and B.

    Args:
        A: (E, r, in).
        B: (E, out, r).
        exchanged: True if PEFT's A is on the output's axis.
    """
    A, B = (B.mT, A.mT) if exchanged else (A, B)
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def from_file(A: Tensor, B: Tensor, experts: int, *, exchanged: bool) -> tuple[Tensor, Tensor]:
    """Invert :func:`to_file`."""
    A, B = A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return (B.mT, A.mT) if exchanged else (A, B)


def is_exchanged(A: Tensor, B: Tensor, shape: tuple[int, int, int], transposed: bool, flagged: bool, version: str | None) -> bool:
    """Return True if A of a file is on the output's axis.

    The sizes decide. Only where both are equal, the release that wrote the file does.

    Args:
        A: as in the file.
        B: as in the file.
        shape: (E, out, in).
        transposed: True if the weight is stored (E, in, out).
        flagged: True if the module has a true ``is_transposed``, which PEFT looks at.
        version: the file's ``peft_version``.

    Raises:
        ValueError: the pair does not fit the weight, or nothing says which axis A is on. The message is the reason only.
    """
    experts, outputs, inputs = shape
    found = (A.shape[1:].numel(), B.shape[0])
    fits = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1] and A.shape[0] % experts == 0
    if not fits or found not in ((inputs, outputs), (outputs, inputs)):
        raise ValueError(
            f"A {tuple(A.shape)} and B {tuple(B.shape)} are no pair for {experts} experts of {inputs} inputs and {outputs} outputs"
        )
    if inputs != outputs:
        return found == (outputs, inputs)
    release = re.match(r"(\d+)\.(\d+)", version or "")
    if release is None:
        raise ValueError(
            f"its matrices are square ({inputs}), so the sizes do not say which axis A is on (PEFT changed it in 0.19), and the JSON names"
            " no peft_version: add the release that wrote the file"
        )
    return transposed != flagged if (int(release[1]), int(release[2])) >= _FLIPPED else not transposed


class StackedWeights(SeveralWeights):
    """Several weights that are stacks of matrices, in files.

    PEFT wraps the module once per weight, in the order in which the module declares them: the last one is the outermost.
    """

    @classmethod
    def _nested(cls, module: Any, weights: Collection[str]) -> dict[str, int]:
        """Return weight → how many wrappers are around its own."""
        declared = [name for name in module._parameters if name in weights]
        return {name: len(declared) - 1 - index for index, name in enumerate(declared)}

    def to_peft(self) -> dict[str, Tensor]:
        """Return PEFT's tensors of all weights."""
        layers, nested = self.by_weight(), self._nested(self, self.adapted)
        return {"base_layer." * nested[name] + part: t for name, layer in layers.items() for part, t in layer.to_peft().items()}

    def exported(self) -> Exported:
        """Return what files have, with the names of the parameters, which PEFT targets instead of the module."""
        return replace(super().exported(), peft_parameters=self.peft_parameters)

    @classmethod
    def from_peft(cls, module: Any, part: str, tensor: Tensor, spec: LayerSpec) -> Tensor:
        """Return a shared factor, which files have once for each expert.

        Raises:
            ValueError: the experts' factors differ, or there are others than they.
        """
        rows, width = cls.parameter_shapes(module, spec)[part]
        experts = module._parameters[cls.adapted[0]].shape[0]
        if tuple(tensor.shape) != (experts * rows, width):
            return tensor
        each = tensor.unflatten(0, (experts, rows))
        if not torch.equal(each, each[:1].expand_as(each)):
            raise ValueError("with shared_outer all experts have the same factor, and in the file they differ")
        return each[0].clone()

    @classmethod
    def from_peft_stacks(
        cls, module: Any, tensors: dict[str, Tensor], scalings: dict[str, float], version: str | None
    ) -> dict[str, Tensor]:
        """Return the adapter parameters of a module for the tensors of a file.

        The module has one rank and one scaling. Factors of a lower rank are filled with zeros, which stay zero in training. What differs
        in scaling from the weight with the highest rank is multiplied into B. A weight without tensors gets zeros.

        Args:
            module: adapted or not.
            tensors: ``lora_A`` and ``lora_B`` of the outermost weight, ``lora_A_1`` and ``lora_B_1`` of the one inside, and so on.
            scalings: weight that the file adapts → its scaling.
            version: the file's ``peft_version``.

        Raises:
            ValueError: the tensors do not fit; the message has the weight's name and the reason.
        """
        if not scalings:
            raise ValueError("the JSON's target_parameters names no weight of it")
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        layers = {name: cls._alone(module, name) for name in cls.adapted}
        rest = dict(tensors)
        for name, depth in cls._nested(module, scalings).items():
            end = f"_{depth}" if depth else ""
            if not {f"lora_A{end}", f"lora_B{end}"} <= rest.keys():
                raise ValueError(f"{name}: the file has no pair for it")
            A, B = rest.pop(f"lora_A{end}"), rest.pop(f"lora_B{end}")
            layer = layers[name]
            shape = layer.matrices()
            try:
                exchanged = is_exchanged(A, B, shape, layer.transposed, layer.flagged_transposed, version)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            pairs[name] = from_file(A, B, shape[0], exchanged=exchanged)
        if rest:
            raise ValueError(f"{next(iter(rest))} belongs to no weight that the file targets")
        return cls.from_pairs(module, pairs, scalings)

    @classmethod
    def from_pairs(cls, module: Any, pairs: Mapping[str, tuple[Tensor, Tensor]], scalings: Mapping[str, float]) -> dict[str, Tensor]:
        """Return the adapter parameters of a module for pairs of stacks.

        Args:
            module: adapted or not.
            pairs: weight → A (E, r, in) and B (E, out, r), at least one.
            scalings: weight → its scaling.
        """
        layers = {name: cls._alone(module, name) for name in cls.adapted}
        rank, common = max((A.shape[1], scalings[name]) for name, (A, _) in pairs.items())
        found: dict[str, Tensor] = {}
        for name, layer in layers.items():
            experts, outputs, inputs = layer.matrices()
            A, B = torch.zeros(experts, rank, inputs), torch.zeros(experts, outputs, rank)
            if name in pairs:
                own = pairs[name]
                A, B = A.to(own[0].dtype), B.to(own[1].dtype)
                A[:, : own[0].shape[1]] = own[0]
                B[..., : own[0].shape[1]] = own[1] * (scalings[name] / common)
            found |= {f"lora_A_{name}": A.flatten(0, 1), f"lora_B_{name}": B.flatten(0, 1)}
        return found
