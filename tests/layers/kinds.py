"""One module of every kind that can be adapted, with an input and the formula of its update in float64.

``CASES`` is the one list of bases: the tests of the kinds, and `make family` (kinds × variants), go through it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig
from lightning_lora.layers.adapting import adapt
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.spec import LayerSpec
from tests.conftest import DTYPES, fill


class OwnForward(nn.Linear):
    """A user's subclass with a forward, an argument and a state of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls, self.label = 0, None

    def forward(self, input, label=None):
        self.calls, self.label = self.calls + 1, label
        return F.linear(input, self.weight, self.bias)


class ScaledEmbedding(nn.Embedding):
    """As Gemma has it."""

    def __init__(self, *args, embed_scale, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(embed_scale), persistent=False)

    def forward(self, input):
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    definition: Callable[[LoRALayer, Tensor], Tensor]  # (layer in float64, input) → output, from the paper
    product: Callable[[LoRALayer, Tensor, Tensor], Tensor]  # (layer, A, B) → B·A in the weight's shape
    rank: int = 4
    out_axis: int = 0  # of the weight
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float64)  # what the base can be; the last is the exact one
    quantized: str | None = None  # how merge_lora is to merge into it
    fields: dict[str, object] = field(default_factory=dict)  # of the config, beside those that a test sets

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(7)
        return self.build().to(dtype)

    def layer(self, dtype: torch.dtype = torch.float32, filled: bool = True, **fields: object) -> LoRALayer:
        layer = adapt(self.base(dtype), LayerSpec(LoRAConfig(rank=self.rank, **fields), self.rank, float(fields.get("alpha", 16))))
        if filled:
            fill(layer)
        return layer

    def x(self, dtype: torch.dtype = torch.float32) -> Tensor:
        torch.manual_seed(8)
        x = self.input()
        return x.to(dtype) if x.is_floating_point() else x

    def apply(self, layer: LoRALayer, W: Tensor, x: Tensor) -> Tensor:
        """The base's forward with another weight, in the dtype of W."""
        if isinstance(layer, nn.Embedding):  # in the paper's terms; padding_idx stops gradients, which tests do by hand
            return F.one_hot(x, layer.num_embeddings).to(W.dtype) @ W * getattr(layer, "embed_scale", 1.0)
        bias = {} if layer.bias is None else {"bias": layer.bias}
        return torch.func.functional_call(self.base(W.dtype), {"weight": W, **bias}, x)


def plain_product(layer, A, B):
    return B @ A


def transposed_product(layer, A, B):
    return (B @ A).T


def kernel(layer, A, B):
    """Group by group, as two convolutions in a row compose."""
    parts = [b.flatten(1) @ a.flatten(1) for a, b in zip(A.chunk(layer.groups), B.chunk(layer.groups), strict=True)]
    return torch.cat(parts).view(layer.weight.shape)


def linear(layer, x):
    y = F.linear(x, layer.weight, layer.bias)
    return y + layer.scaling * (x @ layer.lora_A.T @ layer.lora_B.T)


def hf_conv1d(layer, x):
    return x @ layer.weight + layer.bias + layer.scaling * (x @ layer.lora_A.T @ layer.lora_B.T)


def embedding(layer, ids):
    one_hot = F.one_hot(ids, layer.num_embeddings).to(layer.weight.dtype)
    y = one_hot @ layer.weight + layer.scaling * (one_hot @ layer.lora_A.T @ layer.lora_B.T)
    return y * getattr(layer, "embed_scale", 1.0)


def convolution(layer, x):
    """A as a convolution of its own with the base's geometry, then B as a 1×1 one, group by group."""
    ndim, groups, out = len(layer.kernel_size), layer.groups, []
    cls, conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1], (F.conv1d, F.conv2d, F.conv3d)[ndim - 1]
    geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "padding_mode": layer.padding_mode}

    def base_geometry(x, kernel, bias=None):
        plain = cls(kernel.shape[1], len(kernel), layer.kernel_size, bias=bias is not None, dtype=x.dtype, **geometry)
        return torch.func.functional_call(plain, {"weight": kernel} | ({} if bias is None else {"bias": bias}), x)

    biases = [None] * groups if layer.bias is None else layer.bias.chunk(groups)
    adapters = [p.chunk(groups) for p in layer.lora_parameters().values()]
    parts = zip(x.chunk(groups, -ndim - 1), layer.weight.chunk(groups), biases, *adapters, strict=True)
    for x_g, W, b, A, B in parts:
        out.append(base_geometry(x_g, W, b) + layer.scaling * conv(base_geometry(x_g, A), B))
    return torch.cat(out, -ndim - 1)


def conv_case(dims: int, size: int, rank: int = 4, **kwargs: object) -> Case:
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return Case(lambda: cls(4, 6, **kwargs), lambda: torch.randn(2, 4, *(size,) * dims), convolution, kernel, rank)  # type: ignore[arg-type]


CASES = {
    "linear": Case(lambda: nn.Linear(12, 10), lambda: torch.randn(3, 5, 12), linear, plain_product),
    "linear-no-bias": Case(lambda: nn.Linear(12, 10, bias=False), lambda: torch.randn(5, 12), linear, plain_product),
    "linear-1d": Case(lambda: nn.Linear(12, 10), lambda: torch.randn(12), linear, plain_product),
    "linear-subclass": Case(lambda: OwnForward(12, 10), lambda: torch.randn(5, 12), linear, plain_product),
    "hf-conv1d": Case(lambda: Conv1D(10, 12), lambda: torch.randn(3, 5, 12), hf_conv1d, transposed_product, out_axis=1),
    "embedding": Case(lambda: nn.Embedding(11, 10), lambda: torch.randint(11, (3, 5)), embedding, transposed_product, out_axis=1),
    "embedding-padding": Case(
        lambda: nn.Embedding(11, 10, padding_idx=2),
        lambda: torch.tensor([[2, 1, 2], [0, 10, 2]]),
        embedding,
        transposed_product,
        out_axis=1,
    ),
    "embedding-scaled": Case(
        lambda: ScaledEmbedding(11, 10, embed_scale=4.0), lambda: torch.randint(11, (7,)), embedding, transposed_product, out_axis=1
    ),
    "conv1d": conv_case(1, 9, kernel_size=3, stride=2, padding=1),
    "conv2d": conv_case(2, 7, kernel_size=(3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
    "conv2d-groups": conv_case(2, 5, kernel_size=3, groups=2, padding="same", bias=False),
    "conv2d-circular": conv_case(2, 5, kernel_size=3, padding=1, padding_mode="circular"),
    "conv2d-reflect": conv_case(2, 6, kernel_size=3, padding=2, padding_mode="reflect", stride=2, groups=2),
    "conv3d": conv_case(3, 4, kernel_size=2, padding=1, dilation=2),
}

every_kind = pytest.mark.parametrize("kind", CASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
