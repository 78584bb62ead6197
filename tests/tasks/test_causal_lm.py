import math
from pathlib import Path

import lightning
import pytest
import torch
import transformers
from packaging.version import Version
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.data import InstructionDataModule
from lightning_lora.data.batching import collate_answers, collate_prompts
from lightning_lora.tasks import CausalLMTask, base, causal_lm, hf
from lightning_lora.tasks.causal_lm import chosen_right
from tests import tiny_lm
from tests.tiny_lm import load_examples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def examples(tmp_path):
    return load_examples(tiny_lm.write(tmp_path / "val.jsonl", tiny_lm.rows()), tiny_lm.tokenizer(), 64, "val")


def trainer(**kwargs):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(accelerator="cpu", **{**quiet, **kwargs})


class Whole(LlamaForCausalLM):
    """Defined where there is no `slice_logits_to_keep`, as in the models whose forward knows no ``logits_to_keep``."""

    def forward(self, *args, logits_to_keep=0, **kwargs):
        assert isinstance(logits_to_keep, int)
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "whole"])
def test_loss_and_gradients_equal_those_of_hugging_face(kind, examples, monkeypatch):
    if kind == "gpt2":
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=3, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        model = tiny_lm.llama(cls=Whole if kind == "whole" else LlamaForCausalLM)
    monkeypatch.setattr(base, "load_model", lambda *args: model)
    monkeypatch.setattr(base, "load_tokenizer", lambda *args: tiny_lm.tokenizer())
    task = CausalLMTask("any")
    seen = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: seen.append(output.shape[:-1].numel()))

    batch = collate_answers(examples, pad=0)
    monkeypatch.setattr(task, "log", lambda *args, **kwargs: None)
    loss = task.training_step(batch, 0)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    seen_by_head = seen.pop()
    reference = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss
    theirs = torch.autograd.grad(reference, list(model.parameters()))

    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(ours, theirs)
    answer_tokens = (batch["labels"] != -100).sum().item()
    # Earlier models of transformers take no mask of the logits to keep, so all are computed.
    masks = kind != "whole" and Version(transformers.__version__) >= Version("5.21")
    assert task.keeps_logits is masks and seen_by_head == (answer_tokens if masks else batch["labels"].numel())


HEADS = {  # the last asks for a second forward, once: only there is it seen that the model does something to its logits
    "frozen": (tiny_lm.llama, lambda model: model.requires_grad_(False), None),
    "bias": (lambda: small("GPTJ", rotary_dim=4), lambda model: model.requires_grad_(False), None),
    "trains": (tiny_lm.llama, lambda model: None, "its output layer trains"),
    "adapter": (tiny_lm.llama, lambda model: adapted(model, ["lm_head"]), "its output layer is a LoRALinear"),
    "rows": (tiny_lm.llama, lambda model: adapted(model, ["q_proj"], {"embed_tokens": [5, 3], "lm_head": [4, 2]}), None),
    "tied rows": (lambda: small("Llama", tie_word_embeddings=True), lambda model: adapted(model, ["q_proj"], [30, 4]), None),
    "capped": (lambda: small("Gemma2", final_logit_softcapping=0.5), lambda model: model.requires_grad_(False), "does something to"),
    "scaled": (lambda: small("Cohere", logit_scale=4.0), lambda model: model.requires_grad_(False), "does something to its logits"),
    "divided": (lambda: small("Granite", logits_scaling=8.0), lambda model: model.requires_grad_(False), "does something to its logits"),
}


def small(name, **kwargs):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    tokens = {"num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.3}
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes, **tokens, **kwargs))


def adapted(model, targets, rows=None):
    apply_lora(model, config=LoRAConfig(rank=2, target_modules=targets, trainable_token_indices=rows))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_rows"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("kind", HEADS)
