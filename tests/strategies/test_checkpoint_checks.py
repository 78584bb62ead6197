"""``fit(ckpt_path=...)`` checks what ``load_adapter`` checks: each edit of a checkpoint is one line from both, and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, load_adapter
from tests.conftest import snapshot
from tests.lit import CONFIG, LitNet, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Be aware that when using `ckpt_path`")
A = "net.fc1.lora_A"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("trained")
    run = trainer(folder, LoRACallback(CONFIG, merge_on_fit_end=False), max_epochs=1)
    run.fit(LitNet())
    run.save_checkpoint(folder / "c.ckpt")
    return torch.load(folder / "c.ckpt", weights_only=True)


def meta(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["lightning_lora"].update(fields)


def config(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["lightning_lora"]["config"].update(fields)


def base(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["lightning_lora"]["base"].update(fields)


def tensor(change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["state_dict"].update({A: change(content["state_dict"][A])})


def put(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(fields)


UNREADABLE = "its lightning_lora metadata is not readable"
EDITS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "newer": (meta(format_version=2), "has format version 2, this lightning-lora reads up to 1"),
    "version text": (meta(format_version="1"), UNREADABLE),
    "no version": (lambda content: content["lightning_lora"].pop("format_version"), UNREADABLE),
    "config is a list": (meta(config=[1]), UNREADABLE),
    "no base": (lambda content: content["lightning_lora"].pop("base"), UNREADABLE),
    "base is a list": (meta(base=[1]), UNREADABLE),
    "fingerprint": (base(fingerprint=3), UNREADABLE),
    "base class": (base(**{"class": None}), UNREADABLE),
    "root is a list": (meta(root=[1]), UNREADABLE),
    "beside": (meta(beside=3), UNREADABLE),
    "beside entry": (meta(beside=[3]), UNREADABLE),
    "all of it": (put(lightning_lora=[1]), UNREADABLE),
    "new field": (config(new_field=1), UNREADABLE),
    "variant": (config(variant="x"), "variant='x' is not known"),
    "variant list": (config(variant=["x"]), r"variant=\['x'\]: give a registered name"),
    "init": (config(init="x"), "init='x' is not known"),
    "rank": (config(rank=0), "rank=0: the rank is a whole number"),
    "huge alpha": (config(alpha=10**400), "alpha is a finite number"),
    "options": (config(variant_options={"x": 1}), "is not known to variant='plain'"),
    "no state": (put(state_dict=None), "its state_dict is no mapping"),
    "numbers as names": (put(state_dict={1: torch.ones(1)}), "its state_dict is no mapping"),
    "NaN": (tensor(lambda a: a * float("nan")), "holds NaN or infinity"),
    "infinity": (tensor(lambda a: a / 0), "holds NaN or infinity"),
    "integers": (tensor(lambda a: a.int()), "has integer numbers"),
    "booleans": (tensor(lambda a: a.bool()), "has boolean numbers"),
    "complex": (tensor(lambda a: a.cfloat()), "has complex numbers"),
    "shape": (tensor(lambda a: a[:, :-1]), "has shape"),
    "transposed": (tensor(lambda a: a.mT), "has shape"),
    "sparse": (tensor(lambda a: a.to_sparse()), "torch.sparse_coo"),
    "no values": (tensor(lambda a: a.to("meta")), "the meta device"),
    "text": (tensor(lambda a: "x"), "is of type str in the checkpoint|1 tensor is missing"),
    "gone": (lambda content: content["state_dict"].pop(A), "lacks 1 trained tensor|1 tensor is missing"),
    "more": (lambda content: content["state_dict"].update({"net.fc9.lora_A": torch.ones(2)}), r"fc9\.lora_A"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_checkpoint_is_refused_by_both(content: dict[str, Any], tmp_path: Path, edit: str) -> None:
    change, message = EDITS[edit]
    edited = copy.deepcopy(content)
    change(edited)
    torch.save(edited, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=message) as one:
        load_adapter(LitNet(), tmp_path / "x.ckpt")
    module = LitNet()
    before = snapshot(module)
    with pytest.raises(ValueError, match=message) as two:
        trainer(tmp_path, LoRACallback(CONFIG, merge_on_fit_end=False), max_epochs=2).fit(module, ckpt_path=tmp_path / "x.ckpt")
    assert "\n" not in f"{one.value}{two.value}" and not module.losses
    assert snapshot(module)["bits"] == before["bits"]


def test_a_refused_checkpoint_leaves_a_merged_module_merged(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "good.ckpt")
    EDITS["shape"][0](edited := copy.deepcopy(content))
    torch.save(edited, tmp_path / "bad.ckpt")
    run, module = trainer(tmp_path, LoRACallback(CONFIG), max_epochs=1), LitNet()
    run.fit(module)
    before = snapshot(module)
    with pytest.raises(ValueError, match="has shape"):
        run.test(module, ckpt_path=tmp_path / "bad.ckpt", verbose=False)
    assert snapshot(module)["bits"] == before["bits"] and snapshot(module)["merged"] == before["merged"]
    run.test(module, ckpt_path=tmp_path / "good.ckpt", verbose=False)
    assert not any(snapshot(module)["merged"].values())


class Tied(LitNet):
    """The head is used twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.again = self.head


