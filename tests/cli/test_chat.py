"""`chat` from a pipe and on a terminal: what the model is given at each turn."""

import io
import sys

import pytest

from lightning_lora.cli import chat as chats
from lightning_lora.cli.main import main
from tests import tiny_lm


@pytest.fixture
def asked(monkeypatch):
    """The messages of each turn; the answer is a number."""
    turns = []

    def stream(self, conversation, write):
        turns.append([(m["role"], m["content"]) for m in conversation.messages])
        write(answer := f"answer {len(turns)}")
        return answer

    monkeypatch.setattr(chats.Answerer, "stream", stream)
    return turns


def talk(monkeypatch, capsys, model, text, *words, terminal=False):
    stdin = io.StringIO(text)
    if terminal:
        lines = iter(text.splitlines())
        monkeypatch.setattr(stdin, "isatty", lambda: True)

        def ask(prompt):
            line = next(lines, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["chat", model, *words]) == 0
    return capsys.readouterr()


def test_each_turn_has_those_before_it(model, asked, monkeypatch, capsys):
    output = talk(monkeypatch, capsys, model, "a\n\nb\n/reset\nc\n/exit\nd\n", "--system=be brief")
    system = ("system", "be brief")
    assert asked == [
        [system, ("user", "a")],
        [system, ("user", "a"), ("assistant", "answer 1"), ("user", "b")],
        [system, ("user", "c")],
    ]
    assert output.out == "answer 1\nanswer 2\nanswer 3\n"


def test_a_line_from_a_pipe_may_begin_with_a_slash(model, asked, monkeypatch, capsys):
    talk(monkeypatch, capsys, model, "/etc is what\n")
    assert asked == [[("user", "/etc is what")]]


def test_a_terminal_is_told_of_the_commands(model, asked, monkeypatch, capsys):
    output = talk(monkeypatch, capsys, model, "/nothing\n/system be long\na", terminal=True)
    assert asked == [[("system", "be long"), ("user", "a")]]
    assert output.out == "answer 1\n" and "no command '/nothing'" in output.err and "/reset: forget" in output.err


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(model, monkeypatch, capsys):
    turns = []

    def stream(self, conversation, write):
        turns.append([m["content"] for m in conversation.messages])
        if len(turns) == 1:
            raise KeyboardInterrupt
        return "fine"

    monkeypatch.setattr(chats.Answerer, "stream", stream)
    talk(monkeypatch, capsys, model, "a\nb", terminal=True)
    assert turns == [["a"], ["b"]]


def test_the_models_own_answers(model, monkeypatch, capsys):
    """Two turns of a conversation as `generate` has them, one by one."""
    first = talk(monkeypatch, capsys, model, "which colour\n", "--max_new_tokens=5").out
    again = talk(monkeypatch, capsys, model, "which colour\n/reset\nwhich colour\n", "--max_new_tokens=5").out
    assert again == 2 * first and main(["generate", model, "which colour", "--max_new_tokens=5"]) == 0
    assert capsys.readouterr().out == first


def test_a_base_model_keeps_no_conversation(tmp_path, capsys):
    assert main(["chat", tiny_lm.save(tmp_path, chat=False)]) == 2
    assert "has no chat template, so it keeps no conversation; use generate" in capsys.readouterr().err
