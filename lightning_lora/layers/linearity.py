"""Check that merging a layer's adapter keeps its effect: known for torch's own forwards, tested once for any other.

A kind adds its update to the base's output. A merge adds it to the weight. Both give the same if the forward is the plain product with the
weight. A subclass may do more: standardise or quantize its weight, scale its output, pad or normalise its input, return a tuple. So an
adapter is tested, merged and unmerged, on a small copy of the layer with random weights, on the CPU, in float64. The layer itself is
neither run nor changed, and the user's random generators keep their state. What the forward takes besides the input, such as a scale or a
mask, is tested with values of several types. A variant that merges more than a sum, such as a factor on the output, is tested too: it may
be wrong where a plain adapter is right, in a forward that adds something of its own to the product.

A verdict is kept for layers that are equal in everything that a forward may depend on besides its weights (:func:`_setting`).
"""

from __future__ import annotations

import enum
import inspect
import math
import sys
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import BuiltinFunctionType, FunctionType, ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.adapting import adapt, refusal, shallow_copy, unadapt
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.classes import adapted_class
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.ops.frozen_weight import WEIGHT_READERS
from lightning_lora.quantization.formats import QUANTIZED_FORMATS, format_of
from lightning_lora.registry import KINDS, qualified_name
from lightning_lora.utils.checksums import checksum

_TOLERANCE = 5e-3  # relative to the update's effect: a forward that computes in bf16 stays below, one that rounds to 8 bits does not
_LARGE, _TOO_LARGE = 2**20, 2**24  # elements: above the first, a smaller copy is tested before the full one; above the second instead of it
_CHANGES = {"_conv_forward", "__call__", "__getattr__", "weight"}  # what torch's own forwards depend on
_FAILS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TORCHS = vars(nn.Module()).keys()  # attributes that every module has: containers, hooks, the mode
_CONSTANTS = (
    NoneType, bool, int, float, complex, str, bytes, enum.Enum, type, torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_REASONS: dict[Hashable, str | None] = {}  # kind, variant and setting → verdict
_PLAIN = LoRAConfig().variant


def why_not_linear(module: nn.Module, kind: str | None = None, variant: str = _PLAIN) -> str | None:
    """Return why an adapter on this layer could not be merged; None if it could.

    The test runs once per class and setting, or each time if the layer has an attribute that is no plain value.

    Args:
        module: a layer that a kind adapts, on any device, meta included. An adapted layer was tested before, so None is returned.
        kind: name of its kind, if its type does not determine it.
        variant: the adapter's.
    """
    if isinstance(module, LoRALayer) or _is_known(type(module)) or format_of(module) is not None:
        return None
    reason = _verdict(module, kind, _PLAIN)
    if reason is not None or not _merges_more(module, kind, variant) or _verdict(module, kind, variant) is None:
        return reason
    return (
        f"its forward adds something of its own, and variant={variant!r} merges more than a sum with the weight, so merging would change"
        f" what an adapter does; variant={_PLAIN!r} would be right there"
    )


def why_no_longer_linear(layer: LoRALayer) -> str | None:
    """Return :func:`why_not_linear` of an adapted layer as it is now: attributes may have changed since, such as ``self.scale``."""
    if layer.spec.rows or _is_known(type(layer).lora_base):  # rows are replaced, whatever the forward does with them
        return None
    return why_not_linear(unadapt(shallow_copy(layer)), layer.spec.kind, layer.lora_config.variant)


def _merges_more(module: nn.Module, kind: str | None, variant: str) -> bool:
    """Return True if a merge of this variant does more than add to the weights. A layer that never merges needs no test."""
    plain, own = (adapted_class(type(module), each, kind) for each in (_PLAIN, variant))
    if plain is None or own is None or own.never_merges(module):
        return False
    return any(getattr(own, name) is not getattr(plain, name) for name in ("merge_scale", "merged_beside"))


def _verdict(module: nn.Module, kind: str | None, variant: str) -> str | None:
    try:
        key = (kind, variant, _setting(module))
    except (ValueError, RecursionError):
        return _tried(module, kind, variant)
    if key not in _REASONS:
        _REASONS[key] = _tried(module, kind, variant)
    return _REASONS[key]


def _setting(module: nn.Module) -> Hashable:
    """Return all that a forward may depend on, children included, except the values of parameters: a test draws these at random."""
    own = tuple((name, _content(value)) for name, value in vars(module).items() if name not in _TORCHS)
    parameters = tuple((name, None if p is None else p.shape) for name, p in module._parameters.items())
    children = tuple((name, None if child is None else _setting(child)) for name, child in module._modules.items())
    return type(module), own, parameters, _content(module._buffers), children


def _content(value: Any) -> Hashable:
    """Return something that is equal for values with equal content.

    It refers to no object that users made, since such a reference would keep a model alive.

    Raises:
        ValueError: the value is of another type than constants, containers, tensors and functions.
    """
    if isinstance(value, _CONSTANTS) or (
        isinstance(value, BuiltinFunctionType) and isinstance(value.__self__, (type, ModuleType, NoneType))
    ):
        return type(value), value
    if isinstance(value, dict):
        return type(value), tuple((_content(key), _content(each)) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_content, value))
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(map(_content, value))
    if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_quantized:
        return value.shape, value.dtype, "meta" if value.is_meta else checksum(value) if value.numel() else ""
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__module__, value.__code__, _content([cells, value.__defaults__, value.__kwdefaults__])
    raise ValueError(f"{type(value)} has no content that can be compared")


