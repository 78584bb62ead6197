"""A module that becomes adapted stays itself and comes back; what cannot be adapted says why; a twin is another module."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.layers.adapting import adapt, refusal, shallow_copy, unadapt
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.spec import LayerSpec
from tests.conftest import fill, snapshot
from tests.layers.kinds import CASES, every_kind


@every_kind
def test_the_module_stays_itself(kind):
    case = CASES[kind]
    module = case.base()
    cls, parameters, attributes = type(module), dict(module.named_parameters()), set(module.__dict__)
    layer = adapt(module, LayerSpec(LoRAConfig(), case.rank, 16.0))
    assert layer is module
    assert isinstance(layer, cls)
    assert isinstance(layer, LoRALayer)
    assert all(dict(layer.named_parameters())[name] is p for name, p in parameters.items())
    assert type(case.layer()) is type(layer)  # one class for all: compilers and guards see one type
    assert type(layer).lora_base is cls
    back = unadapt(layer)
    assert back is module
    assert type(back) is cls
    assert set(back.__dict__) == attributes
    assert list(back.state_dict()) == list(case.base().state_dict())


def test_a_class_that_fsdp2_put_on_top_stays_on_top():
    module = adapt(nn.Linear(4, 3), LayerSpec(LoRAConfig(), 2, 4.0))
    module.__class__ = type("FSDPLoRALinear", (type("FSDPModule", (), {"unshard": None}), type(module)), {"wrapped": True})
    for _ in range(2):
        back = unadapt(module)
        assert back.wrapped and hasattr(back, "unshard") and isinstance(back, nn.Linear) and not isinstance(back, LoRALayer)
        assert isinstance(adapt(back, LayerSpec(LoRAConfig(), 2, 4.0)), LoRALayer) and hasattr(back, "unshard")


@every_kind
def test_hooks_survive_in_both_directions(kind):
    case = CASES[kind]
    module, seen = case.base(), []
    module.register_forward_pre_hook(lambda *_: seen.append("pre"))
    module.register_forward_hook(lambda m, args, out: seen.append("post") or out + 1)
    handle = module.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer = fill(adapt(module, LayerSpec(LoRAConfig(rank=case.rank), case.rank, 16.0)))
    x = case.x()
    x.requires_grad_(x.is_floating_point())
    y = layer(x)
    torch.testing.assert_close(y, case.layer()(case.x()) + 1)
    if x.requires_grad:
        y.sum().backward()
    assert seen == ["pre", "post", "backward"][: 2 + x.requires_grad]
    handle.remove()
    unadapt(layer)
    seen.clear()
    layer(case.x())
    assert seen == ["pre", "post"]


SPEC = LayerSpec(LoRAConfig(), 2, 4.0, "layer")
STORED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.complex64)


class Packed(nn.Linear):
    """A linear without a weight parameter, as weight_norm or a quantized wrapper leaves it."""

    def __init__(self):
        super().__init__(3, 3)
        del self.weight
        self.weight = torch.zeros(3, 3)


def own_forward():
    module = nn.Linear(3, 3)
    module.forward = lambda x: x
    return module


def stored_as(weight):
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class Halved(torch.Tensor):
    """A tensor subclass with operations of its own: the numbers that it shows are not those that it holds."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    def __tensor_flatten__(self):
        return ["held"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].held)
        raise NotImplementedError(func)


