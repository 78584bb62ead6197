"""How one entry of a config matches module names."""

import pytest

from lightning_lora.utils.patterns import compile_pattern, compile_patterns, grouped, is_regex, layer_index, no_match, starred


@pytest.mark.parametrize(
    ("entry", "fqn", "expected"),
    [
        ("q_proj", "q_proj", True),
        ("q_proj", "layers.0.attn.q_proj", True),
        ("q_proj", "layers.0.attn.my_q_proj", False),  # a whole name, not a suffix of characters
        ("q_proj", "q_proj.inner", False),
        ("attn.q_proj", "layers.0.attn.q_proj", True),
        ("attn.q_proj", "layers.0.attnxq_proj", False),  # the dot is a dot
        ("attn.q_proj", "layers.0.cross_attn.q_proj", False),
        (r"layers\.[01]\.q", "layers.1.q", True),
        (r"layers\.[01]\.q", "model.layers.1.q", False),  # a regex is held against the whole name
        (r".*\.(q|v)_proj", "layers.0.v_proj", True),
        (r".*\.(q|v)_proj", "v_proj", False),
        ("q_proj|v_proj", "v_proj", True),
    ],
)
def test_matching(entry, fqn, expected):
    assert compile_pattern(entry, "target_modules").matches(fqn) is expected


@pytest.mark.parametrize("char", list("^$*+?{}[]\\|()"))
def test_metacharacters_make_a_regex(char):
    assert is_regex(f"q{char}proj")


def test_a_dot_alone_makes_no_regex():
    assert not is_regex("self_attn.q_proj")


def test_one_string_is_a_regex_over_the_whole_name():
    (pattern,) = compile_patterns("q_proj", "target_modules")
    assert pattern.matches("q_proj")
    assert not pattern.matches("layers.0.q_proj")
    (dotted,) = compile_patterns("a.b", "target_modules")
    assert dotted.matches("axb")


def test_a_list_keeps_its_order_and_what_the_user_wrote():
    patterns = compile_patterns(["v_proj", r".*\.q"], "target_modules")
    assert [p.text for p in patterns] == ["v_proj", r".*\.q"]


@pytest.mark.parametrize("entry", ["", None, 3, ("q",)])
def test_what_is_no_name_is_refused(entry):
    with pytest.raises(ValueError, match=r"exclude_modules: .* is not a module name or regex; give a non-empty string"):
        compile_pattern(entry, "exclude_modules")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("q_proj, v_proj", " Several names are a list: ['q_proj', 'v_proj']. (allow"),
        ("q_proj", " give a list: ['q_proj']. (allow"),
        ("all_linear", " For all linear layers write target_modules: all-linear. (allow"),
        (r"q_proj{1,2}", " q_proj, k_proj. (allow"),
    ],
)
def test_what_matches_nothing_is_told_what_was_meant(text, hint):
    assert hint in no_match("target_modules", text, ["layers.0.q_proj", "layers.0.k_proj"])


def test_an_invalid_regex_says_where():
    with pytest.raises(ValueError, match=r"target_modules: 'layers\.\(q' is not a valid regex: .* at position 7"):
        compile_patterns(["layers.(q"], "target_modules")


@pytest.mark.parametrize(
    ("fqn", "index"),
    [("model.layers.3.mlp", 3), ("layers.12.experts.4.up", 12), ("lm_head", None), ("block3.mlp", None), ("0.weight", 0)],
)
def test_layer_index_is_the_first_whole_number(fqn, index):
    assert layer_index(fqn) == index


@pytest.mark.parametrize(
    ("name", "shown"),
    [("layers.3.q", "layers.*.q"), ("0.q", "*.q"), ("12", "*"), ("h.1.0.2", "h.*.*.*"), ("conv1.q2", "conv1.q2"), ("", "")],
)
def test_starred_names_have_a_star_per_number(name, shown):
    assert starred(name) == shown


def test_names_are_grouped_in_their_order():
    assert grouped(["1.q", "0.k", "0.q"]) == {"*.q": ["1.q", "0.q"], "*.k": ["0.k"]}
