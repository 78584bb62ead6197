import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader

from lightning_lora.cli.yaml_files import check_config_files, unique_keys


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty; it should hold keys such as model:"),
        (b"# a comment\n", r"is empty"),
        (b"- a\n", r"holds a value of type list; it should hold keys"),
        (b"word\n", r"holds a value of type str"),
        (b"a: [1\nb: }\n", r", line 2 is not YAML"),
        (b"a: {\n", r", line 2 is not YAML"),
        (b"a:\n\tb: 1\n", r", line 2 is not YAML: .*; indent with spaces, not tabs"),
        (b"a: 1\nb: {c: 1,\n c: 2}\n", r", line 3: the key 'c' is there twice; remove one"),
        (b"a: [{b: 1, b: 2}]\n", r", line 1: the key 'b' is there twice"),
        (b"a: 1\ntrainer:\n", r": trainer: is empty; write its options under it, or leave it out"),
        (b"a: \xef\n", r"is not UTF-8 \(.* at byte 3\); save it as UTF-8"),
        (b"\0\0", r"is not YAML"),
        (None, r": no such file; name a YAML file"),
        ("folder", r": this is a folder; name a YAML file"),
    ],
)
@pytest.mark.parametrize("form", ["--config=", "--config ", "-c "])
def test_a_wrong_file_is_named(content, message, form, tmp_path):
    file = tmp_path / "run.yaml"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        file.mkdir()
    with pytest.raises(ValueError, match=f"^--config .*run.yaml.*{message}"):
        check_config_files(["fit", *f"{form}{file}".split(), "--a=b"])


def test_right_files_pass(tmp_path):
    (tmp_path / "a.yaml").write_text("a: 1\nb: {a: 1}\nc: [{a: 1}, {a: 1}]\nd: &d [*d]\n")
    check_config_files(["fit", "--config", str(tmp_path / "a.yaml"), "--config={a: 1}", "--config"])


def test_no_key_twice_on_the_command_line_either():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--a", type=dict)
    usual = get_loader("yaml")
    with unique_keys():
        assert parser.parse_args(["--a={b: 1}"]).a == {"b": 1}
        with pytest.raises(ArgumentError, match="'b' is there twice"):
            parser.parse_args(["--a={b: 1, b: 2}"])
        with pytest.raises(ArgumentError, match='key "a"'):
            parser.parse_args(["--a={[1]: 2}"])
    assert get_loader("yaml") is usual
    assert parser.parse_args(["--a={b: 1, b: 2}"]).a == {"b": 2} == yaml.safe_load("{b: 1, b: 2}")