def _is_known(cls: type[nn.Module]) -> bool:
    """Return True if a kind was made for this forward, and no subclass changed what the forward depends on."""
    for base in cls.__mro__:
        if any(qualified_name(base) in known for known in (KINDS, WEIGHT_READERS, QUANTIZED_FORMATS)):
            return True
        if "forward" in vars(base) or _CHANGES & vars(base).keys():
            return False
    return False


def _tried(module: nn.Module, kind_name: str | None, variant: str) -> str | None:
    kind: Any = adapted_class(type(module), variant, kind_name)
    shapes = [module._parameters[name].shape for name in kind.adapted]  # type: ignore[union-attr]
    size = sum(map(math.prod, shapes))
    reason = None
    with _alone():
        if size > _LARGE:
            longest = dict.fromkeys(length for shape in shapes for length in shape if length > 64)
            reason = _difference(module, kind_name, variant, dict(zip(longest, (64, 48, 32, 16, 8), strict=False)))
        if size <= _LARGE or (reason and size <= _TOO_LARGE):
            reason = _difference(module, kind_name, variant, {})
    return reason


@contextmanager
def _alone() -> Iterator[None]:
    """Switch off gradients, autocast and default devices. Restore the state of the random generator at the end."""
    state = torch.get_rng_state()
    try:
        with ExitStack() as stack:
            for context in (torch.device("cpu"), torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False)):
                stack.enter_context(context)
            if "torch._dynamo" in sys.modules:  # some forwards call compiled functions. Importing dynamo here would take seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        torch.set_rng_state(state)


def _difference(module: nn.Module, kind: str | None, variant: str, lengths: dict[int, int]) -> str | None:
    """Return what is wrong with an adapter on a copy of the layer; ``lengths`` maps dimensions' lengths to those of the copy."""
    generator = torch.Generator().manual_seed(0)
    rank = 2 * getattr(module, "groups", 1)
    try:
        base = _copy(module, lengths, generator)
        spec = LayerSpec(LoRAConfig(rank=rank, alpha=rank, variant=variant), rank, float(rank), kind=kind)
        if variant != _PLAIN and refusal(base, spec) is not None:  # said where the layer is targeted
            return None
        layer = adapt(shallow_copy(base), spec)
        x = type(layer).example_input(base, generator)
        if x is None:
            return None
        for factor in layer.lora_parameters().values():
            factor.normal_(generator=generator)
        merged = shallow_copy(base)
        for name, single in layer.by_weight().items():
            merged._parameters[name] = nn.Parameter(single.weight + single.lora_delta())
        for name in layer.base_parameters().keys() - layer.adapted:
            if (beside := layer.merged_beside(name)) is not None:
                merged._parameters[name] = nn.Parameter(beside)
        for mode in (False, True):
            trio = [each.train(mode) for each in (base, layer, merged)]
            y = _output(base, x)
            if not _agree(trio, x):
                return "its forward does more than multiply by its weight, so merging would change what an adapter does"
            for name in _options(type(module)):
                taken = [value for value in _values(x, y, generator) if _takes(base, x, name, value)]
                if not taken:
                    return f"its forward does not say what {name!r} may be, so whether that changes its product could not be tried"
                if not all(_agree(trio, x, **{name: value}) for value in taken):
                    return f"its forward does more than multiply by its weight where it gets {name!r}, so merging would change the adapter"
    except _FAILS as error:
        first = (str(error).splitlines() or [""])[0][:120]
        return f"its forward does not take or return what {_expected(type(module))} does ({type(error).__name__}: {first})"
    return None