def test_frozen_head_takes_the_loss_in_blocks_where_the_rule_allows(kind, keeps, examples, monkeypatch):
    make, change, reason = HEADS[kind]
    model, said, chunked = make(), [], []
    change(model)
    trained = model.get_input_embeddings().requires_grad_() if not any(p.requires_grad for p in model.parameters()) else model
    if trained is not model and model.get_output_embeddings().weight is trained.weight:  # tied: train something else
        trained = model.base_model.layers[0].requires_grad_()
        model.get_input_embeddings().requires_grad_(False)
    monkeypatch.setattr(base, "load_model", lambda *args: model)
    monkeypatch.setattr(base, "load_tokenizer", lambda *args: tiny_lm.tokenizer())
    monkeypatch.setattr(causal_lm, "rank_zero_info", said.append)
    chunk = causal_lm.chunked_cross_entropy
    monkeypatch.setattr(
        causal_lm, "chunked_cross_entropy", lambda *args, **kw: chunked.append(args[0].shape) or chunk(*args, chunk=7, **kw)
    )
    task, batch = CausalLMTask("any"), collate_answers(examples, pad=0)
    task.keeps_logits = task.keeps_logits and keeps
    monkeypatch.setattr(task, "log", lambda *args, **kwargs: None)
    calls = []
    model.base_model.register_forward_hook(lambda *args: calls.append(1))

    parameters = [p for p in trained.parameters() if p.requires_grad]
    reference = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss
    theirs = torch.autograd.grad(reference, parameters)
    for _ in range(2):
        loss = task.training_step(batch, 0)
        torch.testing.assert_close(loss, reference)
        torch.testing.assert_close(torch.autograd.grad(loss, parameters), theirs)
    answer_tokens = (batch["labels"] != -100).sum().item()
    changed = reason is not None and "does something" in reason
    assert chunked == [(answer_tokens, 32)] * (changed if reason else 2)
    assert len(calls) == 1 + 2 + changed
    assert len(said) == (reason is not None) and (reason is None or reason in said[0])
    assert "forward" not in model.get_output_embeddings().__dict__


def test_evaluation_has_its_logits_whatever_the_training_does(folder, examples):
    task, batch = CausalLMTask(folder), collate_answers(examples, pad=0)
    task.model.requires_grad_(False)
    logits, answers = task(batch)
    assert logits.shape == (len(answers), task.model.config.vocab_size)


def test_choice_is_what_greedy_decoding_held_to_the_choices_writes(folder, examples):
    """Decoded token by token here; the choices share beginnings, and one begins another."""
    task = CausalLMTask(folder).eval()
    batch = collate_answers(examples, pad=0)
    with torch.no_grad():
        logits, answers = task(batch)
        right = chosen_right(logits, answers, batch["rivals"]).tolist()
        expected = []
        for example in examples:
            choices = [task.tokenizer(f"{choice} </s>").input_ids for choice in tiny_lm.CHOICES]
            written: list[int] = []
            while written not in choices:
                allowed = {c[len(written)] for c in choices if c[: len(written)] == written}
                scores = task.model(torch.tensor([example.prompt + written])).logits[0, -1]
                written.append(max(allowed, key=lambda token: scores[token].item()))
            expected.append(written == example.answer)
    assert right == expected
    assert 0 < sum(expected) < len(expected)


def test_validation_reports_the_mean_over_all_answer_tokens_and_the_accuracy(folder, tmp_path):
    file = tiny_lm.write(tmp_path / "val.jsonl", tiny_lm.rows(7))
    task, results = CausalLMTask(folder), []
    for batch_size in (1, 3, 7):
        results += trainer().validate(task, InstructionDataModule(val=file, batch_size=batch_size), verbose=False)
    whole = results[-1]
    assert {"val_loss", "val_accuracy", "val_perplexity"} <= whole.keys()
    for result in results:
        assert result == pytest.approx(whole, rel=1e-5)
    assert whole["val_perplexity"] == pytest.approx(math.exp(whole["val_loss"]), rel=1e-5)
    tested = trainer().test(task, InstructionDataModule(test=file), verbose=False)[0]
    assert tested["test_accuracy"] == pytest.approx(whole["val_accuracy"])


