"""Bad input and faults, one test a row of the project's table of faults (`row01` is its first row).

Every refusal is held to the same three things: the exception's type, and a message that has the field, the value and the fix; a model
with every bit, flag and class that it had before the call; and a disk with every byte that it had.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRALinear,
    apply_lora,
    get_lora_parameters,
    load_adapter,
    merge_lora,
    merge_report,
    save_adapter,
    unload_lora,
    unmerge_lora,
)
from lightning_lora.layers import LoRALayer
from lightning_lora.utils import patterns
from tests.conftest import DTYPES, as_bits, base_bits, same_bits, snapshot
from tests.lit import LitNet, trainer

CONFIG = LoRAConfig(rank=2, alpha=4, target_modules=["q_proj", "v_proj"])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.norm = nn.Linear(width, width), nn.Linear(width, width, bias=False), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.q_proj(x).tanh() * self.v_proj(x))


class Net(nn.Module):
    """An embedding, two blocks, and a head that may be tied to the embedding."""

    def __init__(self, width: int = 12, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 16, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def projections(model: Net) -> list[nn.Module]:
    return [module for layer in model.layers for module in (layer.q_proj, layer.v_proj)]


IDS = torch.arange(8).reshape(2, 4)


def net(seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**kwargs).to(dtype)


def adapted(config: LoRAConfig = CONFIG, seed: int = 0, std: float = 0.1, **kwargs: Any) -> Net:
    """A net whose adapters do something, as after training."""
    model = apply_lora(net(seed, **kwargs), config=config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in get_lora_parameters(model):
            parameter.normal_(std=std, generator=generator)
    return model


def disk_bits(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@contextmanager
def refused(*said: str, model: nn.Module | None = None, error: type[Exception] = ValueError, folder: Path | None = None) -> Iterator[None]:
    """What runs inside raises exactly this type with these texts in its message, and changes nothing in the model or on the disk."""
    model_before, disk_before = model and snapshot(model), folder and disk_bits(folder)
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    for text in said:
        assert text in str(caught.value), f"{text!r} is not in {caught.value}"
    assert (model and snapshot(model)) == model_before
    assert (folder and disk_bits(folder)) == disk_before


# The config alone.

BAD_CONFIGS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("row03_regex", {"target_modules": ["q_proj", "v_(proj"]}, ("target_modules", "'v_(proj'", "not a valid regex", "position 2")),
    ("row03_regex_string", {"target_modules": "*_proj"}, ("target_modules", "'*_proj'", "position 0")),
    ("row03_exclude", {"exclude_modules": ["[a"]}, ("exclude_modules", "'[a'", "position 0")),
    ("row03_rank_pattern", {"rank_pattern": {"(": 4}}, ("rank_pattern", "'('", "position 0")),
    ("row05_list", {"target_modules": []}, ("target_modules=", "names nothing", "'all-linear'")),
    ("row05_string", {"target_modules": ""}, ("target_modules=''", "names nothing")),
    ("row05_entry", {"target_modules": ["q_proj", ""]}, ("target_modules", "''", "non-empty")),
    ("row06_zero", {"rank": 0}, ("rank=0", "whole number ≥ 1")),
    ("row06_negative", {"rank": -4}, ("rank=-4", "whole number ≥ 1")),
    ("row06_pattern", {"rank_pattern": {"q_proj": 0}}, ("rank_pattern['q_proj']=0", "whole number ≥ 1")),
    ("row07_fraction", {"rank": 1.5}, ("rank=1.5", "whole number")),
    ("row07_whole_float", {"rank": 8.0}, ("rank=8.0", "whole number")),
    ("row07_bool", {"rank": True}, ("rank=True", "whole number")),
    ("row07_text", {"rank": "8"}, ("rank='8'", "whole number")),
    ("row09_nan", {"alpha": math.nan}, ("alpha=nan", "finite number > 0")),
    ("row09_inf", {"alpha": math.inf}, ("alpha=inf", "finite number > 0")),
    ("row09_zero", {"alpha": 0}, ("alpha=0", "finite number > 0")),
    ("row09_negative", {"alpha": -1.0}, ("alpha=-1.0", "finite number > 0")),
    ("row09_pattern", {"alpha_pattern": {"q_proj": math.nan}}, ("alpha_pattern['q_proj']=nan", "finite number > 0")),
    ("row10_above", {"dropout": 1.5}, ("dropout=1.5", "[0, 1)")),
    ("row10_one", {"dropout": 1.0}, ("dropout=1.0", "[0, 1)")),
    ("row10_negative", {"dropout": -1}, ("dropout=-1", "[0, 1)")),
    ("row10_nan", {"dropout": math.nan}, ("dropout=nan", "[0, 1)")),
]


@pytest.mark.parametrize(("fields", "said"), [row[1:] for row in BAD_CONFIGS], ids=[row[0] for row in BAD_CONFIGS])
def test_bad_config(fields: dict[str, Any], said: tuple[str, ...]) -> None:
    with refused(*said):
        LoRAConfig(**fields)
    LoRAConfig(**{**fields, **{name: getattr(LoRAConfig(), name) for name in fields}})  # it was that field


# A config against a model.

BAD_TARGETS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("row01_name", {"target_modules": ["q_porj"]}, ("target_modules", "'q_porj' matches no module", "Nearest names: q_proj")),
    ("row01_regex", {"target_modules": r".*\.query"}, ("target_modules", "matches no module", "Nearest names")),
    ("row01_name_as_string", {"target_modules": "q_proj"}, ("'q_proj' matches no module", "regex over the whole name", "['q_proj']")),
    ("row01_part_of_a_name", {"target_modules": ["proj"]}, ("'proj' matches no module", "q_proj")),
    ("row02_one_of_several", {"target_modules": ["q_proj", "k_proj"]}, ("'k_proj' matches no module", "allow_unmatched=True")),
    ("row02_exclude", {"exclude_modules": ["k_proj"]}, ("exclude_modules", "'k_proj' matches no module", "allow_unmatched=True")),
    ("row02_rank_pattern", {"rank_pattern": {"k_proj": 4}}, ("rank_pattern", "'k_proj' matches no module")),
    ("row02_modules_to_save", {"modules_to_save": ["haed"]}, ("modules_to_save", "'haed' matches no module", "head")),
    ("row02_layers", {"layers": [0, 7]}, ("layers=[7]", "indices are 0–1")),
    (
        "row11_norm",
        {"target_modules": ["norm"]},
        ("'layers.0.norm'", "torch.nn.modules.normalization.LayerNorm", "supported are", "Linear"),
    ),
    ("row11_container", {"target_modules": ["layers.1"]}, ("'layers.1'", "Block", "cannot adapt", "Embedding")),
    ("row11_among_right_ones", {"target_modules": ["q_proj", "norm"]}, ("'layers.0.norm'", "LayerNorm", "supported are")),
]


@pytest.mark.parametrize(("fields", "said"), [row[1:] for row in BAD_TARGETS], ids=[row[0] for row in BAD_TARGETS])
def test_bad_target(fields: dict[str, Any], said: tuple[str, ...]) -> None:
    model = net()
    with refused(*said, model=model):
        apply_lora(model, config=LoRAConfig(**fields))


def test_row02_the_flag_accepts_it() -> None:
    model = apply_lora(net(), config=LoRAConfig(target_modules=["q_proj", "k_proj"], allow_unmatched=True))
    assert {name for name, m in model.named_modules() if isinstance(m, LoRALayer)} == {"layers.0.q_proj", "layers.1.q_proj"}
    model = net()
    with refused("'k_proj' matches no module", model=model):  # but not where nothing else matches
        apply_lora(model, config=LoRAConfig(target_modules=["k_proj"], allow_unmatched=True))


def test_row04_matching_is_bounded_by_the_number_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A regex that backtracks exponentially in a name's length is tried a fixed number of times a module, and it is documented."""
    tried: list[str] = []
    original = patterns.Pattern.matches
    monkeypatch.setattr(patterns.Pattern, "matches", lambda self, fqn: (tried.append(fqn), original(self, fqn))[1])
    model = net()
    apply_lora(model, config=LoRAConfig(target_modules=[r"(\w+\.?)+proj"]))
    names = [name for name, _ in net().named_modules() if name]
    assert set(tried) == set(names)
    assert len(tried) <= len(names)
    assert "catastrophic" in str(patterns.__doc__)


