"""Batches without padding: the same losses, metrics and gradients as padded ones, or padded ones where the model would mix their rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.data import InstructionDataModule, PreferenceDataModule
from lightning_lora.model.compile import compile_layers
from lightning_lora.tasks import CausalLMTask, DPOTask
from lightning_lora.tasks.packed_attention import NAME
from lightning_lora.tasks.packing_check import MixesDocuments, settle_attention
from lightning_lora.tasks.padding import end_to_end
from tests import tiny_lm
from tests.tasks.packing_models import model
from tests.tasks.tiny import trainer

pytestmark = pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
PAIRS = [
    {"prompt": f"which colour is {thing}", "chosen": good, "rejected": bad}
    for thing, good, bad in [("the sky", "blue sky", "red"), ("the grass", "green", "blue"), ("a pear is the sky", "red", "green apple")]
    * 2
]


class Seen(L.Callback):
    """Notes losses, gradients, and the shapes of what the model and what callbacks get."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.computed: list[tuple[int, ...]] = []
        self.batches: list[tuple[int, ...]] = []

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        module.model.get_input_embeddings().register_forward_hook(lambda layer, args, output: self.computed.append(tuple(args[0].shape)))

    def on_before_optimizer_step(self, trainer: Any, module: nn.Module, optimizer: Any) -> None:
        self.losses.append(trainer.callback_metrics["train_loss"].item())
        self.gradients.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(tuple(batch["input_ids"].shape))


def fit(task: L.LightningModule, data: L.LightningDataModule, **lora: Any) -> tuple[Seen, dict[str, float]]:
    """One epoch with validation; return what was seen and the metrics."""
    seen = Seen()
    callback = LoRACallback(LoRAConfig(rank=2, target_modules=["q_proj", "v_proj"]), merge_on_fit_end=False, **lora)
    run = trainer(callback, seen, max_epochs=1, num_sanity_val_steps=0, limit_train_batches=2)
    run.fit(task, data)
    return seen, {name: value.item() for name, value in run.callback_metrics.items()}


def task_of(folder: str, network: Any = None, cls: type = CausalLMTask, **options: Any) -> Any:
    L.seed_everything(0)
    task = cls(folder, learning_rate=1e-2, **options)
    task.model = task.model if network is None else network
    return task


def test_the_tokens_stand_one_behind_the_other() -> None:
    rows = end_to_end(MASK)
    assert rows is not None and rows["index"].tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 10]
    assert rows["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0]]
    assert rows["cu_seq_lens_q"].tolist() == [0, 3, 8, 9] and rows["cu_seq_lens_q"].dtype == torch.int32
    assert rows["cu_seq_lens_k"] is rows["cu_seq_lens_q"] and rows["max_length_q"] == rows["max_length_k"] == 5


def test_little_padding_stays() -> None:
    assert end_to_end(MASK, 0.4) is not None and end_to_end(MASK, 0.41) is None
    assert end_to_end(torch.ones(3, 4, dtype=torch.long)) is None


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"padding_free": True, "attn_implementation": "eager"}])
def test_losses_gradients_and_metrics_are_those_of_padded_batches(options: dict[str, Any], folder: str, file: str) -> None:
    """Accuracy too, whose rows with choices are found by the order of their answers."""
    data = {"train": file, "val": file, "batch_size": 5}
    padded, expected = fit(task_of(folder, **{**options, "padding_free": False}), InstructionDataModule(**data))  # type: ignore[arg-type]
    free, found = fit(task_of(folder, **options), InstructionDataModule(**data))  # type: ignore[arg-type]
    assert free.losses == pytest.approx(padded.losses, rel=1e-5) and found == pytest.approx(expected, rel=1e-4)
    assert {"val_loss", "val_perplexity", "val_accuracy"} <= found.keys()
    for ours, theirs in zip(free.gradients, padded.gradients, strict=True):
        limit = 1e-5 * max(gradient.abs().max().item() for gradient in theirs.values())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=max(limit, 1e-7))
    assert all(rows == 1 for rows, _ in free.computed[-4:]) and all(rows == 5 for rows, _ in padded.computed)
    assert free.batches == padded.batches and all(rows == 5 for rows, _ in free.batches)  # what callbacks count stays


def test_flops_are_those_of_the_tokens(folder: str, file: str) -> None:
    counts = []
    for padding_free in (True, False):
        task = task_of(folder, padding_free=padding_free)
        fit(task, InstructionDataModule(file, batch_size=10))
        counts.append(task.flops_per_batch)
    lengths = InstructionDataModule(file)
    lengths._tokenizer = tiny_lm.tokenizer()
    tokens = lengths.load("train").lengths
    head = task._per_position.step[task.model.get_output_embeddings()]
    answers = sum(len(example.answer) for example in lengths.load("train"))
    rest = [count - head * answers for count in counts]
    assert rest[0] / rest[1] == pytest.approx(sum(tokens) / (10 * max(tokens)))


