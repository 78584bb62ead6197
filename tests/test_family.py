"""Kinds × variants, as `make family` runs them."""

import pytest

from lightning_lora.registry import VARIANTS
from tests.docs.pages import table
from tests.family import CASES, CHECKS, PAIRS, WEIGHTS, cell, refusal

pytestmark = pytest.mark.filterwarnings("ignore:rank=")  # the modules are small


@pytest.mark.parametrize(("kind", "variant"), PAIRS)
def test_every_pair_is_right_or_refused_as_the_page_says(kind, variant, tmp_path):
    refused = refusal(kind, variant) is not None
    results = {} if refused else {name: check(kind, variant, tmp_path) or "passed" for name, check in CHECKS.items()}
    assert cell(results) == table("family", "kind")[kind][variant]


def test_every_kind_and_variant_is_there():
    assert {kind for kind, _ in PAIRS} == CASES.keys()
    assert {variant for _, variant in PAIRS} == VARIANTS.keys() <= WEIGHTS.keys()
