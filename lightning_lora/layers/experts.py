"""Experts of a mixture, stored as one tensor per projection: ``W_e + scaling · B_e·A_e`` for each expert e.

transformers 5 stores ``gate_up_proj`` (experts, 2·width, hidden) and ``down_proj`` (experts, hidden, width), some models each expert's
matrix transposed. Their classes differ in activation, biases and norms, and each runs in one of several implementations. So none of their
code is repeated here. The base's own forward runs on a stand-in of the module whose weights are
:class:`~lightning_lora.ops.low_rank_sum.LowRankSum`: every product with an expert's weight adds that expert's two small products. Dense
updates are built by a merge only, and dropout acts on the input of each expert's A. Packed weights stay packed: a sum is of a
:class:`~lightning_lora.ops.frozen_stack.FrozenStack` then.

PEFT (``target_parameters``) adds the dense updates of all experts in every forward pass, and has no dropout there.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.peft_stacks import StackedWeights, to_file
from lightning_lora.layers.spec import LayerSpec, Option, kind_options_of
from lightning_lora.ops.experts_forward import ExpertsForward
from lightning_lora.ops.low_rank_sum import LowRankSum
from lightning_lora.quantization.formats import stand_ins
from lightning_lora.registry import register_kind
from lightning_lora.utils.transformers_experts import DBRX_EXPERTS, PRODUCTS_ALONE, active_experts, experts_implementation, stored_experts

NAME = "experts"


class ExpertStack(LoRALayer):
    """The weights of all experts for one projection.

    Shape:
        ``weight`` (E, out, in), or (E, in, out) if :attr:`transposed`. Expert after expert, as a grouped convolution has its groups:
        ``lora_A`` (E·r, in), ``lora_B`` (E·out, r).
    """

    lora_base = nn.Module
    #: The factor that faces the experts' common input or output, which ``shared_outer`` shares.
    outer: str
    #: True if the module has a true ``is_transposed``, by which PEFT chooses the factors' axes. Llama 4 is transposed without it.
    flagged_transposed: bool
    #: Number of the weight's dimensions.
    dimensions: ClassVar[int] = 3
    #: What is beside the codes of a packed weight; None for a plain one.
    packed_stack: Any = None

    def matrices(self) -> tuple[int, int, int]:
        """Return the numbers of experts, and of one expert's outputs and inputs."""
        packed = self.packed_stack
        experts, rows, columns = self.weight.shape if packed is None else packed.shape
        return (experts, columns, rows) if self.transposed else (experts, rows, columns)

    @classmethod
    def adapter_shapes(cls, module: Any, spec: LayerSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A, (E·r, in), and of B, (E·out, r). A shared one is that of one expert."""
        experts, outputs, inputs = module.matrices()
        shared = module.outer if kind_options_of(spec.config, NAME)["shared_outer"] else None
        many = {factor: 1 if factor == shared else experts for factor in ("lora_A", "lora_B")}
        return (many["lora_A"] * spec.rank, inputs), (many["lora_B"] * outputs, spec.rank)

    @classmethod
    def pair_sizes(cls, module: Any, spec: LayerSpec) -> tuple[int, int, int]:
        """Return rank, inputs and outputs of one expert's A and B."""
        _, outputs, inputs = module.matrices()
        return spec.rank, inputs, outputs

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        """Raise ValueError also for a weight that is no stack of matrices, and for a variant that scales outputs."""
        if module.packed_stack is None and module.weight.ndim != cls.dimensions:
            raise ValueError(f"its shape {tuple(module.weight.shape)} is not one matrix per expert; exclude it")
        if cls.output_scale is not LoRALayer.output_scale:
            raise ValueError(f"variant={spec.config.variant!r} scales a layer's outputs, which experts in one tensor have no place for")
        super().check(module, spec)

    def to_matrix(self, tensor: Tensor) -> Tensor:
        """Return the tensor as (E, out, in)."""
        return tensor.mT if self.transposed else tensor

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Invert :meth:`to_matrix`."""
        return matrix.mT if self.transposed else matrix

    def factor_matrices(self) -> tuple[Tensor, Tensor]:
        """Return A (E, r, in) and B (E, out, r). A shared one is expanded, without a copy."""
        A, B = self.update_factors()
        experts, outputs, _ = self.matrices()
        A, B = A.unflatten(0, (-1, B.shape[1])), B.unflatten(0, (-1, outputs))
        return A.expand(experts, -1, -1), B.expand(experts, -1, -1)

    def factor_rows(self) -> list[int]:
        """Return the rows of each expert's B; with a shared B those of the one that all multiply by."""
        outputs = self.matrices()[1]
        return [outputs] * (self.lora_B.shape[0] // outputs)

    def to_peft(self) -> dict[str, Tensor]:
        """Return A and B as PEFT 0.19 and later store them."""
        A, B = (factor.detach() for factor in self.factor_matrices())
        return dict(zip(self.peft_names, to_file(A, B, exchanged=self.transposed != self.flagged_transposed), strict=True))

    def adapted_weight(self) -> LowRankSum:
        """Return the weight with its update, in the weight's own layout."""
        A, B = self.factor_matrices()
        left, right = (A.mT, B.mT) if self.transposed else (B, A)
        weight = self.weight if self.packed_stack is None else self.packed_stack.stack(self.weight)
        return LowRankSum(weight, left, right, self.scaling, self.dropout_now())


@register_kind(name=NAME, match=lambda cls: stored_experts(cls) is not None)
class LoRAExperts(StackedWeights):
    """A module of experts, such as ``Qwen3MoeExperts`` or ``GptOssExperts``: one :class:`ExpertStack` per projection.

    Options, in ``kind_options={"experts": {...}}``:
        shared_outer: all experts share the A of the projections up and the B of the projection down, the factors that face the model's
            hidden states; each has the other factor for itself. At 128 experts this halves an adapter's parameters, and more where experts
            are narrow. Megatron-Bridge and Tinker call it so.
        rank_over_active: the rank is ``rank`` divided by the number of experts that a token meets, so that a token meets as many
            parameters as in a dense layer of rank ``rank`` ("LoRA Without Regret", Schulman et al., 2025). alpha stays. A
            ``rank_pattern`` that matches the module wins.
    """

    kind_options: ClassVar[dict[str, Option]] = {
        "shared_outer": Option(False, lambda value: isinstance(value, bool), "true or false"),
        "rank_over_active": Option(False, lambda value: isinstance(value, bool), "true or false"),
    }

    weight_kind = ExpertStack
    is_linear = True
    #: Name of the projection down.
    down: ClassVar[str] = "down_proj"
    #: True if each expert's matrix is stored as (in, out).
    stored_transposed: ClassVar[bool]
    #: Runs the base's own forward.
    computes: ClassVar[ExpertsForward]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stored = stored_experts(cls.lora_base)
        if stored is not None:
            cls.adapted, cls.stored_transposed = stored
            cls.peft_parameters = cls.adapted
        if cls.lora_base is not nn.Module and not hasattr(cls.lora_base, "computes"):  # a packed class has its own
            cls.computes = ExpertsForward(cls.lora_base)

    @classmethod
    def _alone(cls, module: Any, name: str) -> Any:
        layer = super()._alone(module, name)
        layer.__dict__.update(outer="lora_B" if name == cls.down else "lora_A", transposed=cls.stored_transposed)
        layer.__dict__.update(flagged_transposed=bool(getattr(module, "is_transposed", False)))
        return layer

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        """Raise ValueError also for an implementation that does more with the weights than multiply by them."""
        chosen = experts_implementation(module)
        if chosen not in PRODUCTS_ALONE:
            known = ", ".join(filter(None, PRODUCTS_ALONE))
            raise ValueError(f"LoRA does not see the products of experts_implementation={chosen!r}; choose one of {known}")
        if kind_options_of(spec.config, NAME)["shared_outer"] and cls.down not in cls.adapted:
            raise ValueError("shared_outer shares factors of the projections up and down, and it has one weight; exclude it")
        super().check(module, spec)

    @classmethod
    def default_rank(cls, module: Any, config: LoRAConfig, model: nn.Module) -> int:
        """Return the config's rank, with ``rank_over_active`` divided by the number of experts that a token meets."""
        if not kind_options_of(config, NAME)["rank_over_active"]:
            return config.rank
        active = active_experts(module, model)
        if active is None:
            raise ValueError("nothing says how many of its experts a token meets, for rank_over_active; give its rank in rank_pattern")
        if config.rank % active:
            raise ValueError(
                f"rank={config.rank} is no multiple of the {active} experts that a token meets, for rank_over_active; choose one, or give"
                " its rank in rank_pattern"
            )
        return config.rank // active

    @classmethod
    def stacks(cls, base: type) -> dict[str, bool]:
        """Return all weights."""
        names, transposed = stored_experts(base) or ((), False)
        return dict.fromkeys(names, transposed)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base's output, with every expert's weight adapted unless the layer is merged or disabled."""
        # A stand-in also where nothing is added: experts have attributes such as GPT-OSS's alpha, and an adapted layer has its own.
        return self.computes(self, self._stand_ins, args, kwargs)

    def _stand_ins(self) -> dict[str, Any]:
        """Return what stands for each weight: its sum with the update, or what is packed; a plain weight stands for itself."""
        packed = stand_ins(self)
        if self.disabled or self.merged:
            return packed
        layers: dict[str, Any] = self.by_weight()
        return packed | {name: layer.adapted_weight() for name, layer in layers.items()}


class FlatExpertStack(ExpertStack):
    """The weights of all experts for one projection of DBRX, whose matrices lie one below another.

    Shape:
        ``weight`` (E·out, in), or (E·in, out) if :attr:`transposed`; A and B as :class:`ExpertStack` has them.
    """

    dimensions = 2
    moe_num_experts: int  # the module's

    def matrices(self) -> tuple[int, int, int]:
        """Return the numbers of experts, and of one expert's outputs and inputs."""
        experts, (rows, columns) = self.moe_num_experts, self.weight.shape
        return (experts, columns, rows // experts) if self.transposed else (experts, rows // experts, columns)

    def to_matrix(self, tensor: Tensor) -> Tensor:
        """Return the tensor as (E, out, in)."""
        return super().to_matrix(tensor.unflatten(0, (self.moe_num_experts, -1)))

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Invert :meth:`to_matrix`."""
        return super().from_matrix(matrix).flatten(0, 1)

    def adapted_matrix(self, matrix: Tensor) -> LowRankSum:
        """Return one expert's matrix with its update.

        Args:
            matrix: a view of the weight, in its layout.

        Raises:
            ValueError: it is no expert's part of the weight.
        """
        distance = matrix.storage_offset() - self.weight.storage_offset()
        expert, rest = divmod(distance, matrix.numel())
        apart = matrix.untyped_storage().data_ptr() != self.weight.untyped_storage().data_ptr()
        if apart or rest or matrix.numel() * self.moe_num_experts != self.weight.numel():
            raise ValueError("the experts were called with a matrix that is no view of their weight: exclude them from LoRA, or merge them")
        A, B = (factor[expert] for factor in self.factor_matrices())
        left, right = (A.mT, B.mT) if self.transposed else (B, A)
        return LowRankSum(matrix, left, right, self.scaling, self.dropout_now())


@register_kind(DBRX_EXPERTS)
class LoRAFlatExperts(LoRAExperts):
    """A ``DbrxExpertGLU``: one :class:`FlatExpertStack` per projection, with the options of :class:`LoRAExperts`.

    The code around the module reads the weights and calls the module once per expert, with views of that expert's matrices. Where a view
    lies in the weight says which expert it is. PEFT 0.21 adds to such weights only while the module's own forward runs, which is too late.
    """

    lora_base = nn.Module
    weight_kind = FlatExpertStack
    adapted = ("w1", "v1", "w2")  # as the forward takes their matrices
    down = "w2"
    stored_transposed = False
    peft_reads = False

    @classmethod
    def _alone(cls, module: Any, name: str) -> Any:
        layer = super()._alone(module, name)
        layer.__dict__.update(transposed=name == cls.down)
        return layer

    def to_peft(self) -> dict[str, Tensor]:
        """Return the parameters under their own names."""
        return dict(self.lora_parameters())

    @classmethod
    def stacks(cls, base: type) -> dict[str, bool]:
        """Return none: the code around the module reads the weights too."""
        return {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.lora_base is not nn.Module:  # not a decorator, as in ExpertsForward
            cls._run_as_it_is = torch.compiler.disable(cls._run_as_it_is)  # type: ignore[method-assign]

    def forward(self, x: Tensor, *matrices: Tensor) -> Any:
        """Return the base's output for the matrices of one expert, adapted unless the layer is merged or disabled."""
        return self._run_as_it_is(x, *matrices)

    def _run_as_it_is(self, x: Tensor, *matrices: Tensor) -> Any:
        if self.merged or self.disabled:
            return self.base_forward(x, *matrices)
        layers: dict[str, Any] = self.by_weight()
        return self.base_forward(x, *(layer.adapted_matrix(each) for layer, each in zip(layers.values(), matrices, strict=True)))
