"""VeRA: A and B are random, frozen and shared by all layers; two vectors per layer train (arXiv:2310.11454, equation 2)::

    h = W·x + Λb·B·Λd·A·x        Λd, Λb diagonal: d has r entries and starts small, b has one per output and starts at zero

As in PEFT, A has r rows as long as the widest input. B has rows of length r, as many as the widest output. A layer uses the
part that it needs. Both are drawn from a seed, so that files and checkpoints store only the two vectors. They are neither parameters
nor buffers: nothing shards, reduces, saves or broadcasts them, and each device has one copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.spec import LayerSpec, Option
from lightning_lora.registry import register_variant
from lightning_lora.utils.sharding import is_sharded

_DEFAULT = LoRAConfig()
_MAX = torch.finfo(torch.float32).max


class Projection:
    """The frozen A and B of a model, drawn on first use, once per device. Immutable: copies share it.

    Args:
        seed: seed of the draw.
        rank: r.
        wide: widest input among the layers.
        tall: widest output among the layers.
    """

    def __init__(self, seed: int, rank: int, wide: int, tall: int) -> None:
        self.seed, self.rank, self.wide, self.tall = seed, rank, wide, tall
        self._drawn: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return A (r, wide) and B (tall, r) on a device, in fp32.

        They are Kaiming-uniform, and drawn on the CPU first, so that every device has the same values.
        """
        if device not in self._drawn:
            generator = torch.Generator("cpu").manual_seed(self.seed)
            shapes = ((self.rank, self.wide), (self.tall, self.rank))
            bounds = [math.sqrt(6 / shape[1]) for shape in shapes]
            with torch.inference_mode(False):  # training may follow: an inference tensor cannot be saved for backward
                A, B = (
                    torch.empty(shape, device="cpu", dtype=torch.float32).uniform_(-bound, bound, generator=generator)
                    for shape, bound in zip(shapes, bounds, strict=True)
                )
                self._drawn[device] = A.to(device), B.to(device)
        return self._drawn[device]

    def __deepcopy__(self, memo: dict[int, Any]) -> Projection:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_drawn": {}}


