"""VeRA against PEFT: the same projection, the same training, and folders both ways."""

from pathlib import Path

import pytest
import torch
from peft import VeraConfig, get_peft_model

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, load_adapter, save_adapter
from lightning_lora.layers import lora_layers
from tests.conftest import fill
from tests.parity.models import DEPRECATED_BY_PEFT, base, batch, close, logits, read_by_peft

pytestmark = [
    pytest.mark.filterwarnings(DEPRECATED_BY_PEFT),
    # What save_projection=False means is a warning of PEFT's, and what files of ours are.
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A and vera_B:UserWarning"),
]
TARGETS = {"llama": ["q_proj", "up_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "bert": ["query", "output.dense"]}


def config(name: str) -> LoRAConfig:
    options = {"projection_seed": 5, "d_initial": 0.2}
    return LoRAConfig(rank=6, target_modules=TARGETS[name], variant="vera", variant_options=options, modules_to_save=[])


def theirs(name: str, **fields: object):
    options = {"projection_prng_key": 5, "d_initial": 0.2, "fan_in_fan_out": name == "gpt2", **fields}
    return get_peft_model(base(name), VeraConfig(r=6, target_modules=TARGETS[name], **options)).eval()


@pytest.mark.parametrize("name", TARGETS)
def test_it_trains_as_pefts_does(name: str) -> None:
    ours, other = fill(apply_lora(base(name), config(name))).double(), theirs(name).double()
    started = [parameter.detach().clone() for parameter in get_lora_parameters(ours)]
    with torch.no_grad():
        for fqn, layer in lora_layers(ours):
            for part, parameter in layer.lora_parameters().items():
                twin(other, fqn, part).copy_(parameter)
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in batch(name).items()}
    optimizers = [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3) for model in (ours, other)]
    for _ in range(3):
        for model, optimizer in zip((ours, other), optimizers, strict=True):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
    for fqn, layer in lora_layers(ours):
        for part, parameter in layer.lora_parameters().items():
            close(parameter, twin(other, fqn, part), 1e-6, f"{fqn}.{part}")  # models of transformers round to float32 inside
    assert max((now - before).abs().max() for now, before in zip(get_lora_parameters(ours), started, strict=True)) > 1e-3


def twin(model: torch.nn.Module, fqn: str, part: str) -> torch.nn.Parameter:
    return getattr(model.base_model.model.get_submodule(fqn), part.replace("lora", "vera"))["default"]


@pytest.mark.parametrize("name", TARGETS)
def test_peft_reads_ours(name: str, tmp_path: Path) -> None:
    model = fill(apply_lora(base(name), config(name)))
    read = read_by_peft(base(name), save_adapter(model, tmp_path / "adapter"))
    assert read.peft_config["default"].peft_type == "VERA"
    close(logits(read, name), logits(model, name))
    assert (logits(base(name), name) - logits(model, name)).abs().max() > 1e-2


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("name", TARGETS)
def test_ours_reads_pefts(name: str, save_projection: bool, tmp_path: Path) -> None:
    other = theirs(name, save_projection=save_projection, bias="vera_only")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    other.save_pretrained(tmp_path)
    read = load_adapter(base(name), tmp_path)
    close(logits(read, name), logits(other, name))
    layer = next(layer for _, layer in lora_layers(read))
    assert layer.lora_config.bias == "lora_only" and layer.spec.options == {"projection_seed": 5, "d_initial": 0.2}
    assert len(get_lora_parameters(read)) == 2 * len(list(lora_layers(read)))
    assert (logits(base(name), name) - logits(read, name)).abs().max() > 1e-3