def test_row08_rank_above_the_layers_own() -> None:
    model = net()
    with pytest.warns(UserWarning, match=r"rank=13 of 'layers\.0\.q_proj' is above min\(in, out\)=12"):
        apply_lora(model, config=LoRAConfig(rank=13, target_modules=["layers.0.q_proj"]))
    assert model.layers[0].q_proj.lora_A.shape == (13, 12)
    apply_lora(net(), config=LoRAConfig(rank=12, target_modules=["layers.0.q_proj"]))  # no warning: those are errors here


def test_row11_a_weight_that_is_read_without_a_call() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with refused("'attention.out_proj'", "NonDynamicallyQuantizableLinear", "MultiheadAttention.forward reads", model=model):
        apply_lora(model, config=LoRAConfig(target_modules=["out_proj"]))


def test_row12_twice() -> None:
    model = adapted()
    before = snapshot(model)
    assert apply_lora(model, config=LoRAConfig(**CONFIG.to_dict())) is model
    assert snapshot(model) == before, "the same config again is a no-op"
    with refused("'layers.0.q_proj'", "rank: 2 != 4", "unload_lora(model)", model=model):
        apply_lora(model, config=LoRAConfig(rank=4, alpha=4, target_modules=["q_proj", "v_proj"]))
    with refused("target_modules", "unload_lora(model)", model=model):
        apply_lora(model, config=LoRAConfig(rank=2, alpha=4, target_modules=["q_proj"]))


