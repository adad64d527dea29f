"""Patterns of adapters against Python's `re`, and how much work they may ask for."""

import re
import time

import pytest

from vision_jax.convert.patterns import Matcher
from vision_jax.errors import UserError

NAMES = ["a.b", "ab", "a", "b.a.ab", "aab.b1", "1.b", "b.bb.bbb"]
PIECES = [*"ab.1()|*+?^$", "(?:", r"\.", r"\d", "[ab]", "[^a]", "{2}", "{1,2}", "{,1}", "*?"]


def test_random_patterns_match_what_re_matches(rng):
    compared = 0
    for _ in range(8_000):
        pattern = "".join(rng.choice(PIECES, rng.integers(1, 9)))
        try:
            re.compile(pattern)  # "a)(b" is one in PEFT's parentheses alone
            whole = re.compile(rf"(.*\.)?({pattern})$")  # and "(?a)" outside of them alone
        except re.error:
            with pytest.raises(UserError):
                Matcher(NAMES).matches(pattern)
            continue
        expected = [name for name in NAMES if whole.match(name)]
        try:
            matched = Matcher(NAMES).matches(pattern)
        except UserError:
            assert re.search(r"[*+?}]\+", pattern), pattern  # possessive: not here
            continue
        assert matched == expected, pattern
        compared += 1
    assert compared > 1_000


@pytest.mark.parametrize(
    "pattern",
    [
        ".?" * 60 + "Z",
        "(a+)+b",
        "(a|a)*b",
        "((((.*)*)*)*)*Z",
        "(.*o){100}Z",
    ],
)
def test_what_keeps_re_busy_for_ever_ends_at_once(pattern):
    names = [f"vit.layers.{i}.attention.{part}_proj" for i in range(48) for part in "qkvo"]
    start = time.process_time()
    assert Matcher(names).matches(pattern) == []
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "pattern", ["(", ")", "a)|(b", "[", "*a", r"(a)\1", "(?i)a", "(?=a)b", "a" * 1001]
)
def test_what_is_no_regular_expression_here_is_refused(pattern):
    with pytest.raises(UserError, match="is no regular expression"):
        Matcher(NAMES).matches(pattern)


def test_patterns_that_ask_for_too_much_are_refused_soon():
    names = [f"vit.layers.{i}.attention.{part}_proj" for i in range(48) for part in "qkvo"]
    start = time.process_time()
    with pytest.raises(UserError, match="too much work"):
        Matcher(names).matches("(.{0,99999}){99999}Z")
    assert time.process_time() - start < 5
