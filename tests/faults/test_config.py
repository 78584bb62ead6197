"""A config that cannot be right, refused before there is a model."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_lora import (
    LoRAConfig,
)
from tests.faults.kit import case, refused

BAD_CONFIGS = [
    case(3, "regex", {"target_modules": ["q_proj", "v_(proj"]}, ("target_modules", "'v_(proj'", "not a valid regex", "position 2")),
    case(3, "regex_string", {"target_modules": "*_proj"}, ("target_modules", "'*_proj'", "position 0")),
    case(3, "exclude", {"exclude_modules": ["[a"]}, ("exclude_modules", "'[a'", "position 0")),
    case(3, "rank_pattern", {"rank_pattern": {"(": 4}}, ("rank_pattern", "'('", "position 0")),
    case(5, "list", {"target_modules": []}, ("target_modules=", "names nothing", "'all-linear'")),
    case(5, "string", {"target_modules": ""}, ("target_modules=''", "names nothing")),
    case(5, "entry", {"target_modules": ["q_proj", ""]}, ("target_modules", "''", "non-empty")),
    case(6, "zero", {"rank": 0}, ("rank=0", "whole number ≥ 1")),
    case(6, "negative", {"rank": -4}, ("rank=-4", "whole number ≥ 1")),
    case(6, "pattern", {"rank_pattern": {"q_proj": 0}}, ("rank_pattern['q_proj']=0", "whole number ≥ 1")),
    case(7, "fraction", {"rank": 1.5}, ("rank=1.5", "whole number")),
    case(7, "whole_float", {"rank": 8.0}, ("rank=8.0", "whole number")),
    case(7, "bool", {"rank": True}, ("rank=True", "whole number")),
    case(7, "text", {"rank": "8"}, ("rank='8'", "whole number")),
    case(9, "nan", {"alpha": math.nan}, ("alpha=nan", "finite number > 0")),
    case(9, "inf", {"alpha": math.inf}, ("alpha=inf", "finite number > 0")),
    case(9, "zero", {"alpha": 0}, ("alpha=0", "finite number > 0")),
    case(9, "negative", {"alpha": -1.0}, ("alpha=-1.0", "finite number > 0")),
    case(9, "pattern", {"alpha_pattern": {"q_proj": math.nan}}, ("alpha_pattern['q_proj']=nan", "finite number > 0")),
    case(10, "above", {"dropout": 1.5}, ("dropout=1.5", "[0, 1)")),
    case(10, "one", {"dropout": 1.0}, ("dropout=1.0", "[0, 1)")),
    case(10, "negative", {"dropout": -1}, ("dropout=-1", "[0, 1)")),
    case(10, "nan", {"dropout": math.nan}, ("dropout=nan", "[0, 1)")),
]


@pytest.mark.parametrize(("fields", "said"), BAD_CONFIGS)
def test_bad_config(fields: dict[str, Any], said: tuple[str, ...]) -> None:
    with refused(*said):
        LoRAConfig(**fields)
    LoRAConfig(**{**fields, **{name: getattr(LoRAConfig(), name) for name in fields}})  # it was that field