def test_row13_after_a_merge() -> None:
    model = merge_lora(adapted())
    with refused("merged", "'layers.0.q_proj'", "unmerge_lora(model)", model=model):
        apply_lora(model, config=CONFIG)
    assert apply_lora(unmerge_lora(model), config=CONFIG) is model


# An adapter folder against a model.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of `net()`, as `save_adapter` writes it."""
    return save_adapter(adapted(), tmp_path / "adapter")


def as_peft(folder: Path) -> None:
    """Drop what only our own files carry, so that the JSON is what counts."""
    file = folder / "adapter_model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, {"format": "pt"})


def edit_json(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    changed = {name: value for name, value in {**json.loads(file.read_text()), **fields}.items() if value is not ...}
    file.write_text(json.dumps(changed))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    file = folder / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as reader:
        meta = reader.metadata()
    tensors = safetensors.torch.load_file(file)
    edit(tensors)
    safetensors.torch.save_file(tensors, file, meta)


def shrink(tensors: dict[str, Tensor]) -> None:
    """Tensors of rank 1 under a config of rank 2."""
    for name, tensor in tensors.items():
        tensors[name] = (tensor[:1] if ".lora_A." in name else tensor[:, :1]).contiguous()


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:40])


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def only_a_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


def peft(**fields: Any) -> Callable[[Path], object]:
    return lambda folder: (as_peft(folder), edit_json(folder, **fields))


def tensors(edit: Callable[[dict[str, Tensor]], Any], foreign: bool = False) -> Callable[[Path], object]:
    return lambda folder: (edit_tensors(folder, edit), foreign and as_peft(folder))


HEAD = "base_model.model.head.weight"
A0 = "base_model.model.layers.0.q_proj.lora_A.weight"
OURS_A0 = "layers.0.q_proj.lora_A"
FILE, JSON = "adapter_model.safetensors", "adapter_config.json"

