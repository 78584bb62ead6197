import re

import pytest
import pytorch_lightning
from jsonargparse import ArgumentError

from lightning_lora.cli.messages import check_not_null, nearest, one_line, usage

UNION = """Parser key "data":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'LightningDataModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'lightning_lora.data.InstructionDataModule':
        Parser key "batch_size":
          Not of type PositiveInt: 0 does not conform to restriction v>0
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='batch_size', val='0')"""
LITERALS = """Parser key "trainer.precision":
  Does not validate against any of the Union subtypes
  Subtypes: [typing.Literal[64, 32], typing.Literal['bf16'], <class 'NoneType'>]
  Errors:
    - Expected a typing.Literal[64, 32]
    - Expected a typing.Literal['bf16']
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: 8"""

INNER = """Parser key "lora.config":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning_lora.config.LoRAConfig'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'lightning_lora.LoRAConfig':
        Parser key "{key}":
          {error}
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {{'rank': 'eight'}}"""
NO_FIELDS = """Parser key "lora.config":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning_lora.config.LoRAConfig'>, <class 'NoneType'>]
  Errors:
    - Not a valid subclass of LoRAConfig
      Subclass types expect one of:
      - a class path (str)
    - Expected a <class 'NoneType'>
  Given value type: <class 'int'>
  Given value: 8"""

CALLBACK = """every_n_steps=0: give a whole number
Not a valid subclass of Callback
Subclass types expect one of:
- a class path (str)
- a dict with class_path entry
- a dict without class_path but with init_args entry (class path given previously)
- a dict with parameters accepted by the base class (implicit class_path)"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (UNION, "data.batch_size: expected a whole number > 0, got 0"),
        (
            INNER.format(key="rank", error="Expected a <class 'int'>. Got value: eight"),
            "lora.config.rank: expected a whole number, got eight",
        ),
        (
            INNER.format(key="rank", error="Not of type PositiveInt: invalid literal for int() with base 10: 'eight'"),
            "lora.config.rank: expected a whole number, got eight",
        ),
        (NO_FIELDS, "lora.config: expected the fields of LoRAConfig, got 8"),
        (LITERALS, "trainer.precision: expected one of 64, 32 or 'bf16', got 8"),
        ("Parser key \"dtype\":\n  Expected a <class 'bool'>. Got value: maybe", "dtype: expected true or false, got maybe"),
        ("unrecognized arguments: --rnk=2", "no option 'rnk'; did you mean 'rank'?"),
        ("unrecognized arguments: you", "'you' is one argument too many; options have names, such as --config run.yaml"),
        (CALLBACK, "every_n_steps=0: give a whole number"),
        ("Parser key \"a.b\":\n  Not of type PositiveFloat: could not convert string to float: 'x'", "a.b: expected a number, got x"),
        (
            'Parser key "top_p":\n  Not of type ClosedUnitInterval: 2 does not conform to restriction v>=0 and v<=1',
            "top_p: expected a number ≥ 0 and ≤ 1, got 2",
        ),
        ("Subcommand 'fit' does not accept option 'a.rnk'", "no option 'a.rnk'; did you mean 'rank'?"),
        ("first\n\n  second", "first second"),
        ("", "ArgumentError"),
    ],
)
def test_one_line(text, line):
    assert one_line(ArgumentError(None, text), ["rank", "alpha"]) == line


def not_a_subclass(given: str) -> str:
    lines = ("Import path does not correspond to a subclass of Callback", "Expected a <class 'NoneType'>")
    return 'Parser key "trainer.callbacks":\n  Errors:\n' + "".join(f"    - {line}\n" for line in lines) + f"  Given value: {given}"


class SecondCallback(pytorch_lightning.Callback):
    """Of the other package."""


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("pytorch_lightning.callbacks.Timer", "this command runs lightning.pytorch, .*; write lightning.pytorch.callbacks.Timer$"),
        ("{'class_path': 'pytorch_lightning.loggers.CSVLogger', 'init_args': {}}", "; write lightning.pytorch.loggers.CSVLogger$"),
        (f"{__name__}.SecondCallback", "SecondCallback is derived from pytorch_lightning.*; derive it from lightning.pytorch's$"),
        ("collections.Counter", "Import path does not correspond to a subclass of Callback, got collections.Counter$"),
    ],
)
def test_a_class_of_the_other_package_is_named(given, hint):
    assert re.search(f"^trainer.callbacks: .*{hint}", one_line(ArgumentError(None, not_a_subclass(given))))


def test_one_dash_and_an_unknown_class():
    known = ["model.model"]
    assert one_line(ArgumentError(None, "unrecognized arguments: -model.model a"), known) == (
        "no option '-model.model'; options begin with two dashes: --model.model"
    )
    unknown = 'Parser key "trainer.callbacks":\n  Expected a dot import path string: EarlyStoping'
    assert one_line(ArgumentError(None, unknown)).endswith("write its import path, as package.module.EarlyStoping")


def test_nearest_knows_names_that_stand_elsewhere():
    assert nearest("rank", ["lora.config.rank", "model.model"]) == "; did you mean 'lora.config.rank'?"
    assert nearest("nothing", ["lora.config.rank"]) == ""


def test_usage_turns_what_means_a_wrong_option():
    for error in (ValueError("a"), ArgumentError(None, "a"), TypeError("a")):
        with pytest.raises(ValueError, match=r"^trainer: a$"), usage(TypeError, where="trainer: "):
            raise error
    with pytest.raises(TypeError), usage():
        raise TypeError("a fault in the code")


def test_null_only_where_none_is_allowed():
    def function(rate: float, name: str | None, limit: int = None, many: int = 3):  # noqa: RUF013
        """Arguments of all kinds."""

    check_not_null(function, {"rate": 1.0, "name": None, "limit": None, "many": 1})
    for wrong in ("rate", "many"):
        with pytest.raises(ValueError, match=f"^model.{wrong}=null: give a value"):
            check_not_null(function, {wrong: None}, "model.")
