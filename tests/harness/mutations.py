"""Seeded ways to spoil adapter folders and checkpoints: their bytes, the fields in them, and the files themselves.

Each mutation gets a folder and a source of chance. Those in ``HONEST`` leave data that is as well formed as anyone's, such as another
alpha in a JSON that nothing vouches for: it may load and mean something else. All others must be refused, or change nothing.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Mutation = Callable[[Path, random.Random], object]
ADAPTER, JSON, TENSORS = "adapter", "adapter_config.json", "adapter_model.safetensors"
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "q_proj", "(", "(?:" * 200, "a" * 10_000, "\0", "é", "../../x", "/dev/zero", "none", "all-linear", "\ud800"),
    *([], [1], ["q_proj"], [[]], [None], {}, {"": 1}, {"q_proj": -1}, {"q_proj": 2**70}, {"(": 1}, {"q_proj": "x"}, {"a": {"b": {}}}),
]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def one(folder: Path, chance: random.Random) -> Path:
    return chance.choice(files(folder))


# The bytes of a file.


def flip(folder: Path, chance: random.Random) -> None:
    file = one(folder, chance)
    data = bytearray(file.read_bytes())
    near = min(len(data), chance.choice([8, 64, 512, 2**30]))  # the beginning, where headers are, as often as the rest
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        data[chance.randrange(near)] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def splice(folder: Path, chance: random.Random) -> None:
    """Remove, repeat or overwrite a run of bytes."""
    file = one(folder, chance)
    data = file.read_bytes()
    start = chance.randrange(len(data))
    end = min(len(data), start + chance.choice([1, 4, 8, 100]))
    new = chance.choice([b"", 2 * data[start:end], bytes(end - start), b"\xff" * (end - start), chance.randbytes(end - start)])
    file.write_bytes(data[:start] + new + data[end:])


def truncate(folder: Path, chance: random.Random) -> None:
    file = one(folder, chance)
    os.truncate(file, chance.choice([0, 1, 8, chance.randrange(file.stat().st_size)]))


def extend(folder: Path, chance: random.Random) -> None:
    file = one(folder, chance)
    with file.open("ab") as stream:
        stream.write(chance.choice([b"\0", b"{}", chance.randbytes(100), file.read_bytes()]))


# The files themselves.


def remove(folder: Path, chance: random.Random) -> None:
    one(folder, chance).unlink()


def other_content(folder: Path, chance: random.Random) -> None:
    """One file's content under another's name, or something else under it."""
    file = one(folder, chance)
    file.write_bytes(chance.choice([b"", b"{}", b"null", b"[" * 100_000, b"PK\3\4", b"\x80\x02.", one(folder, chance).read_bytes()]))


def special(folder: Path, chance: random.Random) -> None:
    """A FIFO, a folder, or a link to a device, to nothing, to itself, to the folder."""
    file = one(folder, chance)
    file.unlink()
    target = chance.choice(["fifo", "folder", "/dev/zero", "/dev/null", "nowhere", file.name, ".", "/dev/stdin", "/proc/self/mem"])
    if target == "fifo":
        os.mkfifo(file)
    elif target == "folder":
        file.mkdir()
    else:
        file.symlink_to(target)


# What the files say. Written well formed, with one thing in it changed.


def changed(value: Any, chance: random.Random) -> Any:
    """Return a copy of nested mappings and lists with one place in it another value, left out or there twice."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        copy, name = dict(value), chance.choice(sorted(value, key=repr))
        action = chance.random()
        if action < 0.15:
            del copy[name]
        elif action < 0.25:
            copy[f"{name}x"] = copy.pop(name)
        else:
            copy[name] = changed(value[name], chance)
        return copy
    if isinstance(value, list) and value and chance.random() < 0.8:
        copy_list, index = list(value), chance.randrange(len(value))
        copy_list[index] = changed(value[index], chance)
        return chance.choice([copy_list, copy_list, value + value[:1], value[1:]])
    if isinstance(value, Tensor):
        return odd_tensor(value, chance)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and chance.random() < 0.3:
        return value + chance.choice([-1, 1, 0.5])
    return nested(chance) if chance.random() < 0.05 else chance.choice(ODD)