BAD_FOLDERS: list[tuple[str, Callable[[Path], object], tuple[str, ...]]] = [
    ("row16_use_dora", peft(use_dora=True), ("missing", "layers.0.q_proj.lora_magnitude_vector")),
    ("row18_variant_of_another_save", lambda f: edit_json(f, use_dora=True), (JSON, "'dora'", "'plain'", "two different saves")),
    ("row14_lora_bias", peft(lora_bias=True), (JSON, "lora_bias=True", "not supported")),
    ("row14_replication", peft(layer_replication=[[0, 2]]), (JSON, "layer_replication=[[0, 2]]", "not supported")),
    ("row14_pissa", peft(init_lora_weights="pissa"), (JSON, "init_lora_weights='pissa'", "convert")),
    ("row15_missing", peft(peft_type=...), (JSON, "peft_type=None", "only LORA")),
    ("row15_bogus", peft(peft_type="LOHA"), (JSON, "peft_type='LOHA'", "only LORA")),
    ("row15_not_an_object", lambda f: (as_peft(f), (f / JSON).write_text("[]")), (JSON, "list", "not a JSON object")),
    ("row15_not_json", lambda f: (as_peft(f), (f / JSON).write_text("{")), (JSON, "not valid JSON")),
    ("row16_rank_pattern", peft(rank_pattern={"q_proj": 1}), (OURS_A0, "(2, 12)", "(1, 12)")),
    ("row16_modules_to_save", peft(modules_to_save=["head"]), ("missing", "head.weight")),
    ("row16_bias", peft(bias="lora_only"), ("missing", "layers.0.q_proj.bias")),
    ("row16_target_parameters", peft(target_parameters=["w"]), (JSON, "target_parameters=['w']", "not supported")),
    ("row16_trainable_tokens", peft(trainable_token_indices=[1]), (JSON, "trainable_token_indices=[1]", "not supported")),
    ("row18_config", peft(r=4), (OURS_A0, "(2, 12)", "rank=4", "(4, 12)")),
    ("row18_tensors", tensors(shrink), (OURS_A0, "(1, 12)", "rank=2", "(2, 12)")),
    ("row18_json_of_another_save", lambda f: edit_json(f, r=4), (JSON, "r=4", "2", "two different saves")),
    ("row19_one", tensors(lambda t: t.pop(A0)), ("1 tensors are missing", OURS_A0)),
    ("row19_all", tensors(lambda t: t.clear()), ("8 tensors are missing", OURS_A0)),
    ("row19_of_pefts", tensors(lambda t: t.pop(A0), foreign=True), ("1 tensors are missing", OURS_A0)),
    ("row20_layer", tensors(lambda t: t.update({A0.replace("0", "2", 1): t[A0] + 1})), ("layers.2.q_proj.lora_A", "no tensor")),
    ("row20_base_weight", tensors(lambda t: t.update({HEAD: torch.ones(16, 12)})), ("'head.weight'", "base weight")),
    ("row20_not_pefts", tensors(lambda t: t.update({"q_proj.weight": torch.ones(2)})), ("'q_proj.weight'", "does not start with")),
    ("row21_nan", tensors(lambda t: t[A0].view(-1)[3:4].fill_(math.nan)), (OURS_A0, "NaN or infinity", "allow_nonfinite=True")),
    ("row21_inf", tensors(lambda t: t[A0].fill_(-math.inf)), (OURS_A0, "NaN or infinity", "allow_nonfinite=True")),
    ("row21_nan_of_pefts", tensors(lambda t: t[A0].fill_(math.nan), foreign=True), (OURS_A0, "NaN or infinity", "allow_nonfinite=True")),
    ("row24_truncated", truncate, (FILE, "truncated")),
    ("row24_header", cut_header, (FILE, "truncated")),
    ("row24_empty", lambda f: (f / FILE).write_bytes(b""), (FILE, "truncated")),
    ("row26_pickle", only_a_pickle, (FILE, "is missing", "adapter_model.bin is a pickle", "safe_serialization=True")),
    ("row30_no_tensors", remove(FILE), (FILE, "is missing")),
    ("row30_no_config", lambda f: (as_peft(f), remove(JSON)(f)), (JSON, "is missing")),
    ("row30_empty", lambda f: (remove(FILE)(f), remove(JSON)(f)), (FILE, "is missing")),
]  # fmt: skip


