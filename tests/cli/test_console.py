import io
import sys

from lightning_lora.cli.console import console, print_pairs, print_table, working


def test_a_pipe_gets_whole_lines_without_colour(capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    print_table(("name", "count"), [("x" * 300, 1), ("[b]y[/b]", 2000)])
    print_pairs({"a": 0.123456, "b c": True})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "count"] and lines[1] == f"{'x' * 300}      1" and lines[2].split() == ["[b]y[/b]", "2,000"]
    assert lines[3:] == ["a    0.1235", "b c  True"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_bold_headers_unless_asked_not_to(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    seen = []
    for colour in (True, False):
        (monkeypatch.delenv if colour else monkeypatch.setenv)("NO_COLOR", *([False] if colour else ["1"]))
        monkeypatch.setattr(sys, "stdout", Terminal())
        print_table(("name",), [("x",)])
        console().print("y", style="green")
        seen.append(sys.stdout.getvalue())
    assert "\x1b[1mname" in seen[0] and "\x1b[32m" in seen[0] and "\x1b[32m" not in seen[1]


def test_work_shows_on_a_terminal_only(monkeypatch, capsys):
    with working("merging"):
        pass
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with working("merging"):
        pass
    assert "merging" in sys.stderr.getvalue()
