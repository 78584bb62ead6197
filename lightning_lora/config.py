"""``LoRAConfig``: which modules to adapt and how. Validated at creation, immutable afterwards.

The field names are the usual terms: rank, alpha, dropout, target modules. ``init`` and ``variant`` name code in other files. They are
looked up in :mod:`lightning_lora.registry` when they are used, so a new one needs no change here.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import wraps
from typing import Any, Literal, TypeVar

from lightning_lora.utils.patterns import compile_pattern, compile_patterns
from lightning_lora.utils.peft_words import in_our_words

Config = TypeVar("Config")

ALL_LINEAR = "all-linear"

SCALINGS: dict[str, Callable[[float, float], float]] = {
    "standard": lambda alpha, rank: alpha / rank,  # LoRA, arXiv:2106.09685, section 4.1
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),  # rsLoRA, arXiv:2312.03732, equation 3
}


def _knows_other_names(cls: type[Config]) -> type[Config]:
    """Let a dataclass say what a field that it lacks is called here. Its signature stays."""
    init = cls.__init__

    @wraps(init)
    def checked(self: Config, *args: Any, **given: Any) -> None:
        names = cls.__dataclass_fields__  # type: ignore[attr-defined]
        for name in given.keys() - names.keys():
            near = difflib.get_close_matches(name, names, 1, 0.7)
            hint = in_our_words(name) or (f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}.")
            raise TypeError(f"{cls.__name__} has no field {name!r}: {hint}")
        init(self, *args, **given)

    cls.__init__ = checked  # type: ignore[method-assign, assignment]
    return cls


@_knows_other_names
@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Configuration of the adapter: ``h = W₀x + scaling · B·A·dropout(x)`` on every module that matches ``target_modules``.

    Its fields cannot be set: make another config with ``dataclasses.replace``. Its mappings are copies, as plain dicts, because parsers
    and pickles need these. Do not modify them: nothing would validate the change.

    Args:
        rank: r, the inner dimension of the update; a whole number ≥ 1.
        alpha: numerator of the scaling, finite and > 0.
        dropout: probability of zeroing an entry of the adapter's input (never of the base's), in [0, 1).
        target_modules: a list of names or regexes (see :mod:`lightning_lora.utils.patterns`), one regex string over the whole module
            name, or ``"all-linear"``: every linear layer and all experts, except the output head and routers. ``q_proj``, ``k_proj``,
            ``v_proj``, ``gate_proj`` and ``up_proj`` name slices where a model has one fused projection
            (:mod:`lightning_lora.utils.fused_layouts`).
        exclude_modules: names or regexes of modules that are never adapted, even if targeted.
        layers: adapt only in blocks with these indices (the first number in a module's name).
        bias: which biases train: ``none``, ``all`` of the model, or ``lora_only``, those of adapted layers.
        rank_pattern: pattern → rank, overriding ``rank``. The first pattern that matches a module applies.
        alpha_pattern: pattern → alpha, overriding ``alpha`` in the same way.
        kind_pattern: pattern → name of a registered kind, for modules whose type does not tell how to read their shape. An example is
            one linear for q, k and v. The first pattern that matches applies.
        modules_to_save: modules, or parameters outside them, that are trained in full and saved with the adapter. ``"auto"``: what the
            checkpoint of a Hugging Face model did not contain, such as a new head; ``[]``: none.
        trainable_token_indices: rows of embeddings that train and are saved, such as those of added tokens: a list for the input
            embedding, or name of a module → list. Modules tied to it follow (:mod:`lightning_lora.layers.token_rows`).
        scaling: ``standard`` α/r, or ``rslora`` α/√r.
        init: how A and B are initialized, a name in the registry: ``kaiming`` (A uniform in ±1/√fan_in, B zero), ``gaussian``,
            ``orthogonal``, ``pissa``, ``pissa_niter_[n]``, ``olora``, ``mica``, ``loftq`` (for a base that is quantized here); ``eva``,
            ``lora_ga`` and ``corda`` read batches (:mod:`lightning_lora.inits`).
        init_options: option → value, for inits with options, such as ``{"mode": "kpm"}``. The init's function documents them.
        variant: formula of the update, a name in the registry: ``plain``, ``dora``, ``lora_fa``, ``lora_xs``, ``adalora``, ``vera``,
            ``lora_bias`` (:mod:`lightning_lora.variants`).
        variant_options: option → value, for variants with options. The variant's class documents them.
        kind_options: name of a kind → option → value, for kinds with options: ``{"experts": {"shared_outer": True}}``
            (:class:`~lightning_lora.layers.experts.LoRAExperts`).
        allow_unmatched: accept patterns that match nothing, if others match.

    Raises:
        ValueError: a field is out of range. The message names the field, the value and what is allowed.
        TypeError: there is no field of a name. For one of PEFT's the message says what it is called here.

    Examples:
        >>> config = LoRAConfig(rank=16, alpha=32, target_modules="all-linear", rank_pattern={"down_proj": 8})
        >>> config.scaling_of(rank=16, alpha=32)
        2.0
        >>> LoRAConfig(dropout=1.5)
        Traceback (most recent call last):
        ValueError: dropout=1.5: give a probability in [0, 1), such as 0.05.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: Sequence[str] | str = ("q_proj", "v_proj")
    exclude_modules: Sequence[str] | str = ()
    layers: Sequence[int] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    kind_pattern: dict[str, str] = field(default_factory=dict)
    modules_to_save: Sequence[str] | Literal["auto"] = "auto"
    trainable_token_indices: Sequence[int] | dict[str, Sequence[int]] | None = None
    scaling: Literal["standard", "rslora"] = "standard"
    init: str = "kaiming"
    variant: str = "plain"
    variant_options: dict[str, Any] = field(default_factory=dict)
    kind_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    allow_unmatched: bool = False
    init_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Convert what YAML, argparse or JSON gave to plain, comparable values.
        for name in ("target_modules", "exclude_modules", "layers", "modules_to_save"):
            object.__setattr__(self, name, _sequence(name, getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern", "kind_pattern", "variant_options", "kind_options", "init_options"):
            object.__setattr__(self, name, _mapping(name, getattr(self, name)))
        own = {kind: _mapping(f"kind_options[{kind!r}]", options) for kind, options in self.kind_options.items()}
        object.__setattr__(self, "kind_options", {kind: options for kind, options in own.items() if options})
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha), ("kind_pattern", _check_name)):
            for pattern, value in getattr(self, name).items():
                compile_pattern(pattern, name)
                check(f"{name}[{pattern!r}]", value)
        _check_rank("rank", self.rank)
        _check_alpha("alpha", self.alpha)
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: give a probability in [0, 1), such as 0.05.")
        if not self.target_modules:
            raise ValueError(
                f"target_modules={self.target_modules!r} names nothing; give names such as ['q_proj', 'v_proj'] or 'all-linear'."
            )
        if self.target_modules != ALL_LINEAR:
            compile_patterns(self.target_modules, "target_modules")
        compile_patterns(self.exclude_modules, "exclude_modules")
        if self.modules_to_save != "auto":
            if isinstance(self.modules_to_save, str):
                raise ValueError(f"modules_to_save={self.modules_to_save!r}: give a list of names, or 'auto'.")
            compile_patterns(self.modules_to_save, "modules_to_save")
        if self.layers is not None and (isinstance(self.layers, str) or not self.layers or not all(map(_is_index, self.layers))):
            raise ValueError(f"layers={self.layers!r}: give block indices ≥ 0 such as [0, 1], or None for all.")
        object.__setattr__(self, "trainable_token_indices", _token_indices(self.trainable_token_indices))
        for name, allowed in (("bias", ("none", "all", "lora_only")), ("scaling", tuple(SCALINGS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}.")
        if not isinstance(self.allow_unmatched, bool):
            raise ValueError(f"allow_unmatched={self.allow_unmatched!r}: give True or False.")
        for name in ("init", "variant"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: give a registered name, such as {LoRAConfig.__dataclass_fields__[name].default!r}."
                )
        for name in ("alpha", "dropout"):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "alpha_pattern", {name: float(value) for name, value in self.alpha_pattern.items()})

    def scaling_of(self, rank: float, alpha: float) -> float:
        """Return the factor of ``B·A`` for a layer of this rank and alpha."""
        return SCALINGS[self.scaling](alpha, rank)

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of plain types only, for checkpoints. ``LoRAConfig(**d)`` is the inverse."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def differences(self, other: LoRAConfig) -> list[str]:
        """Return the differing fields, as one ``field: mine != theirs`` per entry. Empty if both adapt the same way."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.name != "allow_unmatched")
        return [f"{name}: {mine!r} != {theirs!r}" for name, mine, theirs in pairs if mine != theirs]