@pytest.mark.parametrize("target", ["plain", "adapted", "merged"])
@pytest.mark.parametrize(("spoil", "said"), [row[1:] for row in BAD_FOLDERS], ids=[row[0] for row in BAD_FOLDERS])
def test_bad_folder(folder: Path, spoil: Callable[[Path], object], said: tuple[str, ...], target: str) -> None:
    """Whatever state the model is in: plain, adapted already, merged."""
    spoil(folder)
    model = {"plain": net, "adapted": adapted, "merged": lambda: merge_lora(adapted())}[target]()
    with refused(*said, model=model, folder=folder):
        load_adapter(model, folder)


def test_row14_an_unknown_field_is_a_warning(folder: Path) -> None:
    as_peft(folder)
    edit_json(folder, colour="blue")
    model = net()
    with pytest.warns(UserWarning, match=r"adapter_config\.json: colour='blue' is not a field we know"):
        load_adapter(model, folder)
    assert torch.equal(model(IDS), adapted()(IDS))


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {"q_proj": 3}},
        {"alpha_pattern": {"v_proj": 1.0}},
        {"bias": "all"},
        {"modules_to_save": ["head"]},
        {"scaling": "rslora"},
    ],
    ids=lambda fields: f"row16_{next(iter(fields))}",
)
def test_row16_honoured(tmp_path: Path, fields: dict[str, Any]) -> None:
    """From PEFT's JSON alone, every one of these changes what is loaded."""
    source = adapted(LoRAConfig(**{**CONFIG.to_dict(), **fields}))
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    folder = save_adapter(source, tmp_path / "adapter")
    as_peft(folder)
    loaded = load_adapter(net(), folder)
    assert torch.equal(loaded(IDS), source(IDS))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {n for n, p in source.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "pefts"])
def test_row17_an_adapter_for_another_shape(folder: Path, foreign: bool) -> None:
    if foreign:
        as_peft(folder)
    model = net(width=20)
    with refused(str(folder), OURS_A0, "(2, 12)", "(2, 20)", "another base", model=model, folder=folder):
        load_adapter(model, folder)


def test_row21_the_flag_accepts_it(tmp_path: Path) -> None:
    model = adapted()
    nn.init.constant_(model.layers[0].q_proj.lora_A, math.nan)
    folder = save_adapter(model, tmp_path / "adapter")
    assert load_adapter(net(), folder, allow_nonfinite=True).layers[0].q_proj.lora_A.isnan().all()


def hashes(message: str) -> set[str]:
    return set(re.findall(r"\b[0-9a-f]{32}\b", message))


def scale_one_weight(model: Net) -> Net:
    """A new revision of the same base: one of its matrices was trained on."""
    with torch.no_grad():
        model.layers[1].v_proj.weight.mul_(1.05)
    return model


@pytest.mark.parametrize(
    "make", [lambda: net(seed=1), lambda: scale_one_weight(net())], ids=["row22_another_base", "row23_another_revision"]
)
def test_another_base(folder: Path, make: Callable[[], Net]) -> None:
    model = make()
    with pytest.raises(ValueError) as caught:
        load_adapter(model, folder)
    assert len(hashes(str(caught.value))) == 2, "both fingerprints"
    with refused(str(folder), "trained on another base", "Net", "check_base=False", model=model, folder=folder):
        load_adapter(model, folder)
    load_adapter(model, folder, check_base=False)
    assert torch.equal(model.layers[0].q_proj.lora_A, adapted().layers[0].q_proj.lora_A)


def test_row22_the_same_base_in_another_dtype_is_the_same(folder: Path) -> None:
    load_adapter(net(dtype=torch.bfloat16), folder)


