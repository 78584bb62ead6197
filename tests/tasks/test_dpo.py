"""DPO against the paper's formula, written out with a second copy of the model as the reference."""

import copy
import dataclasses
import gc
import json
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, get_lora_parameters, merge_lora
from lightning_lora.data import PreferenceDataModule
from lightning_lora.data.batching import Example, collate_answers
from lightning_lora.model.compile import compile_layers, uncompile_layers
from lightning_lora.tasks import DPOTask, base
from tests import tiny_lm
from tests.tasks.tiny import fill, trainer

CONFIG = LoRAConfig(rank=2, target_modules=["q_proj", "v_proj", "down_proj"])
CHOSEN = [([5, 6, 7], [8, 9, 3]), ([5, 6], [10, 3]), ([7, 8, 9, 10], [11, 12, 13, 3])]
REJECTED = [([5, 6, 7], [10, 3]), ([5, 6], [11, 12, 13, 14, 3]), ([7, 8, 9, 10], [8, 3])]


def example(prompt, answer):
    return Example(prompt + answer, [-100] * len(prompt) + answer)


@pytest.fixture
def batch():
    return collate_answers([example(*row) for row in CHOSEN + REJECTED], pad=0)


def adapted(monkeypatch, **options):
    """A task on an adapted model in float64, and a copy of its base."""
    model = tiny_lm.llama().double()
    reference = copy.deepcopy(model).eval()
    monkeypatch.setattr(base, "load_model", lambda *args: model)
    monkeypatch.setattr(base, "load_tokenizer", lambda *args: tiny_lm.tokenizer())
    task = DPOTask("any", **options)
    apply_lora(task.model, CONFIG)
    for p in get_lora_parameters(task.model):
        p.data = p.data.double()
    fill(task.model)
    logged = {}
    monkeypatch.setattr(task, "log", lambda name, value, **kwargs: logged.update({name: value.detach()}))
    monkeypatch.setattr(task, "log_dict", lambda values, **kwargs: logged.update(values))
    return task, reference, logged


def log_probs(model, rows):
    """log π(y|x) row by row, without padding, from all logits."""
    found = []
    for prompt, answer in rows:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        steps = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
        found.append(steps[range(len(answer)), answer].sum())
    return torch.stack(found)


def lengths(rows):
    return torch.tensor([len(answer) for _, answer in rows])


