"""AdaLoRA against PEFT: the same update, the same scores, budgets and masks over a whole schedule, and files that PEFT reads."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, get_peft_model
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, merge_lora, save_adapter, shrink_adalora
from lightning_lora.layers import lora_layers
from lightning_lora.variants.rank_allocation import RankAllocator
from tests.conftest import TinyModel, fill
from tests.parity.models import DEPRECATED_BY_PEFT, base, batch, close, logits, read_by_peft

pytestmark = pytest.mark.filterwarnings(DEPRECATED_BY_PEFT)

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "resnet": ["convolution"], "t5": ["q", "wo"]}
PLAN = {"tinit": 2, "tfinal": 3, "deltaT": 2, "beta1": 0.8, "beta2": 0.7}
STEPS = 14


def twins(model, targets, rank=5, **peft):
    """A model in float64 under our AdaLoRA and under PEFT's, the same adapter in both."""
    model = model.double()
    ours = apply_lora(copy.deepcopy(model), LoRAConfig(rank=rank, alpha=8, target_modules=targets, variant="adalora", modules_to_save=[]))
    fields = {"init_r": rank, "target_r": 2, "lora_alpha": 8, "total_step": STEPS, "orth_reg_weight": 0.0}
    config = AdaLoraConfig(target_modules=targets, **fields, **PLAN, **peft)
    theirs = get_peft_model(model, config).eval()
    fill(ours)
    with torch.no_grad():
        for fqn, layer in lora_layers(ours):
            for part, mine in layer.lora_parameters().items():
                their(theirs, fqn, part).copy_(mine.view_as(their(theirs, fqn, part)))
    return ours, theirs


def their(model, fqn, part):
    return getattr(model.base_model.model.get_submodule(fqn), part)["default"]


@pytest.mark.parametrize("name", TARGETS)
def test_forward(name):
    ours, theirs = twins(base(name), TARGETS[name], fan_in_fan_out=name == "gpt2")
    with torch.no_grad():
        inputs = {key: x.double() if x.is_floating_point() else x for key, x in batch(name).items()}
        mine, reference = ours(**inputs).logits, theirs(**inputs).logits
    assert (mine - base(name).double()(**inputs).logits).abs().max() > 1e-3
    close(mine, reference, 1e-11)


def test_scores_budgets_and_masks_over_the_whole_schedule():
    """On a model that is float64 throughout: those of Hugging Face round to float32 inside, and Adam makes much of that.

    PEFT 0.21.2 leaves ``ranknum``, which its scaling divides by, to the optimizer; here it stays what its source calls it, not trainable.
    """
    torch.manual_seed(0)
    ours, theirs = twins(TinyModel(), ["q_proj", "v_proj", "mlp"])
    allocator = RankAllocator(ours, target_rank=2, total_steps=STEPS, **PLAN, orth_reg_weight=0.0)
    reference = theirs.base_model.rankallocator
    assert (allocator.start, allocator.target) == (reference.init_bgt, reference.target_bgt)
    for key, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in key)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.02, eps=1e-4) for m in (ours, theirs)]
    alive = []
    for step in range(1, STEPS + 1):
        ids = torch.randint(11, (6, 5), generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten()).backward()
            optimizer.step()
        allocator.after_step()
        theirs.base_model.update_and_allocate(step)
        assert allocator.budget(step) == reference.budget_schedule(step)[0]
        for key in reference.exp_avg_ipt:
            mine = key.removeprefix("base_model.model.").removesuffix(".default")
            close(allocator.sensitivity[mine], reference.exp_avg_ipt[key], 1e-13, key)
            close(allocator.uncertainty[mine], reference.exp_avg_unc[key], 1e-13, key)
        for fqn, layer in lora_layers(ours):
            for part, parameter in layer.lora_parameters().items():
                close(parameter, their(theirs, fqn, part), 1e-12, f"step {step} {fqn}.{part}")
            assert torch.equal(layer.lora_E == 0, their(theirs, fqn, "lora_E") == 0)
        alive.append(sum(int(layer.lora_E.count_nonzero()) for _, layer in lora_layers(ours)))
    pattern = theirs.peft_config["default"].rank_pattern
    assert {fqn: keep.tolist() for fqn, keep in allocator.keep.items()} == {
        key.removeprefix("base_model.model.").removesuffix(".lora_E.default"): keep for key, keep in pattern.items()
    }
    assert alive[: PLAN["tinit"]] == [allocator.start] * PLAN["tinit"] and alive[-3:] == [allocator.target] * 3
    assert len({int(keep.sum()) for keep in allocator.keep.values()}) > 1  # it did find different ranks


@pytest.mark.parametrize(
    ("name", "scaling", "when"),
    [
        ("llama", "standard", "as trained"),
        ("llama", "standard", "shrunk"),
        ("llama", "rslora", "merged"),
        ("gpt2", "rslora", "shrunk"),
        ("resnet", "standard", "shrunk"),
    ],
)
def test_peft_reads_what_is_left_as_plain_lora(name, scaling, when, tmp_path: Path):
    fields = {"rank": 5, "alpha": 7, "scaling": scaling, "variant": "adalora", "modules_to_save": []}
    model = fill(apply_lora(base(name), LoRAConfig(target_modules=TARGETS[name], **fields)))
    ranks = prune(model)
    expected = logits(model, name)
    if when == "shrunk":
        assert shrink_adalora(model) == ranks
        close(logits(model, name), expected, 1e-5)
    elif when == "merged":
        merge_lora(model)
    read = read_by_peft(base(name), save_adapter(model, tmp_path / "adapter"))
    assert read.peft_config["default"].peft_type == "LORA"
    found = {key: module.r["default"] for key, module in read.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert found == {fqn: max(rank, 1) for fqn, rank in ranks.items()}
    close(logits(read, name), expected, 1e-5)
    assert (logits(base(name), name) - expected).abs().max() > 1e-2


def prune(model: nn.Module) -> dict[str, int]:
    """Zero some of E, all of it in the first layer; what is left."""
    generator = torch.Generator().manual_seed(5)
    ranks = {}
    with torch.no_grad():
        for index, (fqn, layer) in enumerate(lora_layers(model)):
            gone = torch.rand(layer.lora_E.shape, generator=generator) < 0.5
            layer.lora_E.masked_fill_(gone | (index == 0), 0)
            ranks[fqn] = int(layer.lora_E.count_nonzero())
    return ranks