@pytest.mark.parametrize("field", ["auto_mapping", "megatron_core", "trust_remote_code"])
def test_row29_fields_that_name_code_are_never_acted_on(folder: Path, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module by the name that the file gives would be found, and is not imported."""
    (folder.parent / "spy_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(folder.parent))
    as_peft(folder)
    edit_json(folder, **{field: {"base_model_class": "Net", "parent_library": "spy_module"} if field == "auto_mapping" else "spy_module"})
    model = net()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        load_adapter(model, folder)
    # PEFT writes auto_mapping into ordinary files: a warning for each of those would only teach people to ignore warnings.
    assert [field in str(w.message) and "never acted on" in str(w.message) for w in seen] == ([] if field == "auto_mapping" else [True])
    assert torch.equal(model(IDS), adapted()(IDS))


def test_row30_no_such_folder(tmp_path: Path) -> None:
    model = net()
    with refused(str(tmp_path / "nowhere"), "no such adapter folder", model=model, folder=tmp_path):
        load_adapter(model, tmp_path / "nowhere")


# Merging.


def test_row46_merge_twice() -> None:
    model = merge_lora(adapted())
    before = snapshot(model)
    assert merge_lora(model) is model
    assert snapshot(model) == before


@pytest.mark.parametrize("size", [0.03, 0.3, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row47_unmerge_is_exact(dtype: torch.dtype, size: float) -> None:
    model = adapted(dtype=dtype, std=size)
    before, y = snapshot(model), model(IDS)
    merge_lora(model)
    assert all(
        not same_bits(layer.weight, base.weight) for layer, base in zip(projections(model), projections(net(dtype=dtype)), strict=True)
    )
    unmerge_lora(model)
    after = snapshot(model)
    assert after["bits"] == before["bits"] and after["parameters"] == before["parameters"]
    assert torch.equal(model(IDS), y)


def test_row47_an_adapter_that_changed_since_is_refused() -> None:
    model = merge_lora(adapted())
    with torch.no_grad():
        model.layers[0].q_proj.lora_A.add_(0.01)
    with refused("'layers.0.q_proj'", "cannot be unmerged", "changed since the merge", model=model):
        unmerge_lora(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_row48_half_precision_rounds_once(dtype: torch.dtype) -> None:
    """The merged weight is the rounding of the exact sum, and the report says what that lost, layer by layer."""
    model = adapted(dtype=dtype, std=0.05)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALayer)}
    with torch.no_grad():
        exact = {name: x.weight.double() + x.scaling * x.lora_B.double() @ x.lora_A.double() for name, x in layers.items()}
    base = {name: model.get_submodule(name).weight.double() for name in exact}
    merge_lora(model)
    lost = merge_report(model)
    assert lost.keys() == exact.keys()
    for name, sum_ in exact.items():
        merged = model.get_submodule(name).weight
        assert merged.dtype == dtype
        assert torch.equal(merged, sum_.float().to(dtype))
        delta = sum_ - base[name]
        assert lost[name] == pytest.approx(float((merged.double() - sum_).norm() / delta.norm()), rel=1e-3)
        assert 0 < lost[name] < 0.2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_row49_an_adapter_that_is_not_finite(value: float) -> None:
    model = adapted()
    with torch.no_grad():
        model.layers[1].v_proj.lora_B[3, 1] = value  # in the last layer: none before it may have been merged
    with refused("'layers.1.v_proj'", "lora_B holds NaN or infinity", "load a sound adapter", model=model):
        merge_lora(model)
    layer = model.layers[1].v_proj
    with refused("NaN or infinity", model=layer):
        layer.merge_weights()


class Int8Linear(nn.Linear):
    """A quantized linear: its weight is whole numbers, unpacked in the forward pass."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, bias=False)
        self.weight = nn.Parameter(torch.randint(-127, 128, (width, width), dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) / 127)


def test_row50_a_quantized_base() -> None:
    """Stored in a way that is not known here, it is refused before anything is changed: an update added to its numbers would be lost."""
    model = net()
    model.layers[1].v_proj = Int8Linear(12)
    with refused("'layers.1.v_proj'", "stores its weight as torch.int8", "dequantize the base first", model=model):
        apply_lora(model, config=CONFIG)


@pytest.mark.parametrize("target", ["embed", "head"])
def test_row51_tied_weights(target: str) -> None:
    other = {"embed": "head", "head": "embed"}[target]
    model = adapted(LoRAConfig(rank=2, target_modules=[target]), tied=True)
    y = model(IDS)
    with refused(f"{target}.weight is tied to {other}.weight", "untie=True", model=model):
        merge_lora(model)
    before = as_bits(model.get_submodule(other).weight)
    merge_lora(model, untie=True)
    assert model.embed.weight is not model.head.weight and torch.equal(as_bits(model.get_submodule(other).weight), before)
    torch.testing.assert_close(model(IDS), y, rtol=1e-4, atol=1e-5)
    unmerge_lora(model)
    assert model.embed.weight is model.head.weight, "and tied again"
    assert torch.equal(model(IDS), y)


def test_row52_a_module_with_two_parents() -> None:
    model = net()
    model.layers[1] = model.layers[0]
    apply_lora(model, config=CONFIG)
    assert model.layers[1].q_proj is model.layers[0].q_proj
    assert len(get_lora_parameters(model)) == 4, "two layers, one A and one B each"
    nn.init.normal_(model.layers[0].q_proj.lora_B)
    y = model(IDS)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), y, rtol=1e-4, atol=1e-5)  # merged once, not twice
    unmerge_lora(model)
    assert torch.equal(model(IDS), y)