def nested(chance: random.Random) -> Any:
    """Deeper than any file of ours; as deep as torch and json can write here."""
    value: Any = 0
    for _ in range(chance.choice([50, 150])):
        value = [value] if chance.random() < 0.5 else {"a": value}
    return value


def odd_tensor(tensor: Tensor, chance: random.Random) -> Any:
    """Return a tensor with other values, of another shape, dtype or layout, one that is larger than what is stored of it, or none."""
    whole = tensor.detach().clone()
    return chance.choice(
        [
            *(whole + 1, whole.fill_(float("nan")) if whole.is_floating_point() else whole + 1, whole[..., None], whole.flatten()),
            *(whole.to(torch.float64), whole.to(torch.bfloat16), whole.to(torch.int64), whole.bool(), whole.to(torch.complex64)),
            *(whole.new_zeros(1).expand(2**16, 2**15), whole.new_zeros(0), whole.new_zeros(()), whole[:0], whole.to_sparse(), None),
            *(
                whole.to("meta"),
                torch.nn.Parameter(whole) if whole.is_floating_point() else whole,
                whole.repeat(2, *[1] * (whole.ndim - 1)),
            ),
        ]
        if whole.ndim
        else [whole + 1, whole[None], whole.bool(), None, whole.new_zeros(1).expand(2**31)]
    )


def edit_json(folder: Path, chance: random.Random) -> None:
    file = folder / ADAPTER / JSON
    text = json.dumps(changed(json.loads(file.read_text()), chance))
    file.write_bytes(text.encode(errors="surrogatepass"))


def edit_header(folder: Path, chance: random.Random) -> None:
    """Change an entry of the safetensors header: a name, a dtype, a shape, an offset, or the metadata as a whole."""
    entries, data = header_of(folder / ADAPTER / TENSORS)
    write_header(folder / ADAPTER / TENSORS, changed(entries, chance), data)


def swap_entries(folder: Path, chance: random.Random) -> None:
    entries, data = header_of(folder / ADAPTER / TENSORS)
    first, second = chance.sample(sorted(name for name in entries if name != "__metadata__"), 2)
    entries[first], entries[second] = entries[second], entries[first]
    write_header(folder / ADAPTER / TENSORS, entries, data)


def edit_metadata(folder: Path, chance: random.Random) -> None:
    """Change a field of our own metadata."""
    entries, data = header_of(folder / ADAPTER / TENSORS)
    said = entries.get("__metadata__", {})
    meta = changed(json.loads(said.get("lightning_lora", "{}")), chance)
    entries["__metadata__"] = {**said, "lightning_lora": json.dumps(meta)}
    write_header(folder / ADAPTER / TENSORS, entries, data)


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def write_header(file: Path, entries: dict[str, Any], data: bytes) -> None:
    text = json.dumps(entries, sort_keys=isinstance(entries, dict)).encode(errors="surrogatepass")
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_checkpoint(folder: Path, chance: random.Random) -> None:
    """Change one place in what a checkpoint holds: its tensors, the adapter's config, Lightning's own fields."""
    file = chance.choice([path for path in files(folder) if path.suffix in (".ckpt", ".pt")])
    torch.save(changed(torch.load(file, weights_only=True), chance), file)


def edit_adapter(folder: Path, chance: random.Random) -> None:
    """Change one place in what a checkpoint says of the adapter, or one of its tensors."""
    file = chance.choice([path for path in files(folder) if path.suffix in (".ckpt", ".pt")])
    content = torch.load(file, weights_only=True)
    name = chance.choice(["lightning_lora", "lightning_lora", "state_dict"])
    torch.save({**content, name: changed(content[name], chance)}, file)


def duplicate(folder: Path, chance: random.Random) -> None:
    """Beside each file a copy under another name. It changes nothing."""
    for file in files(folder):
        shutil.copy(file, file.with_name(f"copy.{file.name}"))


ANYWHERE: list[Mutation] = [flip, flip, flip, splice, splice, truncate, extend, remove, other_content, special, special, duplicate]
IN_FOLDERS: list[Mutation] = [edit_json, edit_json, edit_json, edit_header, swap_entries, edit_metadata, edit_metadata]
IN_CHECKPOINTS: list[Mutation] = [edit_checkpoint, edit_adapter, edit_adapter, edit_adapter]
sys.setrecursionlimit(max(sys.getrecursionlimit(), 2000))