def test_two_values_for_one_parameter_are_refused(tmp_path: Path) -> None:
    def callback() -> LoRACallback:
        return LoRACallback(LoRAConfig(rank=2, target_modules=["fc1"]), module="net", merge_on_fit_end=False, check_gradients=False)

    run = trainer(tmp_path, callback(), max_epochs=1)
    run.fit(Tied())
    run.save_checkpoint(tmp_path / "c.ckpt")
    saved = torch.load(tmp_path / "c.ckpt", weights_only=True)
    for change, refused in ((0.0, False), (1.0, True)):
        saved["state_dict"]["again.weight"] = saved["state_dict"]["head.weight"] + change
        torch.save(saved, tmp_path / "two.ckpt")
        again = trainer(tmp_path, callback(), max_epochs=2)
        if refused:
            with pytest.raises(
                ValueError, match=r"again\.weight and head\.weight are one parameter here, and the checkpoint has two values"
            ):
                again.fit(Tied(), ckpt_path=tmp_path / "two.ckpt")
        else:
            again.fit(Tied(), ckpt_path=tmp_path / "two.ckpt")


@pytest.mark.parametrize("states", [None, {}, [None], [{"state": {}}], []])
def test_optimizer_states_that_are_none_are_refused(content: dict[str, Any], tmp_path: Path, states: Any) -> None:
    torch.save({**content, "optimizer_states": states}, tmp_path / "x.ckpt")
    with pytest.raises(
        ValueError,
        match=r"x\.ckpt: (optimizer_states is .*, which Lightning does not|the checkpoint's optimizer_states are not|the checkpoint has 0)",
    ):
        trainer(tmp_path, LoRACallback(CONFIG), max_epochs=2).fit(LitNet(), ckpt_path=tmp_path / "x.ckpt")


@pytest.mark.parametrize(("odd", "said"), [(lambda t: t.to("meta"), "on the meta device"), (lambda t: t.to_sparse(), "torch.sparse_coo")])
def test_a_tensor_without_plain_values_is_refused(content: dict[str, Any], tmp_path: Path, odd: Any, said: str) -> None:
    tensors = content["state_dict"]
    torch.save({**content, "state_dict": {**tensors, "net.norm.running_mean": odd(tensors["net.norm.running_mean"])}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=f"net.norm.running_mean is .*{said}"):
        trainer(tmp_path, LoRACallback(CONFIG), max_epochs=2).fit(LitNet(), ckpt_path=tmp_path / "x.ckpt")


def test_a_checkpoint_that_leaves_out_its_root_is_of_the_whole_module(content: dict[str, Any], tmp_path: Path) -> None:
    meta = {name: value for name, value in content["lightning_lora"].items() if name != "root"}
    torch.save({**content, "lightning_lora": meta}, tmp_path / "x.ckpt")
    trainer(tmp_path, LoRACallback(CONFIG), max_epochs=1).fit(LitNet(), ckpt_path=tmp_path / "x.ckpt")
