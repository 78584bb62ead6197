"""What the unit tests share: a seed, one thread, tiny models, and how to compare a model's bits before and after."""

import gc
import logging
import os
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.layers import lora_layers
from tests import seed_no_gpus

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # has to be set before the kernels are imported
    seed_no_gpus()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a background job of a shell, where the tests of Ctrl-C would fail
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection() -> None:
    gc.disable()  # imports only add objects


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under xdist, which gives a worker whole files in this order: the longest first, so that the workers end together."""
    if hasattr(config, "workerinput"):
        tests = Counter(item.path for item in items)
        items.sort(key=lambda item: ("distributed" not in item.path.parts, -tests[item.path]))  # a distributed test is ten others


def pytest_collection_finish() -> None:
    """Leave what the imports made, a million objects, out of every collection of garbage."""
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.propagate = True  # pytest gives its handlers to each logger that does not, six times a test: 0.5 ms
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)  # 3 % of the time in place of 8 %


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # libraries say so at exit if what they made is still there


@pytest.fixture(scope="session", autouse=True)
def tokens_are_kept_apart(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps tokenized rows out of the user's own cache, in child processes too."""
    os.environ["LIGHTNING_LORA_CACHE"] = str(tmp_path_factory.mktemp("tokens"))


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
#: A config's fields that adapt seven layers of TinyModel, of two kinds.
ALL = {"target_modules": ["q_proj", "v_proj", "mlp", "embed"], "rank": 4}


class Attention(nn.Module):
    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(size, size, bias=bias)
        self.v_proj = nn.Linear(size, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x).tanh() * self.v_proj(x)


class Block(nn.Module):
    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.attn = Attention(size, bias)
        self.norm = nn.LayerNorm(size)
        self.mlp = nn.Linear(size, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(self.attn(x)))


class TinyModel(nn.Module):
    """Embedding, two blocks, a head; named like a small language model."""

    def __init__(self, vocab: int = 11, size: int = 8, tied: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, size)
        self.layers = nn.ModuleList(Block(size, bias) for _ in range(2))
        self.lm_head = nn.Linear(size, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.layers:
            x = block(x)
        return self.lm_head(x)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], tuple[Callable[..., Any], list[Any]]]:
    """Compiles a function as where the kernels serve, with torch operations in their place and one known dropout mask; and its graphs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, at this import, in some releases
        import torch._inductor.cudagraph_trees  # which the reset below imports
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    from lightning_lora.ops import backends, fused_linear, plain

    monkeypatch.setattr(backends, "worth_kernels", lambda x: True)
    monkeypatch.setattr(fused_linear, "_backend", lambda fast: plain)
    monkeypatch.setattr(plain, "draw_drop", lambda rows, p: (plain.Drop(torch.ones_like(rows, dtype=torch.bool).tril()), 0.5))
    torch._dynamo.reset()

    def compile(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[Any]]:
        graphs: list[Any] = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        return torch.compile(function, backend=aot_autograd(fw_compiler=backend, bw_compiler=backend), fullgraph=True), graphs

    return compile


class ConvNet(nn.Module):
    """A convolution with batch norm (a buffer that training moves) and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class Task(nn.Module):
    """What a LightningModule looks like to the functions that know no Lightning."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def configure_optimizers(self) -> None: ...

    def forward(self, *args: Tensor) -> Tensor:
        return self.model(*args)


def fill(model: nn.Module, seed: int = 1, std: float = 0.3) -> nn.Module:
    """Give every adapter random values in both factors, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            for parameter in layer.lora_parameters().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def adapted(model: nn.Module, seed: int = 1, **fields: object) -> nn.Module:
    """The model with LoRA of this config and a filled adapter."""
    return fill(apply_lora(model, config=LoRAConfig(**fields)), seed)  # type: ignore[arg-type]


def as_bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().contiguous().flatten().view(torch.uint8)


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything a failed call must leave alone: bits, gradient flags, classes, identities, modes, instance attributes."""
    return {
        "bits": {name: as_bits(tensor).tolist() for name, tensor in model.state_dict().items()},
        "parameters": {name: (id(p), p.dtype, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)},
        "modules": {name: (id(m), type(m), m.training, sorted(m.__dict__)) for name, m in model.named_modules(remove_duplicate=False)},
        "merged": {name: layer.merged for name, layer in lora_layers(model)},
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bits(a), as_bits(b))


def sums_agree(mine: Sequence[Tensor], expected: Sequence[Tensor], terms: int) -> None:
    """Compare what is computed in two orders of summation in one dtype, as different CPUs do, where float64 cannot be had.

    A sum of ``terms`` terms differs by at most about eps·√terms of its largest term; that much of the largest entry is allowed.
    """
    for a, b in zip(mine, expected, strict=True):
        atol = torch.finfo(b.dtype).eps * terms**0.5 * b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def base_bits(model: nn.Module) -> dict[str, list[int]]:
    """The state of the user's model by name, the adapters left out."""
    return {name: as_bits(tensor).tolist() for name, tensor in model.state_dict().items() if "lora_" not in name}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # Lightning leaves them, and processes started later would seed themselves anew
        os.environ.pop(name, None)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def make() -> Callable[..., nn.Module]:
    """Tiny models, equal in their weights at every call."""

    def build(cls: Callable[..., nn.Module] = TinyModel, **kwargs: object) -> nn.Module:
        torch.manual_seed(3)
        return cls(**kwargs)

    return build


@pytest.fixture
def ids() -> Tensor:
    return torch.tensor([[1, 2, 3], [4, 5, 10]])
