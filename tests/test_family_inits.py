"""Kinds × inits and variants × inits, as `make family` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.family import CASES, Packed
from tests.family_inits import KIND_PAIRS, NAMES, VARIANT_PAIRS, cell

pytestmark = pytest.mark.filterwarnings("ignore:rank=")  # the modules are small

READ_DATA = ("corda", "eva", "lora_ga")
OF_A_WHOLE = ("mica", "olora", "orthogonal", "pissa", "pissa_niter_4")
SPLIT = (
    "embedding-padding",
    "conv2d-groups",
    "conv2d-reflect",
    "experts",
    "experts, shared_outer",
)  # A and B are in groups, or a row stays zero


def refused(kind: str, variant: str, init: str) -> bool:
    if variant in ("adalora", "lora_xs", "vera"):  # which define their own start
        return init != "kaiming"
    if variant == "lora_bias":  # its files are PEFT's, which has no other start with a bias
        return init not in ("kaiming", "gaussian", "orthogonal")
    if (variant, init) == ("lora_fa", "mica"):  # together they would freeze A and B
        return True
    if init == "loftq":
        return not isinstance(CASES[kind], Packed)
    return (init in READ_DATA and "linear" not in kind and kind != "hf-conv1d") or (init in OF_A_WHOLE and kind in SPLIT)


@pytest.mark.parametrize(("kind", "variant", "init"), [*KIND_PAIRS, *VARIANT_PAIRS])
def test_every_pair_is_right_or_refused(kind: str, variant: str, init: str, tmp_path: Path) -> None:
    assert (cell(kind, variant, init, tmp_path) == "refused") == refused(kind, variant, init)


def test_every_init_is_there() -> None:
    assert {*READ_DATA, *OF_A_WHOLE, "kaiming", "gaussian", "loftq"} == {*NAMES}