def written_out(model, reference, loss_type, beta, smoothing):
    better = log_probs(model, CHOSEN) - log_probs(reference, CHOSEN).detach()
    worse = log_probs(model, REJECTED) - log_probs(reference, REJECTED).detach()
    if loss_type == "ipo":
        better, worse = better / lengths(CHOSEN), worse / lengths(REJECTED)
    right, wrong = torch.sigmoid(beta * (better - worse)).log(), torch.sigmoid(beta * (worse - better)).log()
    losses = {
        "sigmoid": -(1 - smoothing) * right - smoothing * wrong,
        "robust": (-(1 - smoothing) * right + smoothing * wrong) / (1 - 2 * smoothing),
        "hinge": F.relu(1 - beta * (better - worse)),
        "ipo": (better - worse - 1 / (2 * beta)) ** 2,
    }
    return losses[loss_type].mean(), beta * better.detach(), beta * worse.detach()


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize(
    ("loss_type", "beta", "smoothing"),
    [("sigmoid", 0.1, 0.0), ("sigmoid", 0.5, 0.2), ("robust", 0.3, 0.1), ("hinge", 0.2, 0.0), ("ipo", 0.1, 0.0)],
)
def test_loss_gradients_and_rewards_are_the_papers(loss_type, beta, smoothing, chunked, batch, monkeypatch):
    task, reference, logged = adapted(monkeypatch, loss_type=loss_type, beta=beta, label_smoothing=smoothing)
    if not chunked:
        task._needs_logits = "the test asks for them"
    parameters = list(get_lora_parameters(task.model))
    loss = task.training_step(batch, 0)
    ours = torch.autograd.grad(loss, parameters)
    expected, better, worse = written_out(task.model, reference, loss_type, beta, smoothing)
    theirs = torch.autograd.grad(expected, parameters)

    assert loss.dtype == torch.float64 and all(gradient.any() for gradient in ours)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(logged["train_margin"], (better - worse).mean(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(logged["train_chosen_reward"], better.mean(), rtol=1e-10, atol=1e-12)
    assert logged["train_accuracy"] == (better > worse).double().mean()


def test_gradient_checkpointing_changes_no_gradient(batch, monkeypatch):
    """It computes the policy's activations once more, after the reference: with the adapters on."""
    gradients = []
    for on in (False, True):
        task, _, _ = adapted(monkeypatch, gradient_checkpointing=on, beta=0.5)
        gradients.append(torch.autograd.grad(task.training_step(batch, 0), list(get_lora_parameters(task.model))))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


def test_at_the_start_policy_and_reference_are_equal(batch, monkeypatch):
    task, _, logged = adapted(monkeypatch)
    for name, p in task.model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    loss = task.training_step(batch, 0)
    assert loss.item() == pytest.approx(0.6931471805599453, abs=1e-15) and logged["train_margin"] == 0
    assert any(p.grad is None for p in get_lora_parameters(task.model))
    loss.backward()
    assert all(p.grad.any() for name, p in task.model.named_parameters() if "lora_B" in name)


def storages():
    """The memory of all tensors that exist, whoever holds them, by address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            with suppress(RuntimeError):  # other tests may leave fake and sparse tensors, which have no storage
                found[thing.untyped_storage().data_ptr()] = thing.untyped_storage()
    return found


def test_one_base_is_in_memory(monkeypatch, batch):
    """Beside one base, a task and its steps hold adapters and their gradients."""
    before = storages()  # held, so that no address is used again
    task, reference, _ = adapted(monkeypatch)
    base = sum(p.nbytes for p in reference.parameters())
    del reference
    task.training_step(batch, 0).backward()
    made = sum(storage.nbytes() for address, storage in storages().items() if address not in before)
    adapters = 2 * sum(p.nbytes for p in get_lora_parameters(task.model))
    assert base <= made < base * 1.1 + adapters
    assert all(p.grad is None for p in task.parameters() if not p.requires_grad)


def test_dropout_of_the_base_is_off(monkeypatch):
    model = tiny_lm.llama()
    model.model.layers[0].mlp.dropout = torch.nn.Dropout(0.5)
    monkeypatch.setattr(base, "load_model", lambda *args: model)
    monkeypatch.setattr(base, "load_tokenizer", lambda *args: tiny_lm.tokenizer())
    assert DPOTask("any").model.model.layers[0].mlp.dropout.p == 0


def test_the_reference_has_no_dropout_and_the_policy_only_the_adapters(batch, monkeypatch):
    """Attention gives its rate to a function, and its class has no `nn.Dropout`."""
    model = tiny_lm.llama().double()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    exact = log_probs(copy.deepcopy(model).eval(), CHOSEN + REJECTED).detach()
    monkeypatch.setattr(base, "load_model", lambda *args: model)
    monkeypatch.setattr(base, "load_tokenizer", lambda *args: tiny_lm.tokenizer())
    task = DPOTask("any", beta=1.0)
    torch.testing.assert_close(task.train()._log_probs(batch, False).detach(), exact, rtol=1e-10, atol=0)  # no adapter yet
    apply_lora(task.model, dataclasses.replace(CONFIG, dropout=0.5))
    for p in get_lora_parameters(task.model):
        p.data = p.data.double()
    fill(task.model).train()
    policy, called = task._log_probs, []
    monkeypatch.setattr(task, "_log_probs", lambda *args, **options: called.append(policy(*args, **options)) or called[-1])
    for _ in range(2):
        task.rewards(batch)
    references, policies = called[2::2], called[3::2]  # after the two that are compared once
    torch.testing.assert_close(references, [exact, exact], rtol=1e-10, atol=0)
    assert not torch.equal(*policies) and all(module.training for module in task.model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "simpo"}, r"loss_type='simpo' is not known; it is one of sigmoid, hinge, ipo, robust"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5: give less than 0.5, and only for loss_type sigmoid or robust"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, r"label_smoothing=0.1: .*only for loss_type sigmoid or robust"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DPOTask("any", **options)


PAIRS = [
    {"prompt": f"which colour is {thing}", "chosen": good, "rejected": bad}
    for thing, good, bad in [("the sky", "blue", "red"), ("the grass", "green", "blue"), ("blood", "red", "green apple")] * 4
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def file(tmp_path):
    return tiny_lm.write(tmp_path / "pairs.jsonl", PAIRS)


def test_fit_learns_which_answer_is_better(folder, file):
    task = DPOTask(folder, learning_rate=1e-2, beta=0.5)
    fit = trainer(LoRACallback(CONFIG), max_epochs=6, num_sanity_val_steps=0)
    fit.fit(task, PreferenceDataModule(file, file, batch_size=4))
    found = {name: value.item() for name, value in fit.callback_metrics.items()}
    assert found["val_accuracy"] == 1 and found["val_margin"] > 1 and found["val_loss"] < 0.3
    assert found["val_margin"] == pytest.approx(found["val_chosen_reward"] - found["val_rejected_reward"], rel=1e-4)
    (tested,) = trainer(LoRACallback(CONFIG)).test(task, PreferenceDataModule(test=file, batch_size=5), verbose=False)  # unmerges
    assert tested["test_margin"] == pytest.approx(found["val_margin"], rel=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own doing
def test_compiled_blocks_give_the_same_losses(batch, monkeypatch):
    """The reference's blocks, with their adapters off, are compiled too."""
    expected = adapted(monkeypatch)[0].training_step(batch, 0)
    torch._dynamo.reset()
    task, counter = adapted(monkeypatch)[0], CompileCounter()
    compile_layers(task.model, backend=counter)
    loss = task.training_step(batch, 0)
    uncompile_layers(task.model)
    assert counter.frame_count > 1
    torch.testing.assert_close(loss, expected)


def test_prediction_answers_the_prompts(folder, file):
    rows = trainer().predict(DPOTask(folder, max_new_tokens=4), PreferenceDataModule(predict=file, batch_size=12))[0]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in PAIRS] and all(row["response"] for row in rows)
    json.dumps(rows)


def test_a_model_without_adapters_has_no_reference(folder, file):
    with pytest.raises(ValueError, match=r"DPOTask has no reference: .*add a LoRACallback, and leave full_finetuning out"):
        trainer(max_epochs=1).fit(DPOTask(folder), PreferenceDataModule(file))


def test_what_trains_beside_the_adapters_is_refused(folder, file):
    config = LoRAConfig(rank=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"'lm_head.weight' trains beside the adapters"):
        trainer(LoRACallback(config), max_epochs=1).fit(DPOTask(folder), PreferenceDataModule(file))


def test_merged_without_a_way_back_is_refused(folder, file):
    task = DPOTask(folder)
    fill(apply_lora(task.model, CONFIG))
    merge_lora(task.model)
    (tested,) = trainer().test(task, PreferenceDataModule(test=file), verbose=False)
    assert tested["test_margin"] != 0
