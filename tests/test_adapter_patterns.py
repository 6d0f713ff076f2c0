"""Patterns of module names: what Python's own matching finds, in time that none can stretch."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemlax.adapters.patterns import matcher
from gemlax.errors import CheckpointError, UnsupportedError

NAMES = [
    f"model.layers.{i}.{part}.{name}"
    for i in (0, 1, 7, 11, 23)
    for part in ("self_attn", "mlp")
    for name in ("q_proj", "k_proj", "up_proj")
]
# As users of peft write them.
PATTERNS = [
    "q_proj", r"layers\.1\..*", "model.layers.1.mlp.up_proj", r"layers\.[0-9]+\.self_attn\.q_proj",
    r"layers\.(0|1)\..*", r"^model\.layers\.1\..*$", r"layers\.\d{1,2}\.mlp\.(up|down)_proj",
    r"(?:q|k)_proj", r"[^.]+", r".*attn.*", r"layers\.([0-9]|1[0-9])\.mlp\..+", "q_proj|k_proj",
    r"\w+?_proj", r"(?P<kind>self_attn|mlp)\.[qk]_proj", r".*layers\.[7-9]\..*", "x*", "",
]  # fmt: skip


def as_peft(pattern, name):
    """Source: peft 0.21.2, utils/other.py, get_pattern_key."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_of_users_fit_what_they_fit_in_peft(pattern):
    fits = matcher(pattern)
    assert [name for name in NAMES if fits(name)] == [n for n in NAMES if as_peft(pattern, n)]


ATOMS = st.sampled_from(["a", "b", ".", "[ab]", r"\.", "[^a]", r"\w", "ab"])
REPEATS = st.sampled_from(["", "*", "+", "?", "{2}", "{0,1}", "{1,}", "{,2}", "*?"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds(lambda e, r: f"({e}){r}", inner, REPEATS),
        st.builds(lambda a, b: f"{a}{b}", inner, inner),
        st.builds(lambda a, b: f"(?:{a}|{b})", inner, inner),
    ),
    max_leaves=5,
)


@given(EXPRESSIONS, st.text("ab.", max_size=6))
def test_any_expression_fits_what_it_fits_in_python(pattern, name):
    assert matcher(pattern)(name) == as_peft(pattern, name)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*b", "(a|a)" * 30 + "b", "(.*.*.*.*)*x", ".*" * 200 + "x", "(a{1,30}){1,30}b"],
)
def test_no_pattern_takes_exponential_time(pattern):
    begin = time.process_time()
    assert not matcher(pattern)("a" * 80)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    ("pattern", "error", "match"),
    [
        ("(?=a)b", UnsupportedError, "look-arounds"),
        (r"(a)\1", UnsupportedError, r"\\1 is not supported"),
        (r"\bq_proj", UnsupportedError, r"\\b is not supported"),
        ("a*+", UnsupportedError, "inside is not supported"),
        ("a{99999999}", UnsupportedError, "counts too far"),
        ("(" * 60 + "a" + ")" * 60, UnsupportedError, "nested too deeply"),
        ("a" * 3000, UnsupportedError, "a pattern of 3000 characters"),
        ("(a", CheckpointError, "no regular expression"),
        ("a)", CheckpointError, "no regular expression"),
    ],
)
def test_what_cannot_be_followed_is_refused(pattern, error, match):
    with pytest.raises(error, match=match):
        matcher(pattern)
