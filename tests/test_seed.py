"""Every Python snippet of the document that this package implements runs as written, with only the import path changed.

The snippets stand here verbatim, each before the test that runs it with the names that its surroundings give it in the document
(`model`, `config`, `input`, `torch`, `nn`, `F`). The class of its walkthrough is put together from its three pieces and is the
reference that `LoRALinear` is compared with. Where the document's numbers are wrong, the right ones are asserted.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_lora
from lightning_lora import LoRAConfig, LoRALinear, apply_lora, get_lora_parameters, merge_lora

Q_AND_V = {f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")}


def run(snippet: str, **names: Any) -> dict[str, Any]:
    """Execute a snippet; what it can see is `names` and the imports that the document takes for granted."""
    namespace = {"torch": torch, "nn": nn, "F": F, **names}
    exec(snippet.replace("nexus.models.compression.peft", "lightning_lora"), namespace)
    return namespace


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()


def teach(model: nn.Module) -> nn.Module:
    """Adapters that do something, as after training."""
    with torch.no_grad():
        for parameter in get_lora_parameters(model):
            parameter.normal_(std=0.1)
    return model


def adapted_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def adapted() -> nn.Module:
    return teach(apply_lora(tiny_llama(), config=LoRAConfig(rank=8, alpha=16.0, target_modules=["q_proj", "v_proj"])))


@pytest.fixture
def input() -> torch.Tensor:
    return torch.arange(12).reshape(2, 6)


MODULE_REPLACEMENT = """\
from nexus.models.compression.peft import LoRALinear

# Original layer
original_layer = nn.Linear(768, 768)

# Replace with LoRA layer
lora_layer = LoRALinear.from_linear(
    original_layer,
    rank=8,
    alpha=16.0,
    dropout=0.1
)
"""


def test_module_replacement() -> None:
    names = run(MODULE_REPLACEMENT)
    original, layer = names["original_layer"], names["lora_layer"]
    assert type(original) is nn.Linear and original.weight.requires_grad, "the original layer is not touched"
    assert type(layer) is LoRALinear
    assert layer.lora_A.shape == (8, 768) and layer.lora_B.shape == (768, 8)
    assert layer.scaling == 2.0 and layer.lora_dropout.p == 0.1
    assert not layer.linear.weight.requires_grad
    x = torch.randn(3, 768)
    assert torch.equal(layer(x), original(x)), "it starts with the exact pre-trained behaviour, under dropout too"


APPLYING = """\
from nexus.models.compression.peft import apply_lora, LoRAConfig

config = LoRAConfig(
    rank=8,
    alpha=16.0,
    dropout=0.1,
    target_modules=['q_proj', 'v_proj'],
    bias='none'
)

model = apply_lora(model, config=config)
"""


def test_applying_to_entire_model(model: nn.Module, input: torch.Tensor) -> None:
    before = model(input).logits
    names = run(APPLYING, model=model)
    assert names["model"] is model
    assert adapted_names(model) == Q_AND_V
    assert torch.equal(model(input).logits, before)
    assert {layer.lora_dropout.p for layer in model.modules() if isinstance(layer, LoRALinear)} == {0.1}
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"{name}.{part}" for name in Q_AND_V for part in ("lora_A", "lora_B")}


FREEZING = """\
# Count trainable parameters
trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
total = sum(p.numel() for p in model.parameters())

print(f"Trainable: {trainable:,} / {total:,} ({100*trainable/total:.2f}%)")
"""


def test_parameter_freezing(adapted: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(FREEZING, model=adapted)
    base = sum(p.numel() for p in tiny_llama().parameters())
    assert names["trainable"] == 4 * 8 * (32 + 32)  # four adapted layers of (d + k)·r
    assert names["total"] == base + names["trainable"]
    assert capsys.readouterr().out == f"Trainable: 2,048 / {base + 2048:,} ({100 * 2048 / (base + 2048):.2f}%)\n"


MERGING = """\
from nexus.models.compression.peft import merge_lora

# Merge adapters into weights
model = merge_lora(model)

