"""`vision_jax models`: the models whose weights can be loaded by name.

The counts of parameters are read from convert/parameters.json (scripts/make_parameter_counts.py).
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import resources

from vision_jax.convert import read_weights, recognize
from vision_jax.convert.read import embedded_names
from vision_jax.convert.tables import ZOOS
from vision_jax.errors import UserError, nearest
from vision_jax.models.families import FAMILIES


@dataclass(frozen=True)
class Model:
    """A line of the list.

    Attributes:
      name: "SOURCE/NAME", as configs/transfer.py:NAME takes it; "embedded:NAME".
      family: its architecture's key in models.families.FAMILIES.
      parameters: how many, with the head of its published weights.
      image_size: pixels a side.
      weights: as config.model.weights takes them; "" where only files have them.
    """

    name: str
    family: str
    parameters: int
    image_size: int
    weights: str


def run(patterns: Sequence[str]) -> int:
    """Prints the models that one of the patterns is about, or all without any.

    A pattern is a part of a name, or has wildcards for all of it, with or without the source.

    Raises:
      UserError: there are none for a pattern; with the nearest name.
    """
    models = list(all_models())
    for pattern in patterns:
        if not any(_is_about(pattern, model.name) for model in models):
            whole = [model.name for model in models]
            hint = nearest(pattern, whole) or nearest(pattern, [n.partition("/")[2] for n in whole])
            raise UserError(f"there is no model {pattern!r}{hint or '; without it all are listed'}")
    found = [
        model
        for model in models
        if not patterns or any(_is_about(pattern, model.name) for pattern in patterns)
    ]
    rows = [("name", "family", "parameters", "pixels", "config.model.weights")]
    rows += [
        (m.name, m.family, f"{m.parameters / 1e6:.2f} M", str(m.image_size), m.weights or "a file")
        for m in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{name:{widths[0]}}  {family:{widths[1]}}  {parameters:>{widths[2]}}  "
        f"{pixels:>{widths[3]}}  {weights}"
        for name, family, parameters, pixels, weights in rows
    ]
    print("\n".join(lines))
    return 0


def _is_about(pattern: str, name: str) -> bool:
    wanted, name = pattern.lower(), name.lower()
    return wanted in name or fnmatch(name, wanted) or fnmatch(name.partition("/")[2], wanted)


def all_models() -> Iterator[Model]:
    """The zoo, and what the package brings."""
    file = resources.files("vision_jax.convert").joinpath("parameters.json")
    counts = json.loads(file.read_text())
    for name in embedded_names():
        weights = read_weights(f"embedded:{name}")
        family, arguments = recognize(weights)
        count = sum(math.prod(tensor.shape) for tensor in weights.tensors.values())
        # A model for images of any size is used at what its family is prepared for.
        side, _ = arguments.get("image_size") or (FAMILIES[family].preprocessing["short"],) * 2
        yield Model(weights.origin, family, count, side, weights.origin)
    for family, entries in ZOOS:
        for entry in entries:
            spec = f"timm://{entry.build}" if entry.source == "timm" else entry.published
            yield Model(entry.name, family, counts[entry.name], entry.image_size, spec)
