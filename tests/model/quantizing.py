"""What the tests of quantize_base run over: one config, every format, both ways to merge."""

from __future__ import annotations

import pytest

from tests.quantized import QUANTIZERS

CONFIG = {"rank": 4, "alpha": 8, "target_modules": ["up", "down"]}
each_format = pytest.mark.parametrize("how", QUANTIZERS)
both_ways = pytest.mark.parametrize("quantized", ["dequantize", "requantize"])