# Now forward pass has no LoRA overhead
output = model(input)
"""


def test_merging_for_inference(adapted: nn.Module, input: torch.Tensor) -> None:
    unmerged = adapted(input).logits
    names = run(MERGING, model=adapted, input=input)
    assert names["model"] is adapted
    assert (unmerged - tiny_llama()(input).logits).abs().max() > 1e-2, "the adapter does something"
    torch.testing.assert_close(names["output"].logits, unmerged, rtol=1e-5, atol=1e-5)
    teach(adapted)  # with no overhead the adapter is not read any more …
    assert torch.equal(adapted(input).logits, names["output"].logits)
    assert adapted.state_dict().keys() == tiny_llama().state_dict().keys(), "… and the architecture is a fully fine-tuned model's"


WALKTHROUGH_CLASS = """\
class LoRALinear(NexusModule):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        bias: bool = True,
    ):
        # Frozen base layer
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.linear.weight.requires_grad = False

        # Trainable low-rank matrices
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))

        # Scaling
        self.scaling = alpha / rank

        # Dropout on adapter path
        self.lora_dropout = nn.Dropout(p=dropout)
"""

WALKTHROUGH_FORWARD = """\
def forward(self, x: torch.Tensor) -> torch.Tensor:
    # Base output (frozen)
    base_output = self.linear(x)

    # LoRA adapter path
    lora_input = self.lora_dropout(x)
    lora_output = F.linear(
        F.linear(lora_input, self.lora_A),
        self.lora_B
    )

    # Combine with scaling
    return base_output + lora_output * self.scaling
"""

WALKTHROUGH_MERGE = """\
def merge_weights(self) -> None:
    with torch.no_grad():
        # Compute ΔW = (α/r) * B @ A
        delta_w = (self.lora_B @ self.lora_A) * self.scaling

        # Add to frozen weight
        self.linear.weight.data += delta_w

    self.merged = True
"""


class NexusModule(nn.Module):
    """The document's base class, whose `__init__` its subclass does not call."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "NexusModule":
        module = super().__new__(cls)
        nn.Module.__init__(module)
        return module


def document_class() -> type[nn.Module]:
    """The walkthrough's class with the forward and merge_weights that follow it."""
    cls = run(WALKTHROUGH_CLASS, NexusModule=NexusModule)["LoRALinear"]
    cls.forward = run(WALKTHROUGH_FORWARD)["forward"]
    cls.merge_weights = run(WALKTHROUGH_MERGE)["merge_weights"]
    return cls


def pair(dropout: float = 0.0, bias: bool = True) -> tuple[LoRALinear, Any]:
    """Ours and the document's, with the same weights and an adapter that does something."""
    ours = teach(LoRALinear(12, 20, rank=4, alpha=10.0, dropout=dropout, bias=bias))
    theirs = document_class()(12, 20, rank=4, alpha=10.0, dropout=dropout, bias=bias)
    theirs.linear.load_state_dict(ours.linear.state_dict())
    with torch.no_grad():
        theirs.lora_A.copy_(ours.lora_A)
        theirs.lora_B.copy_(ours.lora_B)
    return ours, theirs


@pytest.mark.parametrize("bias", [True, False])
def test_walkthrough_constructor(bias: bool) -> None:
    arguments = {"in_features": 12, "out_features": 20, "bias": bias}
    ours, theirs = LoRALinear(**arguments), document_class()(**arguments)
    for layer in (ours, theirs):
        assert layer.lora_A.shape == (8, 12) and layer.lora_B.shape == (20, 8)
        assert layer.lora_A.requires_grad and layer.lora_B.requires_grad
        assert not layer.linear.weight.requires_grad
        assert layer.linear.weight.shape == (20, 12) and (layer.linear.bias is None) is not bias
        assert not layer.lora_B.any()
        assert layer.scaling == 2.0
        assert type(layer.lora_dropout) is nn.Dropout and layer.lora_dropout.p == 0.0
    assert type(ours.linear) is nn.Linear


@pytest.mark.parametrize("bias", [True, False])
def test_walkthrough_forward(bias: bool) -> None:
    """Output and both gradients, the document's forward on its own class and on our layer."""
    ours, theirs = pair(bias=bias)
    x = torch.randn(5, 12)
    forward = run(WALKTHROUGH_FORWARD)["forward"]
    torch.testing.assert_close(forward(ours, x), ours(x))
    torch.testing.assert_close(theirs(x), ours(x))
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours.lora_A.grad, theirs.lora_A.grad)
    torch.testing.assert_close(ours.lora_B.grad, theirs.lora_B.grad)