def test_row53_meta() -> None:
    """Adapters on a meta model start as they should once it is materialised."""
    with torch.device("meta"):
        model = net()
    apply_lora(model, config=CONFIG)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model.load_state_dict(net().state_dict(), strict=False)
    layer = model.layers[0].q_proj
    assert 0 < layer.lora_A.abs().max() <= 12**-0.5 and not layer.lora_B.any()
    assert torch.equal(model(IDS), net()(IDS))


def test_row53_lazy() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"'0' \(torch.nn.modules.linear.LazyLinear\) is lazy .* run one forward pass"):
        apply_lora(model, config=LoRAConfig(target_modules=["0"]))
    assert type(model[0]) is nn.LazyLinear
    model(torch.ones(1, 3))
    assert type(apply_lora(model, config=LoRAConfig(rank=2, target_modules=["0"]))[0]) is LoRALinear


# Under a Trainer.

FC = LoRAConfig(rank=2, alpha=4, target_modules=["fc1", "fc2"])


def test_row50_a_quantized_base_under_the_callback(tmp_path: Path) -> None:
    """Known at the start, whether it would be merged at the end or not."""
    for merge in (True, False):
        model = LitNet()
        model.net.fc1, model.net.fc2 = Int8Linear(16), nn.Linear(16, 4)
        with refused("net.fc1", "stores its weight as torch.int8", folder=tmp_path):
            trainer(tmp_path, LoRACallback(FC, merge_on_fit_end=merge), max_epochs=1).fit(model)
        assert not model.losses


class EarlyOptimizer(LitNet):
    """Builds its optimizer before there are adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self) -> Any:
        return self.optimizer


class HalfOptimizer(LitNet):
    """Hands one of the two adapted layers over."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.fc1.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (EarlyOptimizer, ("4 parameters", "net.fc1.lora_A", "net.fc2.lora_B", "configure_optimizers", "not in __init__")),
        (HalfOptimizer, ("2 parameters", "net.fc2.lora_A", "net.fc2.lora_B", "get_lora_parameters(self)")),
    ],
    ids=["row54_all", "row54_some"],
)
def test_row54_an_optimizer_without_the_adapters(tmp_path: Path, module: type[LitNet], said: tuple[str, ...]) -> None:
    model = module()
    before = base_bits(model)
    with refused(*said, folder=tmp_path):
        trainer(tmp_path, LoRACallback(FC), ModelCheckpoint(), max_epochs=1).fit(model)
    assert base_bits(model) == before
    assert not model.losses, "before the first step"


class Reentrant(LitNet):
    """The adapted layers run in a re-entrant checkpoint, whose input comes from frozen layers and needs no gradient."""

    head = False

    def step(self, batch: Any) -> Tensor:
        net = self.net
        hidden = net.norm(net.embed(batch[0]))
        inner = (lambda x: net.fc1(x).relu()) if self.head else (lambda x: net.fc2(net.fc1(x).relu()))
        y = checkpoint(inner, hidden, use_reentrant=True)
        return nn.functional.cross_entropy(net.fc2(y) if self.head else y, batch[1])


