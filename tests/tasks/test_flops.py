"""FLOPs against torch's own counter, which sees every product that is computed, and through Lightning's monitor."""

import pytest
import torch
import transformers as T
from lightning.pytorch.callbacks import ThroughputMonitor
from torch.utils.flop_counter import FlopCounterMode

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, disabled_lora, quantize_base
from lightning_lora.data import InstructionDataModule, PreferenceDataModule
from lightning_lora.tasks import CausalLMTask, DPOTask, Seq2SeqTask
from lightning_lora.tasks.flops import FlopsPerPosition, measured_positions
from tests import tiny_lm
from tests.tasks import tiny
from tests.tasks.tiny import trainer

TOKENS = 2 * 11
CONFIG = LoRAConfig(rank=2, target_modules=["q_proj", "v_proj"])


def counted(model, backward):
    """FLOPs of matrix products, without those of the attention scores."""
    model = model.train()
    ids = torch.randint(4, len(tiny_lm.WORDS), (2, 11))
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, use_cache=False).logits.sum()
        if backward:
            loss.backward()
    products = {torch.ops.aten.mm, torch.ops.aten.addmm}
    return sum(flops for operator, flops in counter.get_flop_counts()["Global"].items() if operator in products)


def test_full_training_is_six_flops_per_parameter_and_token():
    model = tiny_lm.llama()
    flops, parts = FlopsPerPosition(model), [(model, TOKENS)]
    assert flops.total(parts, training=False) == counted(model, False)
    # The first layer's inputs are embeddings, which train: their gradient is computed too.
    assert flops.total(parts, training=True) == counted(model, True)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    assert flops.total(parts, training=True) == 6 * matrices * TOKENS


def test_lora_spends_four_on_what_is_frozen_behind_the_first_adapter_and_six_on_adapters():
    model = tiny_lm.llama()
    base = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    in_first_layer = model.model.layers[0].self_attn.q_proj.weight.numel()
    apply_lora(model, CONFIG)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = FlopsPerPosition(model)
    expected = (4 * base - 2 * in_first_layer + 6 * adapters) * TOKENS
    assert flops.total([(model, TOKENS)], training=True) == expected
    assert flops.total([(model, TOKENS)], training=False) == 2 * (base + adapters) * TOKENS
    last = LoRAConfig(rank=2, target_modules=[r".*layers\.1\..*v_proj"])
    late = apply_lora(tiny_lm.llama(), last)
    first, second = (FlopsPerPosition(late).total([(layer, 1)], training=True) for layer in late.model.layers)
    assert first == 2 * base_of(late.model.layers[0]) < second


def base_of(module):
    return sum(p.numel() for name, p in module.named_parameters() if p.dim() == 2 and "lora" not in name)


def test_packed_weights_count_as_whole_ones():
    plain, packed = (FlopsPerPosition(apply_lora(model, CONFIG)) for model in (tiny_lm.llama(), quantize_base(tiny_lm.llama(), "nf4")))
    for one, other in zip(plain.step.values(), packed.step.values(), strict=True):
        assert one == other


def test_of_experts_those_that_are_chosen_count():
    sizes = {"vocab_size": 32, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2, **tiny.SIZES}
    torch.manual_seed(0)
    model = T.MixtralForCausalLM(T.MixtralConfig(**sizes))
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    others = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name)
    assert experts and FlopsPerPosition(model).total([(model, 1)], training=False) == 2 * (others + experts / 4)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_images_count_every_layer_at_its_own_positions(kind):
    model, pixels = tiny.KINDS[kind]().eval(), torch.randn(1, 3, 32, 32)
    positions = measured_positions(model, lambda: model(pixels))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixels)
    products = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution}
    expected = sum(flops for operator, flops in counter.get_flop_counts()["Global"].items() if operator in products)
    assert FlopsPerPosition(model).total(positions.items(), training=False) == expected > 0


def test_lightnings_monitor_shows_them(tmp_path, monkeypatch):
    folder = tiny_lm.save(tmp_path / "model")
    file = tiny_lm.write(tmp_path / "rows.jsonl", tiny_lm.rows(8))
    monitor = ThroughputMonitor(batch_size_fn=lambda batch: len(batch["labels"]), window_size=2)
    seen, rows = [], []
    monkeypatch.setattr(monitor, "_update", lambda trainer, module, batch, *a: (rows.append(batch), update(trainer, module, batch, *a)))
    update = type(monitor)._update.__get__(monitor)
    monkeypatch.setattr(monitor, "_compute", lambda *args: seen.append(monitor._throughputs[args[0].state.stage].compute()))
    fit = trainer(LoRACallback(CONFIG), monitor, max_epochs=1, limit_val_batches=0)
    task = CausalLMTask(folder, padding_free=False)
    fit.fit(task, InstructionDataModule(file, batch_size=2))
    assert len(seen) == 4 and seen[-1]["device/flops_per_sec"] > 0
    head, per = task.model.lm_head, FlopsPerPosition(apply_lora(tiny_lm.llama(), CONFIG))
    answers = sum((batch["labels"][:, 1:] != -100).sum().item() for batch in rows[-1:])
    step = sum(value for module, value in per.step.items())
    output = 4 * head.weight.numel()
    assert task.flops_per_batch == (step - output) * rows[-1]["input_ids"].numel() + output * answers


def test_dpo_counts_the_reference_too(tmp_path):
    folder = tiny_lm.save(tmp_path / "model")
    file = tiny_lm.write(tmp_path / "pairs.jsonl", [{"prompt": "the sky", "chosen": "blue", "rejected": "red"}] * 2)
    task, data = DPOTask(folder, padding_free=False), PreferenceDataModule(file, batch_size=2)
    trainer(LoRACallback(CONFIG, merge_on_fit_end=False), max_epochs=1, limit_val_batches=0).fit(task, data)
    batch, per = data.collate(list(data.examples["train"]), "train"), FlopsPerPosition(task.model)
    answers = (batch["labels"] != -100).sum().item()
    parts = [(task.model.model, batch["input_ids"].numel()), (task.model.lm_head, answers)]
    assert task.flops_per_batch == per.total(parts, training=True) + per.total(parts, training=False)


def test_encoder_and_decoder_count_their_own_lengths(tmp_path):
    task = Seq2SeqTask(tiny.save(tmp_path / "t5", "t5"))
    apply_lora(task.model, LoRAConfig(rank=2, target_modules=["q"]))
    task.setup("validate")
    for source, target in ((7, 7), (7, 14)):
        task._flops = 0.0
        ids, labels = torch.randint(4, 20, (2, source)), torch.randint(4, 20, (2, target))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        with torch.no_grad(), disabled_lora(task.model), FlopCounterMode(display=False) as counter:  # it cannot see into fused operators
            task(batch)
        products = {torch.ops.aten.mm, torch.ops.aten.addmm}
        expected = sum(flops for operator, flops in counter.get_flop_counts()["Global"].items() if operator in products)
        adapters = sum(
            2 * p.numel() * 2 * (source if "encoder" in name else target) for name, p in task.model.named_parameters() if "lora" in name
        )
        crossed = [m for name, m in task.model.named_modules() if ".EncDecAttention." in name and name[-2:] in (".k", ".v")]
        assert task.flops_per_batch == expected + adapters + 2 * 2 * (target - source) * sum(m.weight.numel() for m in crossed)
