"""Writes vision_jax/convert/parameters.json: how many parameters each model of the zoo has.

    python scripts/make_parameter_counts.py

From the certificates, and for models without one by the arguments of the source's own model: needs
torch, torchvision, timm and transformers. `vision_jax models` prints the counts and builds nothing.
"""

import json
import math
from pathlib import Path

import jax

from vision_jax.certify import references
from vision_jax.convert.table import Entry
from vision_jax.convert.tables import ZOO
from vision_jax.models.families import build_model, initialize

ROOT = Path(__file__).parents[1]
PATH = ROOT / "vision_jax/convert/parameters.json"


def count(entry: Entry) -> int:
    """The parameters of a model of the zoo, statistics left out."""
    certificate = ROOT / f"docs/certificates/{entry.name}.json"
    if certificate.is_file():
        return json.loads(certificate.read_text())["parameters"]
    family, arguments = references.full_arguments(entry)
    model = build_model(family, **arguments)
    size = (entry.image_size, entry.image_size)
    shapes = jax.eval_shape(lambda key: initialize(model, key, size), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))


def main() -> None:
    counts = {entry.name: count(entry) for entry in ZOO}
    PATH.write_text(json.dumps(counts, indent=0, sort_keys=True) + "\n")
    print(f"wrote {PATH}: {len(counts)} models")


if __name__ == "__main__":
    main()