def checked_config(config: object) -> LoRAConfig:
    """Return a config as it is, and the default one for None.

    Raises:
        ValueError: it is something else, such as a dict.
    """
    if config is None:
        return LoRAConfig()
    if not isinstance(config, LoRAConfig):
        how = "LoRAConfig(**config)" if isinstance(config, Mapping) else "a LoRAConfig, such as LoRAConfig(rank=8)"
        raise ValueError(f"config={config!r}: give {how}.")
    return config


def _sequence(name: str, value: Any) -> Any:
    """Return the value of a list field as a tuple.

    A string stays a string. None becomes an empty tuple, except for ``layers``, where it stays None and means all.
    """
    if value is None:
        return None if name == "layers" else ()
    if not isinstance(value, (str, Sequence)) and not isinstance(value, (set, frozenset)):
        raise ValueError(f"{name}={value!r}: give a list.")
    return value if isinstance(value, str) else tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        key = "kind" if name == "kind_options" else "option" if "options" in name else "pattern"
        raise ValueError(f"{name}={value!r}: give a mapping from {key} to {'its options' if key == 'kind' else 'value'}.")
    return dict(value or {})


def _token_indices(value: Any) -> Any:
    """Return the rows as a tuple, or as a dict of lists; None for no rows."""
    if isinstance(value, Mapping):
        for name, rows in value.items():
            compile_pattern(name, "trainable_token_indices")
            _check_rows(f"trainable_token_indices[{name!r}]", rows)
        return {name: list(rows) for name, rows in value.items()} or None
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return None
    _check_rows("trainable_token_indices", value)
    return tuple(value)


def _check_rows(name: str, value: Any) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"{name}={value!r}: give a list of row numbers such as [32000, 32001].")
    for row in value:
        if not _is_index(row):
            raise ValueError(f"{name}: {row!r} is no row number; rows are whole numbers ≥ 0, counted from the first.")
    if twice := [row for row, times in Counter(value).items() if times > 1]:
        raise ValueError(f"{name}: row {twice[0]} is there twice; name each row once.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -sys.float_info.max <= value <= sys.float_info.max


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_rank(name: str, value: object) -> None:
    if not _is_index(value) or not 0 < value < 2**31:  # type: ignore[operator]
        raise ValueError(f"{name}={value!r}: the rank is a whole number ≥ 1, such as 8.")


def _check_name(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}={value!r}: give the name of a registered kind, such as 'linear'.")


def _check_alpha(name: str, value: object) -> None:
    if not _is_number(value) or not value > 0:  # type: ignore[operator]
        raise ValueError(f"{name}={value!r}: alpha is a finite number > 0, such as 16.")