def test_preference_pairs_too(folder: str, tmp_path: Path) -> None:
    file = tiny_lm.write(tmp_path / "pairs.jsonl", PAIRS)
    runs = []
    for options in ({"padding_free": False}, {}):
        runs.append(fit(task_of(folder, cls=DPOTask, **options), PreferenceDataModule(file, file, batch_size=3)))
    (padded, expected), (free, found) = runs
    assert free.losses == pytest.approx(padded.losses, rel=1e-5) and found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    torch.testing.assert_close(free.gradients, padded.gradients, rtol=1e-3, atol=1e-6)
    assert any(rows == 1 for rows, _ in free.computed[3:]) and all(rows == 6 for rows, _ in padded.computed)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Lfm2", f"with attention '{NAME}' a document's hidden states change by"),
        ("Bloom", "its forward takes no position_ids"),
        ("Gemma2", "its attention 'eager' makes a mask"),
    ],
)
def test_a_model_that_would_mix_rows_gets_them_padded(
    name: str, reason: str, folder: str, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By default, and the log says so once. Asked for, it is refused where rows would be mixed."""
    caplog.set_level("INFO")
    config = {"target_modules": ["query_key_value" if name == "Bloom" else "out_proj" if name == "Lfm2" else "q_proj"]}
    runs = []
    for padding_free in ("auto", False):
        seen, task = Seen(), task_of(folder, model(name, torch.float32), padding_free=padding_free)
        callback = LoRACallback(LoRAConfig(rank=2, **config), merge_on_fit_end=False)  # type: ignore[arg-type]
        trainer(callback, seen, max_epochs=1, num_sanity_val_steps=0).fit(task, InstructionDataModule(file, val=file, batch_size=5))
        runs.append(seen)
    assert runs[0].losses == runs[1].losses and all(rows == 5 for rows, _ in runs[1].computed)
    said = [record.message for record in caplog.records if "keep their padding" in record.message]
    assert len(said) == 1 and f"Batches keep their padding: {name}ForCausalLM does not keep packed documents apart: {reason}" in said[0]
    if name == "Gemma2":
        return
    with pytest.raises(MixesDocuments, match=r"data.packing or model.padding_free is on, but .*Set it to false\."):
        task = task_of(folder, model(name, torch.float32), padding_free=True)
        callback = LoRACallback(LoRAConfig(rank=2, **config))  # type: ignore[arg-type]
        trainer(callback, max_epochs=1, num_sanity_val_steps=0).fit(task, InstructionDataModule(file, batch_size=5))


def test_masks_keep_their_padding(folder: str, file: str) -> None:
    """One over all tokens of a batch would cost more than the padding."""
    seen, _ = fit(task_of(folder, attn_implementation="sdpa"), InstructionDataModule(file, batch_size=5))
    assert all(rows == 5 for rows, _ in seen.computed[-2:])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_keep_their_padding(folder: str, file: str) -> None:
    """Every number of tokens would be compiled anew."""
    task = task_of(folder)
    compile_layers(task.model, backend=CompileCounter())
    seen, _ = fit(task, InstructionDataModule(file, batch_size=5))
    assert all(rows == 5 for rows, _ in seen.computed) and task.model.config._attn_implementation == "sdpa"


def test_without_a_trainer_a_batch_is_computed_as_it_is(folder: str, file: str) -> None:
    data, task = InstructionDataModule(file, batch_size=5), CausalLMTask(folder)
    data._tokenizer = task.tokenizer
    data.examples["train"] = data.load("train")
    batch = data.collate([data.examples["train"][i] for i in range(5)], "train")  # type: ignore[index]
    assert math.isfinite(task.answer_loss(batch).item()) and task.model.config._attn_implementation == "sdpa"


def test_on_a_gpu_it_is_asked_for(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was not timed there."""
    batch = {"attention_mask": MASK, "labels": MASK}
    for device, setting, expected in (("cuda", "auto", False), ("cuda", True, True), ("cpu", "auto", True), ("cpu", False, False)):
        task = CausalLMTask(folder, padding_free=setting)
        monkeypatch.setattr(type(task), "device", property(lambda self, device=device: torch.device(device)))
        assert ("rows" in task.note_padding(batch)) == expected


def test_a_mask_may_be_left_out_of_the_choice() -> None:
    network = model("Gemma2", torch.float32)
    assert "attention 'eager'" in settle_attention(network, 24, 24, torch.device("cpu"), fixed=False)
    with pytest.raises(MixesDocuments, match="its attention 'eager' makes a mask"):
        settle_attention(network, 24, 24, torch.device("cpu"), fixed=False, masks=False)