def _expected(cls: type) -> str:
    """Return the name of the base class that a kind was made for, as a possessive."""
    return next((f"nn.{base.__name__}'s" for base in cls.__mro__ if qualified_name(base) in KINDS), "its kind's")


def _agree(trio: Sequence[Any], x: Tensor, **options: Any) -> bool:
    """Return whether an adapter has the same effect beside a base as merged into it. ``trio``: the base, it with an adapter, it merged."""
    before, alone, together = (_output(each, x, **options) for each in trio)
    effect = (together - before).norm()
    return bool((alone - together).norm() <= _TOLERANCE * effect and effect > 0)


def _options(cls: type) -> list[str]:
    """Return the names of what a forward takes besides its input, where torch's forward of that kind takes nothing else."""
    known: Any = next((base for base in cls.__mro__ if qualified_name(base) in KINDS), nn.Module)
    theirs = inspect.signature(known.forward).parameters
    mine = inspect.signature(cls.forward).parameters  # type: ignore[attr-defined]
    named = [name for name, each in mine.items() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    return [name for name in named[2:] if name not in theirs]


def _values(x: Tensor, y: Tensor, generator: torch.Generator) -> list[Any]:
    """Return values of the types that a forward may take: a number, an index, and gates and masks of inputs, outputs or rows."""
    shapes = dict.fromkeys([(), x.shape[:-1], (*x.shape[:-1], 1), x.shape, y.shape])
    gates = [0.5 + torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [2.0, 1, *gates, *(gate > 1 for gate in gates if gate.ndim)]


def _takes(base: Any, x: Tensor, name: str, value: Any) -> bool:
    try:
        _output(base, x, **{name: value})
    except _FAILS:
        return False
    return True


def _output(layer: Any, x: Tensor, **options: Any) -> Tensor:
    """Return the output of the forward itself, without hooks. The fixed seed makes random parts equal in every call."""
    torch.default_generator.manual_seed(0)
    y = layer.forward(x, **options)
    if not isinstance(y, Tensor):
        raise ValueError(f"it returns a {type(y).__name__}")
    return y.double()


def _copy(module: nn.Module, lengths: dict[int, int], generator: torch.Generator) -> Any:
    """Return an independent copy of a layer and its children in float64, with random parameters, and buffers near the layer's own."""
    new = shallow_copy(module)
    for name in _HOOKS:
        new.__dict__[name] = OrderedDict()
    for name, value in new.__dict__.items():
        if isinstance(value, (list, set)):
            new.__dict__[name] = value.copy()
        elif type(value) is int:
            new.__dict__[name] = lengths.get(value, value)
        elif type(value) is tuple:
            new.__dict__[name] = tuple(lengths.get(each, each) if type(each) is int else each for each in value)
        elif isinstance(value, Tensor):
            new.__dict__[name] = _cut(value, lengths, generator)
    if lengths and getattr(new, "padding_idx", None) is not None:
        new.padding_idx = min(new.padding_idx, min(lengths.values()) - 1)
    for name, parameter in new._parameters.items():
        if parameter is not None:
            shape = [lengths.get(length, length) for length in parameter.shape]
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            value = value / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 1 + value / 10
            new._parameters[name] = nn.Parameter(value)
    new._buffers.update({name: None if buffer is None else _cut(buffer, lengths, generator) for name, buffer in new._buffers.items()})
    new._modules.update({name: None if child is None else _copy(child, lengths, generator) for name, child in new._modules.items()})
    return new


def _cut(tensor: Tensor, lengths: dict[int, int], generator: torch.Generator) -> Tensor:
    """Return a copy on the CPU with long dimensions cut. Floats become float64, slightly scaled. A meta tensor gives ones."""
    value = torch.ones(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.detach().to("cpu", copy=True)
    for dim, length in enumerate(value.shape):
        value = value.narrow(dim, 0, lengths.get(length, length))
    # Scales are often 1 before weights are loaded. A forward that multiplies by them would then look plain.
    factors = 1.25 + torch.rand(value.shape, generator=generator, dtype=torch.float64) / 2
    return value.double() * factors if value.is_floating_point() else value