class ReentrantBody(Reentrant):
    head = True


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize(
    ("module", "batches", "said"),
    [
        (ReentrantBody, 4, ("1 of 2 adapted layers got no gradient in 4 batches", "net.fc1", "exclude_modules")),
        (Reentrant, 1, ("the loss does not depend on any adapter",)),
    ],
    ids=["row55_some_inside", "row55_all_inside"],
)
def test_row55_checkpointing_that_cuts_the_graph(tmp_path: Path, module: type[LitNet], batches: int, said: tuple[str, ...]) -> None:
    """Some layers may be used only now and then, so their lack is told at the end of a short training, which has its checkpoint by then."""
    model = module()
    with refused(*said, "use_reentrant=False", error=RuntimeError, folder=tmp_path if batches == 1 else None):
        trainer(tmp_path, LoRACallback(FC), ModelCheckpoint(), max_epochs=1).fit(model)
    assert len(model.losses) == batches
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, LoRALayer))


@pytest.mark.parametrize(
    "config", [FC, LoRAConfig(**{**FC.to_dict(), "modules_to_save": ["norm"]})], ids=["row63_adapter", "row63_saved_module"]
)
def test_row63_the_best_checkpoint_after_a_merged_fit(tmp_path: Path, config: LoRAConfig) -> None:
    """`fit`, then `test(ckpt_path="best")`: the best epoch's adapter is tested, not the merged last one's, as without a merge."""

    def run(merge: bool) -> tuple[float, float, LitNet]:
        keep = ModelCheckpoint(tmp_path / str(merge), monitor="step", mode="min", filename="{step}")  # the first epoch counts as the best
        torch.manual_seed(0)  # both runs start with the same adapters
        model = LitNet()
        train = trainer(tmp_path, LoRACallback(config, merge_on_fit_end=merge), keep, max_epochs=2)
        train.fit(model)
        assert [layer.merged for layer in model.modules() if isinstance(layer, LoRALayer)] == [merge] * 2
        best = train.test(model, ckpt_path="best", verbose=False)[0]["test"]
        assert "step=4" in keep.best_model_path
        return best, trainer(tmp_path, LoRACallback(config), max_epochs=2).test(model, verbose=False)[0]["test"], model

    merged, again, model = run(True)
    plain, _, _ = run(False)
    assert merged == again == plain
    last = LitNet()
    trainer(tmp_path, LoRACallback(config), max_epochs=2).fit(last)
    assert trainer(tmp_path, max_epochs=1).test(last, verbose=False)[0]["test"] != merged, "the last one's is another number"
    assert base_bits(model).keys() == base_bits(LitNet()).keys()


@pytest.mark.parametrize("merged", [False, True])
def test_row63_an_adapter_loaded_into_a_merged_model(folder: Path, merged: bool) -> None:
    model = adapted(std=0.5)
    if merged:
        merge_lora(model)
    load_adapter(model, folder)
    assert torch.equal(model(IDS), adapted()(IDS))
    assert snapshot(model)["bits"] == snapshot(adapted())["bits"]


def test_row63_the_base_was_not_kept(folder: Path) -> None:
    model = merge_lora(adapted(std=0.5), reversible=False)
    with refused("'layers.0.q_proj' cannot be unmerged", "reversible=False", model=model, folder=folder):
        load_adapter(model, folder, check_base=False)


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_row64_a_resize_that_would_drop_the_adapter(target: str) -> None:
    model = apply_lora(llama(), config=LoRAConfig(rank=2, target_modules=[target]))
    with refused("resize_token_embeddings", "resize before apply_lora", "unload_lora(model)", model=model):
        model.resize_token_embeddings(40)
    unload_lora(model).resize_token_embeddings(40, mean_resizing=False)
    assert model(IDS).logits.shape[-1] == 40


def test_row64_a_resize_beside_the_adapters_is_fine() -> None:
    model = apply_lora(llama(), config=CONFIG)
    before = model(IDS).logits
    model.resize_token_embeddings(40, mean_resizing=False)
    assert torch.equal(model(IDS).logits[..., :32], before)
    assert len(get_lora_parameters(model)) == 4
