"""Regular expressions out of other people's files, matched in bounded time.

Python's `re` tries combinations: `.?` sixty times in a row keeps it busy for years. Here a pattern
runs over all names at once with a set of positions, one bit each, so no position is tried twice in
a step; steps are counted and end at `MAX_STEPS`.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from vision_jax.errors import UserError

MAX_LENGTH = 1_000  # characters of a pattern
MAX_DEPTH = 20  # of groups in one another
MAX_STEPS = 300_000  # of a `Matcher`, one for each character of a pattern that is passed

Node = tuple[Any, ...]  # see _parse

# A group's beginning, an escaped character, a class of characters, a number of repetitions, or any
# other character. What `re` has besides (assertions, back references, flags) is no token.
_TOKEN = re.compile(
    r"\((?:\?:)?(?!\?)|\\[dDwWsS_]|\\[^\w\s]|\[\^?\]?(?:\\.|[^]\\[])*\]|\{\d+(?:,\d*)?\}|\{,\d+\}"
    r"|[^\\\[\](){}]|\)"
)


class Matcher:
    """Matches names against patterns as PEFT does: `re.match(rf"(.*\\.)?({pattern})$", name)`."""

    def __init__(self, names: Sequence[str]):
        """`names` are matched all at once; none has a line break."""
        self._names = names
        text = "".join(f"{name}\n" for name in names)
        self._characters: dict[str, int] = {}  # where each stands
        for position, character in enumerate(text):
            self._characters[character] = self._characters.get(character, 0) | 1 << position
        self._ends = self._characters.pop("\n", 0)
        self._starts = (self._ends << 1 | 1) & ((1 << len(text)) - 1)
        self._masks: dict[str, int] = {}  # where each token matches
        self._steps = MAX_STEPS

    def matches(self, pattern: str) -> list[str]:
        """The names that the pattern matches, from their start or behind a dot to their end.

        Examples:
          >>> matcher = Matcher(["blocks.0.attn.qkv", "blocks.11.attn.qkv", "head"])
          >>> matcher.matches(r"\\d\\d.*(qkv|k)")
          ['blocks.11.attn.qkv']

        Raises:
          UserError: no regular expression, one with parts that have no place here (look-ahead, back
            references, flags), or more work than `MAX_STEPS`.
        """
        node = _parse(pattern)
        after_dots = self._characters.get(".", 0) << 1
        ends = self._run(node, self._starts | after_dots) & self._ends
        found = []
        for name in self._names:
            ends >>= len(name)
            if ends & 1:
                found.append(name)
            ends >>= 1
        return found

    def _run(self, node: Node, positions: int) -> int:
        """The positions behind what `node` matches from `positions` on."""
        kind, *parts = node
        self._steps -= 1
        if self._steps < 0:
            raise UserError("the patterns ask for too much work")
        if kind == "token":
            return self._pass(parts[0], positions)
        if kind == "any":
            reached = 0
            for part in parts:
                reached |= self._run(part, positions)
            return reached
        if kind == "all":
            for part in parts:
                positions = self._run(part, positions)
            return positions
        part, low, high = parts
        done = 0
        while done < low and positions:
            positions, done = self._run(part, positions), done + 1
        reached = positions
        while done < high and positions:  # only what is new goes on
            positions, done = self._run(part, positions) & ~reached, done + 1
            reached |= positions
        return reached

    def _pass(self, token: str, positions: int) -> int:
        if token == "^":
            return positions & self._starts
        if token == "$":
            return positions & self._ends
        if token not in self._masks:
            one = re.compile(token)
            masks = [mask for character, mask in self._characters.items() if one.match(character)]
            self._masks[token] = sum(masks)  # they have no bit in common
        return (positions & self._masks[token]) << 1


def _parse(pattern: str) -> Node:
    """("token", text), ("any", *nodes), ("all", *nodes) or ("repeat", node, least, most)."""
    tokens, position = [], 0
    while position < len(pattern) and len(pattern) <= MAX_LENGTH:
        found = _TOKEN.match(pattern, position)
        if found is None:
            break
        tokens.append(found[0])
        position = found.end()
    try:
        if position < len(pattern):
            raise ValueError
        for token in tokens:
            if token[0] in "[\\":
                re.compile(token)
        node, rest = _alternatives([*tokens, ""], 0, 0)
        if rest < len(tokens):
            raise ValueError
    except (ValueError, re.error):
        raise UserError(
            f"{pattern[:80]!r} is no regular expression of characters, classes, groups and "
            f"repetitions, of at most {MAX_LENGTH} characters"
        ) from None
    return node


def _alternatives(tokens: list[str], position: int, depth: int) -> tuple[Node, int]:
    if depth > MAX_DEPTH:
        raise ValueError
    options: list[Node] = []
    items: list[Node] = []
    while (token := tokens[position]) not in ("", ")"):
        position += 1
        if token == "|":
            options.append(("all", *items))
            items = []
        elif token.startswith("("):
            node, position = _alternatives(tokens, position, depth + 1)
            if tokens[position] != ")":
                raise ValueError
            position += 1
            items.append(node)
        elif token in ("*", "+", "?") or token.startswith("{"):
            if not items or items[-1][0] == "repeat" or items[-1][1:] in (("^",), ("$",)):
                raise ValueError
            items[-1] = ("repeat", items[-1], *_bounds(token))
            if tokens[position] == "?":  # as few as possible: the same names match
                position += 1
        else:
            items.append(("token", token))
    return ("any", *options, ("all", *items)), position


def _bounds(token: str) -> tuple[float, float]:
    if token[0] != "{":
        return {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}[token]
    low, comma, high = token[1:-1].partition(",")
    least = int(low or 0)
    most = int(high) if high else math.inf if comma else least
    if most < least:
        raise ValueError
    return least, most
