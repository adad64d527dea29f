"""Naming the arrays of a parameter tree, and choosing among them by rule.

A path is the '/'-joined way from the root to one array: `block_0/attn/qkv/kernel`. The arrays of a
structured leaf are named by its fields: `block_0/attn/qkv/kernel/base`, `.../kernel/a` and so on.
Rules are regular expressions that must match a whole path.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from vision_jax.errors import UserError

Flat = dict[str, Any]


def flatten(tree: Any) -> Flat:
    """All arrays of a tree by path, in the tree's own order.

    Examples:
      >>> flatten({"head": {"bias": 1, "kernel": 2}})
      {'head/bias': 1, 'head/kernel': 2}
    """
    return {
        "/".join(_name(key) for key in keys): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def unflatten(like: Any, flat: Mapping[str, Any]) -> Any:
    """The tree of `like`'s structure with the arrays of `flat`; both must have the same paths."""
    names = list(flatten(like))
    if set(names) != set(flat):
        missing, extra = sorted(set(names) - set(flat)), sorted(set(flat) - set(names))
        raise KeyError(f"paths differ: missing {missing[:5]}, unexpected {extra[:5]}")
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in names])


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dicts of plain arrays by path.

    Examples:
      >>> nest({"head/bias": 1, "head/kernel": 2})
      {'head': {'bias': 1, 'kernel': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        below = tree
        for parent in parents:
            below = below.setdefault(parent, {})
        below[name] = leaf
    return tree


def select(
    paths: Iterable[str],
    rules: Sequence[str],
    *,
    field: str,
    strict: bool = True,
    kind: str = "parameter",
) -> set[str]:
    """The paths that at least one rule matches whole; each rule must match something.

    Args:
      paths: paths to choose among.
      rules: regular expressions.
      field: the config field that the rules come from, for the error message.
      strict: False takes rules that match nothing, too.
      kind: what paths are of, for the error message.

    Raises:
      UserError: a rule that is no regular expression, or that matches nothing (with the nearest).
    """
    paths = list(paths)
    chosen: set[str] = set()
    for rule in rules:
        try:
            pattern = re.compile(rule)
        except re.error as error:
            raise UserError(f"{field}: {rule!r} is not a regular expression: {error}") from None
        matched = {path for path in paths if pattern.fullmatch(path)}
        if strict and not matched:
            raise UserError(f"{field}: rule {rule!r} matches no {kind}{_nearest(rule, paths)}")
        chosen |= matched
    return chosen


def partition(flat: Flat, chosen: set[str]) -> tuple[Flat, Flat]:
    """Splits into (chosen, the rest), keeping the order."""
    return (
        {path: leaf for path, leaf in flat.items() if path in chosen},
        {path: leaf for path, leaf in flat.items() if path not in chosen},
    )


def _nearest(rule: str, paths: Sequence[str]) -> str:
    literal = re.sub(r"\\d\+?|\.\*|[\\()|?^$\[\]]", "", rule)
    near = difflib.get_close_matches(literal, paths, n=1, cutoff=0.0)
    return f"; the nearest path is {near[0]!r}" if near else ""


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