class Named(nn.Parameter):
    """A subclass for its name alone: its numbers are plain ones."""


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        *(
            (lambda dtype=dtype: stored_as(torch.zeros(3, 3).to(dtype)), f"stores its weight as {dtype}, which is neither")
            for dtype in STORED
        ),
        (lambda: stored_as(Halved(torch.zeros(3, 3))), "stores its weight as tests.layers.test_adapting.Halved, which is neither"),
        (lambda: nn.LayerNorm(3), "which LoRA cannot adapt: supported are"),
        (own_forward, "has a forward of its own set on the instance, which would bypass the adapter"),
        (Packed, "computes its weight anew at each call"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "computes its weight anew at each call"),
        (lambda: nn.LazyLinear(3), "is lazy and has no shape yet; run one forward pass"),
        (lambda: nn.Embedding(3, 3, max_norm=1.0), "max_norm=1.0 changes the frozen weight in every forward pass"),
        (lambda: nn.Conv2d(3, 3, 1, groups=3), "rank=4 is not a multiple of groups=3"),
    ],
    ids=[*map(str, STORED), "subclass", "type", "instance-forward", "packed", "weight-norm", "lazy", "max-norm", "groups"],
)
def test_refusals_name_the_module_and_the_reason(build, reason):
    message = refusal(build(), LayerSpec(LoRAConfig(dropout=0.0), 4, 16.0, "blocks.0.layer"))
    assert message.startswith("'blocks.0.layer'")
    assert reason in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_plain_weights_are_known_by_their_dtype(dtype):
    assert refusal(stored_as(torch.zeros(3, 3, dtype=dtype)), SPEC) is None
    layer = nn.Linear(3, 3)
    layer.weight = Named(torch.zeros(3, 3, dtype=dtype))
    assert refusal(layer, SPEC) is None


@every_kind
def test_what_can_be_adapted_is_not_refused(kind):
    assert refusal(CASES[kind].base(), LayerSpec(LoRAConfig(dropout=0.1), CASES[kind].rank, 16.0, "layer")) is None


@every_kind
def test_a_twin_has_the_tensors_and_containers_of_its_own(kind):
    layer = CASES[kind].layer().eval()
    layer.register_forward_hook(lambda module, args, out: out)
    parameters, keys, x = dict(layer.named_parameters()), set(layer.__dict__), CASES[kind].x()
    y, hooks = layer(x), len(layer._forward_hooks)
    other = shallow_copy(layer)
    assert type(other) is type(layer)
    assert other is not layer
    assert all(dict(other.named_parameters())[name] is p for name, p in parameters.items())
    torch.testing.assert_close(other(x), y, rtol=0, atol=0)
    other.register_forward_hook(lambda module, args, out: None)
    unadapt(other)
    assert isinstance(layer, LoRALayer)
    assert dict(layer.named_parameters()) == parameters
    assert set(layer.__dict__) == keys
    assert len(layer._forward_hooks) == hooks
    torch.testing.assert_close(layer(x), y, rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["plain", "dora"])
@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.Linear(2, 1), r"\(4, 3\), but in_features, out_features say \(1, 2\)"),
        (nn.Embedding(2, 1), r"\(4, 3\), but num_embeddings, embedding_dim say \(2, 1\)"),
        (Conv1D(2, 1), r"\(4, 3\), but nx, nf say \(1, 2\)"),
        (nn.Conv1d(4, 2, 3, groups=2), r"\(3, 2, 3\), but in_channels, out_channels, kernel_size, groups say \(2, 2, 3\)"),
    ],
)
def test_a_weight_of_another_shape_than_the_module_says_is_refused(module, said, variant):
    """As structured pruning leaves it: the adapter's shapes are taken from the module's sizes."""
    shape = (3, 2, 3) if isinstance(module, nn.Conv1d) else (4, 3)
    module.weight = nn.Parameter(torch.randn(shape))
    model = nn.Sequential(module)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"'0' .* its weight has shape {said}, as after pruning: set them to the weight's"):
        apply_lora(model, config=LoRAConfig(rank=2, target_modules=["0"], variant=variant))
    assert snapshot(model) == before


def test_a_pruned_linear_whose_sizes_are_set_is_adapted():
    linear = nn.Linear(2, 1)
    linear.weight, linear.bias, linear.in_features, linear.out_features = nn.Parameter(torch.randn(4, 3)), None, 3, 4
    model = apply_lora(nn.Sequential(linear), config=LoRAConfig(rank=1, target_modules=["0"]))
    assert model(torch.randn(5, 3)).shape == (5, 4)
