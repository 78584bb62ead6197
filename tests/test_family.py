"""Kinds × variants, as `make family` runs them."""

import pytest

from lightning_lora.registry import VARIANTS
from tests.family import CASES, CHECKS, PAIRS, WEIGHTS, refusal

pytestmark = pytest.mark.filterwarnings("ignore:rank=")  # the modules are small


@pytest.mark.parametrize(("kind", "variant"), PAIRS)
def test_every_pair_is_right_or_refused(kind, variant, tmp_path):
    if refusal(kind, variant) is None:
        for check in CHECKS.values():
            check(kind, variant, tmp_path)


def test_every_kind_and_variant_is_there():
    assert {kind for kind, _ in PAIRS} == CASES.keys()
    assert {variant for _, variant in PAIRS} == VARIANTS.keys() <= WEIGHTS.keys()
