"""What adapters can be merged into: known for torch's own forwards, tried for others. Nothing of the layer or the session changes."""

import gc
import operator
import time
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioCausalConv1d
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextConfig
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.perceiver.modeling_perceiver import Conv2dSamePadding
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, LoRALinear, apply_lora, find_targets, merge_lora, unmerge_lora
from lightning_lora.layers import linearity
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.linearity import why_not_linear
from lightning_lora.layers.spec import LayerSpec
from tests.conftest import snapshot
from tests.layers.fused_qkv import LoRAFusedQKV


def linear(forward, base=nn.Linear, **attributes):
    """A class of layer with this forward."""
    return type("Layer", (base,), {"forward": forward, **attributes})


def product(self, x):
    return x @ self.weight.T + (0 if self.bias is None else self.bias)


def bitnet(**kwargs):
    with warnings.catch_warnings():  # its file decorates functions with torch.compile
        warnings.simplefilter("ignore")
        from transformers.integrations.bitnet import AutoBitLinear
    return AutoBitLinear(32, 16, bias=False, **kwargs)


LINEAR = {
    "no forward": lambda: type("Sub", (nn.Linear,), {})(4, 3),
    "falcon": lambda: linear(product)(4, 3),
    "by super": lambda: linear(lambda self, x: nn.Linear.forward(self, x))(4, 3, bias=False),
    "in bf16": lambda: linear(lambda self, x: F.linear(x.bfloat16(), self.weight.bfloat16()).to(x.dtype))(64, 32, bias=False),
    "another addend": lambda: linear(lambda self, x: product(self, x) + x.mean().sin())(4, 3),
    "large": lambda: linear(product)(2048, 1024, device="meta"),
    "large, its sizes counted on": lambda: linear(lambda self, x: product(self, x.view(-1, 2048)).view(2, 3, 1024))(2048, 1024),
    "gemma": lambda: Gemma3TextScaledWordEmbedding(20, 8, 0, embed_scale=3.0),
    "gemma, large": lambda: Gemma3TextScaledWordEmbedding(20000, 128, 19999, embed_scale=3.0),
    "conv": lambda: linear(lambda self, x: self._conv_forward(x, self.weight, self.bias), nn.Conv2d)(4, 6, 3, stride=2, groups=2),
    "meta": lambda: linear(product)(4, 3, device="meta"),
    "half": lambda: linear(product)(4, 3, dtype=torch.bfloat16),
    "an option unused": lambda: linear(lambda self, x, scale=1.0: product(self, x))(4, 3),
    "an addend given": lambda: linear(lambda self, x, residual=0.0: product(self, x) + residual)(4, 3),
    "random in training": lambda: linear(lambda self, x: product(self, x) + 0.1 * torch.randn(3).double() * self.training)(4, 3),
}
OTHER = {
    "scaled": lambda: linear(lambda self, x: 0.9 * product(self, x))(4, 3),
    "scaled in training": lambda: linear(lambda self, x: product(self, x) * (1 + self.training))(4, 3),
    "standardized": lambda: linear(lambda self, x: F.linear(x, self.weight - self.weight.mean()))(4, 3),
    "fake int8": lambda: linear(
        lambda self, x: F.linear(x, torch.fake_quantize_per_tensor_affine(self.weight.float(), 0.03, 0, -128, 127).double())
    )(64, 32),
    "normed": lambda: linear(lambda self, x: F.linear(F.layer_norm(x, x.shape[-1:]), self.weight))(4, 3),
    "activated": lambda: linear(lambda self, x: product(self, x).relu())(4, 3),
    "weight unused": lambda: linear(lambda self, x: x[..., :3].clone())(4, 3),
    "tuple": lambda: linear(lambda self, x: (product(self, x), x))(4, 3),
    "none": lambda: linear(lambda self, x: None)(4, 3),
    "another argument": lambda: linear(lambda self, x, y: product(self, x) + y)(4, 3),
    "scaled on demand": lambda: linear(lambda self, x, scale=1.0: product(self, x) * scale)(4, 3),
    "gated on demand": lambda: linear(lambda self, x, *, gate=None: product(self, x) if gate is None else product(self, x) * gate)(4, 3),
    "rows masked": lambda: linear(lambda self, x, mask=None: product(self, x) if mask is None else product(self, x) * mask[..., None])(
        4, 3
    ),
    "input masked": lambda: linear(lambda self, x, mask=None: product(self, x if mask is None else x.masked_fill(mask, 0)))(4, 3),
    "picked by an index": lambda: linear(lambda self, x, task=0: product(self, x) * (1, 2)[task])(4, 3),
    "an option of another type": lambda: linear(lambda self, x, cache=None: product(self, x) if cache is None else cache.put(x))(4, 3),
    "grouped": lambda: linear(lambda self, x: F.linear(x.unflatten(-1, (2, 4)), self.weight).flatten(-2))(4, 3),
    "padded": lambda: linear(lambda self, x: F.conv1d(F.pad(x, (1, 1)), self.weight), nn.Conv1d)(4, 3, 3, bias=False),
    "its product changed": lambda: type("Sub", (nn.Conv1d,), {"_conv_forward": lambda self, x, w, b: F.conv1d(x, w - w.mean(), b)})(
        4, 3, 3
    ),
    "shifted": lambda: linear(lambda self, ids: F.embedding((ids + 2) % 20, self.weight), nn.Embedding)(20, 8),
    "normed embedding": lambda: linear(lambda self, ids: F.layer_norm(F.embedding(ids, self.weight), (8,)), nn.Embedding)(20, 8),
    "large, standardized": lambda: linear(lambda self, x: F.linear(x, self.weight / self.weight.std()))(2048, 1024, device="meta"),
    "bitnet": lambda: bitnet(),
    "bitnet, quantizing": lambda: bitnet(online_quant=True),
    "bit": lambda: WeightStandardizedConv2d(8, 16, 3, padding=1),
    "perceiver": lambda: Conv2dSamePadding(8, 16, 3),
    "gemma 4": lambda: Gemma4AudioCausalConv1d(8, 16, 3),
    "opt": lambda: OPTLearnedPositionalEmbedding(20, 16),
    "deepseek": lambda: DeepseekV4GroupedLinear(8, 16, 4),
    "idefics": lambda: IdeficsDecoupledLinear(32, 16, 2, bias=False),
    "llama 4": lambda: Llama4Router(Llama4TextConfig(hidden_size=8, num_local_experts=4, num_experts_per_tok=1)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers(name):
    assert why_not_linear(LINEAR[name]()) is None


@pytest.mark.parametrize("name", OTHER)
def test_other_layers(name):
    module = OTHER[name]()
    reason = why_not_linear(module)
    assert reason is not None and reason.startswith("its forward does")
    assert why_not_linear(module) == reason
    with pytest.raises(ValueError, match=r"'l' .*its forward does.* Exclude it"):
        find_targets(nn.ModuleDict({"l": module}), LoRAConfig(target_modules=["l"], rank=2))


def test_what_is_merged_into_is_what_was_tried():
    """Refused ones would be merged wrongly; what passes is merged rightly."""
    x = torch.randn(2, 4, dtype=torch.float64)
    for forward, right in ((product, True), (lambda self, x: 0.9 * product(self, x), False)):
        layer = linear(forward)(4, 3, dtype=torch.float64)
        assert (why_not_linear(layer) is None) is right
        adapted = linearity.adapt(layer, LayerSpec(LoRAConfig(rank=2), 2, 4.0))
        nn.init.normal_(adapted.lora_B)
        y = adapted(x)
        adapted.merge_weights()
        assert torch.allclose(adapted(x), y, rtol=1e-12) is right


def test_an_attribute_that_changed_since_is_seen_by_a_merge():
    """The update beside the base is not scaled. As it was, the layer merges, adapted again too."""
    model = nn.Sequential(Setting(1.0, operator.mul))
    apply_lora(model, LoRAConfig(rank=2, target_modules=["0"]))
    unmerge_lora(merge_lora(model))
    model[0].how = 2.0
    with pytest.raises(ValueError, match=r"'0' cannot be merged: its forward does more than multiply by its weight, so merging"):
        merge_lora(model)
    assert not model[0].merged
    model[0].how = 1.0
    assert merge_lora(model)[0].merged


def test_all_linear_passes_over_them():
    model = nn.ModuleDict({"layers": nn.ModuleList([OTHER["llama 4"](), nn.Linear(4, 4)]), "head": OTHER["scaled"]()})
    with pytest.warns(UserWarning, match="leaves out 66% of the model"):
        report = find_targets(model, LoRAConfig(target_modules="all-linear", rank=2))
    assert [target.fqn for target in report.targets] == ["layers.1"]
    assert report.passed_over.keys() == {"layers.0", "head"}
    assert "passed over: layers.* (1): its forward does not take or return what nn.Linear's does (ValueError: it returns a tuple)" in str(
        report
    )


def test_from_linear_refuses_them():
    with pytest.raises(ValueError, match=r"Layer.*its forward does more than multiply by its weight"):
        LoRALinear.from_linear(OTHER["scaled"]())


class Setting(nn.Linear):
    """Its forward depends on ``how``, by ``use``."""

    def __init__(self, how, use):
        super().__init__(4, 3)
        self.use, self.how = use, nn.Buffer(how) if isinstance(how, torch.Tensor) else how

    def forward(self, x):
        return self.use(self.how, product(self, x))


def recursive(scale):
    def function(y, again=True):
        return function(y, False) if again else y * scale

    return function


# Two values of one attribute, and how the forward uses it: with the first the layer is linear, with the second it is not.
WAYS = {
    "a switch": (False, True, lambda how, y: y.relu() if how else y),
    "a float": (1.0, 3.0, lambda how, y: y * how),
    "a whole number": (0, 2, lambda how, y: (y * how).round() / how if how else y),
    "nested": ({"a": ([1.0], {2})}, {"a": ([3.0], {2})}, lambda how, y: y * how["a"][0][0]),
    "a child": (nn.Identity(), nn.ReLU(), lambda how, y: how(y)),
    "a child's attribute": (nn.Threshold(-1e9, 0.0), nn.Threshold(0.1, 0.0), lambda how, y: how(y)),
    "a built-in": (torch.clone, torch.relu, lambda how, y: how(y)),
    "a function": (lambda y: y, F.relu, lambda how, y: how(y)),
    "a closure that refers to itself": (recursive(1), recursive(3), lambda how, y: how(y)),
    "a bound method": (nn.Identity().forward, nn.ReLU().forward, lambda how, y: how(y)),
    "an object": (SimpleNamespace(scale=1), SimpleNamespace(scale=3), lambda how, y: y * how.scale),
    "an object in a tuple": ((SimpleNamespace(scale=1),), (SimpleNamespace(scale=3),), lambda how, y: y * how[0].scale),
    "a mask": (torch.tensor([False] * 3), torch.tensor([True] * 3), lambda how, y: torch.where(how, y.relu(), y)),
    "zeros": (torch.zeros(3), torch.ones(3), lambda how, y: y + how.double() * y.square()),
}


@pytest.mark.parametrize("other_order", [False, True])
@pytest.mark.parametrize("name", WAYS)
def test_each_setting_of_a_class_has_its_own_verdict(name, other_order):
    *both, use = WAYS[name]
    cases = [(both[0], True), (both[1], False)]
    linearity._REASONS.clear()
    for how, linear in (cases[::-1] if other_order else cases) * 2:
        assert (why_not_linear(Setting(how, use)) is None) is linear


def test_layers_of_one_setting_are_tried_once(monkeypatch):
    tried = []
    original = linearity._tried
    monkeypatch.setattr(linearity, "_tried", lambda *args: tried.append(1) or original(*args))
    linearity._REASONS.clear()
    for _ in range(3):
        assert why_not_linear(Setting({"a": [1.0, torch.float16]}, lambda how, y: y)) is None
    assert len(tried) == 1


def test_a_kept_verdict_keeps_no_object_alive():
    owner = nn.Identity()
    gone = weakref.ref(owner)
    for how in ((owner,), owner.forward, owner.named_parameters, lambda: owner, torch.ones(2).add_):
        assert why_not_linear(Setting(how, lambda how, y: y)) is None
    owner = how = None
    gc.collect()
    assert gone() is None


def test_nothing_is_touched():
    seen = []

    def forward(self, x):
        self.steps += 1
        self.seen.append(1)
        self.count += torch.rand(()) + self.drop(x).sum()
        return product(self, x)

    layer = linear(forward)(4, 3)
    layer.register_buffer("count", torch.zeros(()))
    layer.steps, layer.seen, layer.drop = 0, [], nn.Dropout()
    for module in (layer, layer.drop):
        module.register_forward_hook(lambda *_: seen.append("hook"))
        module.register_forward_pre_hook(lambda *_: seen.append("pre-hook"))
    before, state = snapshot(layer), torch.get_rng_state()
    weight = layer.weight
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert why_not_linear(layer) is None
    assert snapshot(layer) == before and torch.equal(torch.get_rng_state(), state)
    assert layer.weight is weight and weight.dtype == torch.float32 and weight.grad is None
    assert (layer.steps, layer.seen, seen, layer.count.item(), layer.training, layer.drop.training) == (0, [], [], 0, True, True)


def test_under_a_meta_device():
    with torch.device("meta"):
        layer = linear(lambda self, x: product(self, x) + torch.zeros(3))(4, 3)
        assert why_not_linear(layer) is None


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(512, 512), lambda: Conv1D(8, 8), lambda: nn.Conv2d(4, 4, 3), lambda: nn.Embedding(9, 4)]
)
def test_plain_layers_are_not_tried(make, monkeypatch):
    monkeypatch.setattr(linearity, "_tried", lambda module: pytest.fail("it was"))
    layer = make()
    assert why_not_linear(layer) is None
    start = time.process_time()
    for _ in range(100):
        why_not_linear(layer)
    assert time.process_time() - start < 0.1


