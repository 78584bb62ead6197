import json
import re

import pytest

from lightning_lora.data.reading import read_rows

ROWS = [
    {"prompt": "which colour is the sky?", "response": "blue – or “grey”"},
    {"prompt": 'quoted "a, b"\nand\tmore', "response": "é 中 😀\u2028"},
]
LATIN = {"prompt": "où?", "response": "là-bas"}


def read(path):
    return list(read_rows(str(path), "train"))


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows, separator):
    cells = [["prompt", "response"], *(row.values() for row in rows)]
    return "".join(separator.join('"' + cell.replace('"', '""') + '"' for cell in row) + "\n" for row in cells)


SHAPES = {
    "rows.jsonl": (lines(ROWS), [1, 2]),
    "rows.ndjson": (lines(ROWS), [1, 2]),
    "blank.jsonl": ("\n \n" + lines(ROWS).replace("\n", "\n\n"), [3, 5]),
    "array.json": (json.dumps(ROWS), [1, 1]),
    "pretty.json": (json.dumps(ROWS, indent=2), [2, 6]),
    "misnamed.json": (lines(ROWS), [1, 2]),
    "misnamed.jsonl": (json.dumps(ROWS, indent=2), [2, 6]),
    "objects.jsonl": ("\n".join(json.dumps(row, indent=2) for row in ROWS), [1, 5]),
    "rows.csv": (table(ROWS, ","), [2, 3]),
    "semicolons.csv": (table(ROWS, ";"), [2, 3]),
    "rows.tsv": (table(ROWS, "\t"), [2, 3]),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_in_every_encoding(tmp_path, name, ends, encoding):
    text, numbers = SHAPES[name]
    file = tmp_path / name
    file.write_bytes(text.replace("\n", ends).encode(encoding))
    assert read(file) == [(f"{file}:{number}", row) for number, row in zip(numbers, ROWS, strict=True)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv"])
@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", b"\xef\xbb\xbf"])
def test_an_empty_file_has_no_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == []


def test_a_huge_row(tmp_path):
    text = "a " * 1_000_000
    for name, content in (("rows.jsonl", json.dumps({"text": text})), ("rows.csv", f"text,n\n{text},1\n")):
        (tmp_path / name).write_text(content)
        assert read(tmp_path / name)[0][1]["text"] == text


def test_latin_1_is_refused_with_the_cure(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(ROWS).encode() + lines([LATIN]).encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"rows.jsonl:3 is not UTF-8 .*; save the file as UTF-8 \(as from Windows: iconv -f windows-1252 -t utf-8"
    ):
        read(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 1\n{"a": 3}', r"a.jsonl:2 is not JSON \(Expecting ',' delimiter at column"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "b": 2, "a": 3}', r"a.jsonl:2 cannot be read as JSON \(the key 'a' is there twice; remove one\)"),
        ("a.json", '[{"a": 1},\n{"a": [{"b": 1, "b": 1}]}]', r"a.json:2 cannot be read as JSON \(the key 'b' is there twice"),
        ("a.jsonl", '{"a": 1}\n{"a": 1} {"b": 2}', r"a.jsonl:2 is not JSON \(Extra data at column 10\)"),
        ("a.json", '[{"a": 1},\n {"a": 2}\n', r"a.json:2 the array that begins the file has no end; close it with \]"),
        ("a.json", '[\n{"a": 1},\n {"a": }\n]', r"a.json:3 is not JSON \(Expecting value at line 3, column 8\)"),
        ("a.json", '{\n"a": 1\n}\n{\n"a" 1\n}', r"a.json:4 is not JSON \(Expecting ':' delimiter at line 5"),
        ("a.jsonl", '{"a": 1}\n' + '{"a":' * 100_000 + "1" + "}" * 100_000, r"a.jsonl:2 cannot be read as JSON \(maximum recursion depth"),
        ("a.json", "[\n" + "[" * 100_000 + "]" * 100_000 + "]", r"a.json:2 cannot be read as JSON \(maximum recursion depth"),
        ("a.jsonl", '{"text": ' + "9" * 9999 + "}", r"a.jsonl:1 cannot be read as JSON \(Exceeds the limit"),
        ("a.json", "{'a': 1}", r"a.json:1 is not JSON \(Expecting property name"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"a.csv:3: 3 fields, but the header names 2"),
        ("a.csv", "a,b\n1\n", r"a.csv:2: 1 fields, but the header names 2"),
        ("a.csv", "a,a\n1,2\n", r"a.csv:1: the header names a column twice"),
        ("a.csv", 'a,b\n"1,2\n', r"a.csv:2 is not csv \(unexpected end of data\)"),
        ("a.jsonl", '{"a": "\\ud83d"}', r"a.jsonl:1 cannot be read as JSON \(it has half a character \(\\ud83d\)"),
        ("a.json", '[{"a": "\\ud83d\\ude00"},\n{"a": "\\ud83d"}]', r"a.json:2 cannot be read as JSON \(it has half a character"),
        ("a.jsonl.gz", "a", r"data.train='.*a.jsonl.gz' is packed; unpack it, and name the file 'a.jsonl'"),
        ("a.csv", "PK\x03\x04", r"a.csv is no text, but begins as a .zip file; unpack it"),
        ("a.jsonl", "PAR1", r"a.jsonl is no text, but begins as a .parquet file; rename it"),
        ("a.txt", "a", r"data.train='.*a.txt': the ending '.txt' is of no format; rename it to one of .jsonl"),
    ],
)
def test_what_cannot_be_parsed_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_an_empty_name_is_no_folder():
    with pytest.raises(ValueError, match=r"data.train='' is empty; name a file"):
        list(read_rows("", "train"))


@pytest.mark.parametrize("name", ["none.jsonl", "folder/none.csv", "a/b/c", "./none", "none.txt/"])
def test_a_missing_file_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"data.train={name!r}: no such file")):
        list(read_rows(name, "train"))