def test_walkthrough_forward_drops_the_adapters_input_only() -> None:
    """With p = 1/2 every output is the base's plus twice some of the inputs' shares, in the document's forward and in ours."""
    ours, _ = pair(dropout=0.5)
    x = torch.zeros(2000, 12)
    x[:, 3] = 1.0  # one input: it is there, doubled, or not
    base, share = ours.linear(x[0]), ours.lora_delta()[:, 3]
    for y in (ours(x), run(WALKTHROUGH_FORWARD)["forward"](ours, x)):
        kept = (y - base).abs().amax(1) > 1e-6
        assert 0.45 < kept.float().mean() < 0.55
        torch.testing.assert_close(y[kept], (base + 2 * share).expand(int(kept.sum()), 20))


def test_walkthrough_merge() -> None:
    """`merge_weights` of the document on our layer leaves it as our own does: same weight, merged, adapter no longer applied."""
    ours, theirs = pair()
    document = copy.deepcopy(ours)
    x = torch.randn(5, 12)
    expected = ours(x)
    run(WALKTHROUGH_MERGE)["merge_weights"](document)
    ours.merge_weights()
    theirs.merge_weights()
    assert document.merged and ours.merged
    torch.testing.assert_close(document.weight, ours.weight)
    torch.testing.assert_close(theirs.linear.weight, ours.linear.weight)
    torch.testing.assert_close(document(x), expected)
    torch.testing.assert_close(ours(x), expected)


DROPOUT = """\
config = LoRAConfig(
    rank=8,
    alpha=16.0,
    dropout=0.1  # 10% dropout on adapter inputs
)
"""


def test_dropout_for_regularization(model: nn.Module) -> None:
    config = run(DROPOUT, LoRAConfig=LoRAConfig)["config"]
    assert (config.rank, config.alpha, config.dropout) == (8, 16.0, 0.1)
    assert adapted_names(apply_lora(model, config=config)) == Q_AND_V, "query and value are the default"


LEARNING_RATES = """\
# Separate learning rates for base model and LoRA
from nexus.models.compression.peft import get_lora_parameters

lora_params = get_lora_parameters(model)
base_params = [p for p in model.parameters() if p not in lora_params]

optimizer = torch.optim.AdamW([
    {'params': base_params, 'lr': 1e-5},  # If training base at all
    {'params': lora_params, 'lr': 1e-3}   # 100× higher for adapters
])
"""


def test_learning_rate_adjustment(adapted: nn.Module, input: torch.Tensor) -> None:
    optimizer = run(LEARNING_RATES, model=adapted)["optimizer"]
    base, lora = optimizer.param_groups
    names = {id(p): name for name, p in adapted.named_parameters()}
    assert {names[id(p)] for p in lora["params"]} == {f"{name}.{part}" for name in Q_AND_V for part in ("lora_A", "lora_B")}
    assert {names[id(p)] for p in base["params"]} == tiny_llama().state_dict().keys()
    assert (base["lr"], lora["lr"]) == (1e-5, 1e-3)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    adapted(input_ids=input, labels=input).loss.backward()
    optimizer.step()
    assert {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])} == {names[id(p)] for p in lora["params"]}


CHECKPOINTING = """\
model.gradient_checkpointing_enable()
model = apply_lora(model, config=config)
"""


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # transformers renamed it
def test_gradient_checkpointing(model: LlamaForCausalLM, adapted: nn.Module, input: torch.Tensor) -> None:
    config = LoRAConfig(target_modules=["q_proj", "v_proj"])
    checkpointed = run(CHECKPOINTING, model=model, config=config, apply_lora=apply_lora)["model"]
    assert checkpointed.is_gradient_checkpointing
    checkpointed.load_state_dict(adapted.state_dict())
    for m in (checkpointed, adapted):
        m.train()
        m(input_ids=input, labels=input).loss.backward()
    for ours, plain in zip(get_lora_parameters(checkpointed), get_lora_parameters(adapted), strict=True):
        assert ours.grad is not None and ours.grad.any()
        torch.testing.assert_close(ours.grad, plain.grad)


