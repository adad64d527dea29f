"""`vision_jax models`: the models whose weights can be loaded by name.

The counts of parameters are read from convert/parameters.json (scripts/make_parameter_counts.py).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import resources

from vision_jax.convert import read_weights, recognize
from vision_jax.convert.read import embedded_names
from vision_jax.convert.tables import ZOOS
from vision_jax.errors import UserError, nearest


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


def run(pattern: str) -> int:
    """Prints the models whose name has the pattern in it or matches it, with or without the source.

    Raises:
      UserError: there are none; with the nearest name.
    """
    models, wanted = list(all_models()), pattern.lower()
    found = [
        model
        for model in models
        if wanted in model.name.lower()
        or fnmatch(model.name.lower(), wanted)
        or fnmatch(model.name.lower().partition("/")[2], wanted)
    ]
    if not found:
        whole = [model.name for model in models]
        hint = nearest(pattern, whole) or nearest(pattern, [n.partition("/")[2] for n in whole])
        raise UserError(f"there is no model {pattern!r}{hint or '; without it all are listed'}")
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


def all_models() -> Iterator[Model]:
    """The zoo, and what the package brings."""
    file = resources.files("vision_jax.convert").joinpath("parameters.json")
    counts = json.loads(file.read_text())
    for name in embedded_names():
        weights = read_weights(f"embedded:{name}")
        family, arguments = recognize(weights)
        count = sum(math.prod(tensor.shape) for tensor in weights.tensors.values())
        yield Model(weights.origin, family, count, arguments["image_size"][0], weights.origin)
    for family, entries in ZOOS:
        for entry in entries:
            spec = f"timm://{entry.build}" if entry.source == "timm" else entry.published
            yield Model(entry.name, family, counts[entry.name], entry.image_size, spec)
