"""`generate`: what it prints is what the model generates, and nothing else."""

import io
import json

import pytest
import torch
import transformers

from lightning_lora.cli.answers import Answerer, Sampling, Streamer
from lightning_lora.cli.main import main
from lightning_lora.cli.task_file import Task
from lightning_lora.cli.tuned import Tuned
from lightning_lora.data.records import Conversation
from tests import tiny_lm

QUESTION = "which colour is the sky"


def expected(model, tokens=6):
    """The base model's greedy answer, by transformers alone."""
    network, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(model), tiny_lm.tokenizer()
    chat = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    made = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True)


def run(capsys, *words):
    assert main(["generate", *words]) == 0
    return capsys.readouterr().out


def test_an_answer_with_and_without_the_adapter(model, adapter, capsys):
    answers = [run(capsys, model, QUESTION, "--max_new_tokens=6", *extra) for extra in ([], ["--adapter", adapter], ["--system", "a"])]
    assert len(set(answers)) == 3 and answers[0] == expected(model) + "\n"


def test_options_may_stand_before_the_prompt(model, adapter, capsys):
    after = run(capsys, model, QUESTION, "--adapter", adapter, "--max_new_tokens=6")
    assert run(capsys, "--max_new_tokens=6", model, "--adapter", adapter, "--json=false", QUESTION) == after
    assert main(["generate", model, QUESTION, "another"]) == 2
    assert "'another' is one argument too many" in capsys.readouterr().err


def test_the_prompts_of_a_file_are_answered_as_one_by_one(model, tmp_path, capsys):
    prompts = [QUESTION, "grass", "is blood a pear"]
    single = [run(capsys, model, prompt, "--max_new_tokens=5").strip() for prompt in prompts]
    (tmp_path / "p.txt").write_text("\n\n".join(prompts), encoding="utf-16")  # as Windows may save it
    assert run(capsys, model, "--file", str(tmp_path / "p.txt"), "--max_new_tokens=5", "--batch_size=2").splitlines() == single
    rows = tiny_lm.write(tmp_path / "p.jsonl", [{"prompt": prompt} for prompt in prompts])
    lines = run(capsys, model, "--file", rows, "--max_new_tokens=5", "--json").splitlines()
    assert [json.loads(line) for line in lines] == [{"prompt": p, "response": a} for p, a in zip(prompts, single, strict=True)]


def test_a_prompt_from_a_pipe(model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
    assert run(capsys, model, "--max_new_tokens=6") == expected(model) + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["generate", model]) == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_draws_follow_the_seed(model, capsys):
    drawn = [run(capsys, model, QUESTION, "--max_new_tokens=12", "--temperature=1.5", f"--seed={seed}") for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    assert run(capsys, model, QUESTION, "--max_new_tokens=6", "--temperature=5", "--top_p=1e-9").strip() == expected(model)


def test_it_ends_with_the_turn(tmp_path, capsys):
    """The template's end of a turn is not the tokenizer's end token."""
    tokenizer, network = tiny_lm.tokenizer(), tiny_lm.llama()
    words = run_of(network, tokenizer, 12)
    end = next(word for word in words[2:] if word not in words[:2])  # the model writes it by itself
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.chat_template = tiny_lm.CHATML.replace("' </s> '", f"(' {end} ' if m['role'] == 'assistant' else ' </s> ')")
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert run(capsys, str(tmp_path), QUESTION, "--max_new_tokens=12").split() == words[: words.index(end)]


def run_of(network, tokenizer, tokens):
    """The words that follow the question, with no token that stops."""
    chat = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, network.eval()(ids).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.convert_ids_to_tokens(ids[0, -tokens:])


class Bytes:
    """A tokenizer whose tokens are bytes, of which a character may need several."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode(errors="replace")


def test_the_streamer_waits_for_whole_characters():
    written = []
    streamer = Streamer(Bytes(), written.append)
    streamer.put(torch.tensor([[65]]))  # the prompt
    for byte in "aé⁂b".encode():
        streamer.put(torch.tensor([byte]))
    streamer.end()
    assert written == ["a", "é", "⁂", "b"]


@pytest.mark.parametrize(("temperature", "drawn"), [(0.0, False), (0.7, True)])
def test_sampling_options(temperature, drawn):
    options = Sampling(5, temperature, 0.9).options()
    assert options["do_sample"] is drawn and options["max_new_tokens"] == 5 and (options["top_p"] == 0.9) is drawn


def test_a_rows_own_system_message_stays(model, tmp_path, capsys):
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": QUESTION}]
    file = tiny_lm.write(tmp_path / "p.jsonl", [{"messages": messages}, {"prompt": QUESTION}])
    answers = [run(capsys, model, QUESTION, "--max_new_tokens=6", "--system", text) for text in ("a", "blood")]
    assert run(capsys, model, "--file", file, "--max_new_tokens=6", "--system", "blood") == "".join(answers)


def test_an_encoder_reads_prompts_of_a_batch_as_alone():
    """BART's positions begin at the first token, padding included."""
    torch.manual_seed(0)
    layers = {
        f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3, "forced_eos_token_id": None}
    config = transformers.BartConfig(
        vocab_size=len(tiny_lm.WORDS), d_model=32, max_position_embeddings=64, init_std=1.0, **layers, **tokens
    )
    network = transformers.BartForConditionalGeneration(config).eval()
    answerer = Answerer(Tuned(network, tiny_lm.tokenizer(chat=False), Task("AutoModelForSeq2SeqLM")), Sampling(6))
    prompts = [Conversation([{"role": "user", "content": text}]) for text in (QUESTION, "grass", "is blood a pear")]
    alone = [answerer.answer([prompt])[0] for prompt in prompts]
    assert answerer.answer(prompts) == alone and len(set(alone)) == 3