DIAGNOSIS_FROZEN = """\
# Check if base model is frozen
for name, param in model.named_parameters():
    if 'lora' not in name and param.requires_grad:
        print(f"WARNING: {name} is trainable but shouldn't be!")
"""


def test_diagnosis_of_a_base_that_is_not_frozen(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    run(DIAGNOSIS_FROZEN, model=model)
    assert capsys.readouterr().out.count("WARNING") == len(list(model.parameters())), "before: everything trains"
    run(DIAGNOSIS_FROZEN, model=apply_lora(model, config=LoRAConfig()))
    assert capsys.readouterr().out == ""


DIAGNOSIS_MATCHED = """\
# Check what was matched
for name, module in model.named_modules():
    if isinstance(module, LoRALinear):
        print(f"LoRA applied to: {name}")
"""


def test_diagnosis_of_what_was_matched(adapted: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    run(DIAGNOSIS_MATCHED, model=adapted, LoRALinear=LoRALinear)
    assert set(capsys.readouterr().out.splitlines()) == {f"LoRA applied to: {name}" for name in Q_AND_V}


REGEX = """\
target_modules=['.*q_proj', '.*v_proj']  # Matches any q_proj, v_proj
"""


def test_regex_targets(model: nn.Module) -> None:
    targets = run(REGEX)["target_modules"]
    assert adapted_names(apply_lora(model, config=LoRAConfig(target_modules=targets))) == Q_AND_V


# What the document says in numbers; three of them are wrong there and right here.


@pytest.mark.parametrize(("rank", "parameters"), [(1, 8_192), (4, 32_768), (8, 65_536), (16, 131_072), (64, 524_288)])
def test_parameters_of_a_4096_by_4096_layer(rank: int, parameters: int) -> None:
    layer = LoRALinear(4096, 4096, rank=rank, bias=False, device="meta")
    assert sum(p.numel() for p in layer.lora_parameters().values()) == parameters
    assert layer.linear.weight.numel() == 16_777_216
    assert layer.linear.weight.numel() / parameters == 256 * 8 / rank


def test_initialisation() -> None:
    """A is uniform in ±1/√k, not ±√(5/k) as the document has it: `kaiming_uniform_` takes √5 as a slope. B is zero."""
    k = 4096
    A, B = LoRALinear(k, 8, rank=16).lora_parameters().values()
    assert not B.any()
    assert 0.999 / k**0.5 < A.abs().max() <= 1 / k**0.5 == 0.015625
    assert abs(A.std() * (3 * k) ** 0.5 - 1) < 0.02  # a uniform on ±b has the standard deviation b/√3
    reference = nn.Linear(k, 2000)  # starts the same way
    assert abs(A.std() / reference.weight.std() - 1) < 0.02


@pytest.mark.parametrize(
    ("rank", "targets", "parameters"),
    [
        (8, ["q_proj", "v_proj"], 4_194_304),
        (16, ["q_proj", "k_proj", "v_proj", "o_proj"], 16_777_216),  # the document's 33.5M is twice that
    ],
)
def test_parameters_of_llama_7b(rank: int, targets: list[str], parameters: int) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **sizes))
    apply_lora(model, config=LoRAConfig(rank=rank, target_modules=targets))
    adapters = get_lora_parameters(model)
    assert sum(p.numel() for p in adapters) == parameters
    assert sum(p.nbytes for p in adapters) == 4 * parameters  # in fp32: 16.8 MB for the first
    assert sum(p.numel() for p in model.parameters()) - parameters == 6_738_415_616


@pytest.mark.parametrize(("alpha", "rank", "scaling"), [(8, 8, 1.0), (16, 8, 2.0), (32, 8, 4.0)])
def test_scaling(alpha: float, rank: int, scaling: float) -> None:
    """α = r is no scaling, α = 2r twice the update."""
    layer = teach(LoRALinear(6, 5, rank=rank, alpha=alpha))
    assert layer.scaling == scaling
    x = torch.randn(2, 6)
    torch.testing.assert_close(layer(x), layer.linear(x) + scaling * (x @ layer.lora_A.T @ layer.lora_B.T))


def test_every_name_of_the_document_is_public() -> None:
    assert {"LoRALinear", "LoRAConfig", "apply_lora", "merge_lora", "get_lora_parameters"} <= set(lightning_lora.__all__)
    assert merge_lora is lightning_lora.merge_lora