def test_fit_learns(folder, tmp_path):
    lightning.seed_everything(0, verbose=False)
    file = tiny_lm.write(tmp_path / "train.jsonl", tiny_lm.rows(10))
    task, data = CausalLMTask(folder, learning_rate=1e-2), InstructionDataModule(file, file, batch_size=5)
    fit = trainer(max_epochs=15, num_sanity_val_steps=0)
    before = trainer().validate(task, data, verbose=False)[0]
    fit.fit(task, data)
    assert fit.callback_metrics["val_loss"] < before["val_loss"] / 4
    assert fit.callback_metrics["val_accuracy"] == 1


@pytest.mark.parametrize(("schedule", "end"), [("constant", 1.0), ("linear", 0.0), ("cosine", 0.0)])
def test_schedule_warms_up_and_falls(folder, schedule, end):
    task = CausalLMTask(folder, schedule=schedule, warmup=0.1)
    task._trainer = type("T", (), {"estimated_stepping_batches": 100})()
    factors = [task._schedule()(step) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11) and factors[10] == 1
    assert factors[:11] == sorted(factors[:11]) and factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(end)
    assert {"constant": 1.0, "linear": 0.5, "cosine": 0.5}[schedule] == pytest.approx(factors[55])


def test_schedule_that_cannot_know_its_end_is_refused(folder, tmp_path):
    file = tiny_lm.write(tmp_path / "train.jsonl", tiny_lm.rows(4))
    with pytest.raises(ValueError, match=r"schedule='cosine'.*trainer.max_epochs"):
        trainer(max_epochs=-1).fit(CausalLMTask(folder), InstructionDataModule(file))


def test_gradient_checkpointing_recomputes_and_changes_no_gradient(folder, examples, monkeypatch):
    batch, gradients = collate_answers(examples, pad=0), {}
    for on in (False, True):
        task = CausalLMTask(folder, gradient_checkpointing=on)
        monkeypatch.setattr(task, "log", lambda *args, **kwargs: None)
        calls = []
        task.model.model.layers[0].self_attn.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        gradients[on] = torch.autograd.grad(task.training_step(batch, 0), [p for p in task.parameters() if p.requires_grad])
        assert len(calls) == (2 if on else 1)
    torch.testing.assert_close(gradients[True], gradients[False])


def test_padded_prompts_are_answered_as_if_alone(folder, tmp_path):
    file = tiny_lm.write(tmp_path / "p.jsonl", [{"prompt": row["prompt"]} for row in tiny_lm.rows(5)])
    task = CausalLMTask(folder, max_new_tokens=6)
    together = trainer().predict(task, InstructionDataModule(predict=file, batch_size=5))
    task.eval()
    for row, example in zip(together[0], load_examples(file, task.tokenizer, 64, "predict"), strict=True):
        batch = collate_prompts([example], pad=0)
        alone = task.model.generate(input_ids=batch["input_ids"], max_new_tokens=6, do_sample=False, pad_token_id=0)
        text = task.tokenizer.decode(alone[0, len(example.prompt) :], skip_special_tokens=True)
        assert row == {"prompt": example.text, "response": text}
    assert len({row["response"] for row in together[0]}) > 1


def test_model_trains_in_training_mode_and_in_the_dtype_asked_for(folder):
    task = CausalLMTask(folder, dtype="bfloat16")
    assert task.model.training and {p.dtype for p in task.model.parameters()} == {torch.bfloat16}
    assert next(CausalLMTask(folder).model.parameters()).dtype == torch.float32


def test_gguf_without_its_package_names_the_extra(folder, monkeypatch):
    monkeypatch.setattr(hf, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"gguf_file='x.gguf' needs the package gguf; pip install 'lightning-lora\[gguf\]'"):
        CausalLMTask(folder, gguf_file="x.gguf")


@pytest.mark.parametrize("model", ["./nowhere", "a/b/c", "/no_such_folder/model", "~/model", ".cache/none/here", Path("/no_such_folder")])
def test_a_folder_that_is_not_there_is_named(model):
    for load in (hf.load_causal_lm, hf.skeleton):
        with pytest.raises(ValueError, match=rf"model='{model}' is no folder.*nor a hub id"):
            load(model)


def test_a_folder_may_be_a_path(folder):
    assert hf.load_causal_lm(Path(folder))[1].pad_token is not None and hf.skeleton(Path(folder)).lm_head.weight.is_meta
