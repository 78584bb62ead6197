"""Every Python snippet of the document that this package implements runs as written, with only the import path changed.

The snippets stand here verbatim, each before the test that runs it with the names that its surroundings give it in the document
(`model`, `config`, `input`, `torch`, `nn`, `F`). Its walkthrough is in test_seed_walkthrough.py, its numbers in test_seed_numbers.py.
"""

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from lightning_lora import LoRAConfig, LoRALinear, apply_lora, get_lora_parameters
from tests.document import run, teach, tiny_llama

Q_AND_V = {f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")}


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