def test_an_adapted_layer_has_been_asked():
    layer = linear(product)(4, 3)
    model = apply_lora(nn.ModuleDict({"q_proj": layer}), LoRAConfig(rank=2, target_modules=["q_proj"]))
    assert why_not_linear(model["q_proj"]) is None
    apply_lora(model, LoRAConfig(rank=2, target_modules=["q_proj"]))


def test_a_named_kind_is_tried_as_what_it_is():
    assert issubclass(LoRAFusedQKV, LoRALinear)  # registers the kind
    scaled = linear(lambda self, x: 0.9 * product(self, x))(4, 6)
    assert why_not_linear(linear(product)(4, 6), "test_qkv") is None
    assert why_not_linear(scaled, "test_qkv").startswith("its forward does more than multiply by its weight")
    with pytest.raises(ValueError, match=r"'qkv' .*its forward does more.* Exclude it"):
        find_targets(nn.ModuleDict({"qkv": scaled}), LoRAConfig(target_modules=["qkv"], kind_pattern={"qkv": "test_qkv"}, rank=2))


def test_a_kind_that_does_not_say_what_a_forward_takes_is_not_tried(monkeypatch):
    layer = linear(lambda self, x: 0.9 * product(self, x))(4, 6)
    monkeypatch.setattr(LoRAFusedQKV, "example_input", LoRALayer.example_input)
    linearity._REASONS.clear()
    assert why_not_linear(layer, "test_qkv") is None
    linearity._REASONS.clear()