@register_variant("vera")
class VeRA(LoRALayer):
    """The mixin, for linear kinds: shared frozen factors, and two vectors that train.

    Attributes:
        lora_lambda_d: d, (r,).
        lora_lambda_b: b, (out,).
        lora_projection: the A and B of all layers.
    """

    options: ClassVar[dict[str, Option]] = {
        "projection_seed": Option(0, lambda value: type(value) is int and 0 <= value < 2**63, "a whole number ≥ 0, below 2⁶³"),
        "d_initial": Option(0.1, lambda value: type(value) in (int, float) and -_MAX <= value <= _MAX, "a finite number such as 0.1"),
    }
    peft_fields: ClassVar[dict[str, Any]] = {"peft_type": "VERA"}
    peft_shared: ClassVar[tuple[str, ...]] = ("vera_A", "vera_B")

    lora_lambda_d: nn.Parameter
    lora_lambda_b: nn.Parameter
    lora_projection: Projection

    # Shapes, and what the layers share.

    @classmethod
    def parameter_shapes(cls, module: Any, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Return the shapes of d, (r,), and b, (out,)."""
        return {"lora_lambda_d": (spec.rank,), "lora_lambda_b": cls.adapter_shapes(module, spec)[1][:1]}

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        """Raise ValueError also where the formula does not apply.

        The kind must be linear, all layers must have the same rank, and alpha, scaling and init must be the defaults.
        """
        super().check(module, spec)
        if not cls.is_linear:
            raise ValueError("variant='vera' shares its A and B among linear layers only; exclude it")
        A, B = cls.adapter_shapes(module, spec)
        if (A[0], B[1]) != (spec.config.rank, spec.config.rank):
            raise ValueError(f"variant='vera' has one A and B of rank={spec.config.rank} for all layers; leave rank_pattern out")
        if spec.alpha != _DEFAULT.alpha:
            raise ValueError(f"alpha={spec.alpha:g} and variant='vera', whose formula has no scaling; leave alpha out")
        for name in ("scaling", "init"):
            value = getattr(spec.config, name)
            if value != getattr(_DEFAULT, name):
                raise ValueError(f"{name}={value!r} and variant='vera', which defines its own start and uses no scaling; leave {name} out")

    @classmethod
    def projection_for(cls, layers: Sequence[tuple[Any, LayerSpec]]) -> Projection:
        """Return the A and B that these layers share."""
        shapes = [cls.adapter_shapes(module, spec) for module, spec in layers]
        spec = layers[0][1]
        return Projection(spec.options["projection_seed"], spec.rank, max(A[1] for A, _ in shapes), max(B[0] for _, B in shapes))

    @classmethod
    def finish(cls, layers: dict[str, LoRALayer]) -> None:
        """Make all layers share one projection."""
        shared = cls.projection_for([(layer, layer.spec) for layer in layers.values()])
        for layer in layers.values():
            assert isinstance(layer, VeRA)
            layer.lora_projection = shared

    def init_adapter(self, spec: LayerSpec) -> None:
        """Add the adapter as every variant does. The layer has its own projection until :meth:`finish`."""
        self.lora_projection = self.projection_for([(self, spec)])
        A, B = self.adapter_shapes(self, spec)
        self.lora_widths = A[1], B[0]
        super().init_adapter(spec)

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Reset d to ``d_initial`` and b to zero."""
        nn.init.constant_(self.lora_lambda_d, float(self.spec.options["d_initial"]))
        nn.init.zeros_(self.lora_lambda_b)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALayer:
        super()._apply(fn, recurse)
        self.lora_projection.on(self.lora_lambda_d.device)  # draw it now, not while a compiler traces the forward pass
        return self

    # The formula.

    @property
    def scaling(self) -> float:
        """1: the formula has no scaling."""
        return 1.0

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        """This layer's part of the shared A, (r, in), in the dtype of d."""
        return self._projected()[0]

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]
        """This layer's part of the shared B, (out, r), in the dtype of d."""
        return self._projected()[1]

    def lora_factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Return d, and b, which starts at zero."""
        return self.lora_lambda_d, self.lora_lambda_b

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``Λd·A`` and ``Λb·B``."""
        A, B = self._projected()
        return A * self.lora_lambda_d.unsqueeze(-1), B * self.lora_lambda_b.unsqueeze(-1)

    def _projected(self) -> tuple[Tensor, Tensor]:
        d, (wide, tall) = self.lora_lambda_d, self.lora_widths
        A, B = self.lora_projection.on(d.device)
        A, B = A[:, :wide].to(d.dtype), B[:tall].to(d.dtype)
        if not is_sharded(d):
            return A, B
        from torch.distributed.tensor import distribute_tensor

        places = [self.adapter_placements(placement) for placement in self.weight.placements]
        A, B = (
            distribute_tensor(factor, self.weight.device_mesh, [place[name] for place in places], src_data_rank=None)
            for name, factor in (("lora_A", A), ("lora_B", B))
        )
        return A, B

    @classmethod
    def adapter_placements(cls, placement: Any) -> dict[str, Any]:
        """Return the kind's placements of A and B; d is replicated, b is placed as B's rows."""
        from torch.distributed.tensor import Replicate

        placements = super().adapter_placements(placement)
        return placements | {"lora_lambda_d": Replicate(), "lora_lambda_b": placements["lora_B"]}

    # Files.

    def to_peft(self) -> dict[str, Tensor]:
        """Return the two vectors under PEFT's names."""
        return {"vera_lambda_d": self.lora_lambda_d, "vera_lambda_b": self.lora_lambda_b}

    @classmethod
    def take_shared(cls, layers: Sequence[tuple[Any, LayerSpec]], tensors: dict[str, Tensor]) -> None:
        """Remove PEFT's ``vera_A`` and ``vera_B`` (``save_projection=True``) from a file's tensors.

        Raises:
            ValueError: they differ from what the seed gives here.
        """
        for name, mine in zip(cls.peft_shared, cls.projection_for(layers).on(torch.device("cpu")), strict=True):
            theirs = tensors.pop(name, None)
            if theirs is not None and not torch.equal(mine.to(theirs.dtype), theirs.cpu()):
                raise ValueError(
                    f"{name} {tuple(theirs.shape)} is not what projection_seed={layers[0][1].options['projection_seed']} gives here,"
                    f" {tuple(mine.shape)}: the file is of a model with other widths, or another torch drew it"
                )

    @classmethod
    def to_peft_fields(cls, fields: dict[str, Any], config: LoRAConfig) -> dict[str, Any]:
        """Return ``VeraConfig``'s fields. PEFT draws the projection from the seed too."""
        options = LayerSpec(config, config.rank, config.alpha).options
        kept = ("task_type", "base_model_name_or_path", "inference_mode", "r", "target_modules", "modules_to_save", "fan_in_fan_out")
        return {
            **{name: fields[name] for name in kept},
            "peft_type": "VERA",
            "vera_dropout": fields["lora_dropout"],
            "bias": fields["bias"].replace("lora", "vera"),
            "projection_prng_key": options["projection_seed"],
            "d_initial": options["d_initial"],
            "save_projection": False,
            "init_weights": True,
        }

    @classmethod
    def from_peft_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Return ``VeraConfig``'s fields under the names of ``LoraConfig``, with the options."""
        rest = {name: value for name, value in fields.items() if name not in ("save_projection", "init_weights")}
        options = {"projection_seed": rest.pop("projection_prng_key", 0), "d_initial": rest.pop("d_initial", 0.1)}
        return {
            "r": 256,  # VeraConfig's own default
            "lora_dropout": rest.pop("vera_dropout", 0.0),
            **rest,
            "lora_alpha": _DEFAULT.alpha,
            "use_rslora": False,
            "bias": (rest.get("bias") or "none").replace("vera", "lora"),
            "variant_options": options,
        }
