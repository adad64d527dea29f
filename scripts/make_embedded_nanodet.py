"""Makes the embedded NanoDet-g from the graph model that scripts/fetch_nanodet.py fetches.

    python scripts/fetch_nanodet.py nanodet
    python scripts/make_embedded_nanodet.py nanodet/nanodet.json

The graph model holds its weights as float16, so nothing is rounded. Writes the file into
vision_jax/data/assets/.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

from vision_jax.convert import read_weights, write_safetensors

ASSET = Path(__file__).parents[1] / "vision_jax" / "data" / "assets" / "nanodet_coco.safetensors"


def main(model: str) -> None:
    """Writes the asset and prints its digest for the table in assets/README.md."""
    tensors = dict(read_weights(model).tensors)
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not np.array_equal(halves[name].astype(tensor.dtype), tensor):
            raise SystemExit(f"{model}: {name} has more digits than float16")
    write_safetensors(ASSET, halves)
    print(ASSET, hashlib.sha256(ASSET.read_bytes()).hexdigest())


if __name__ == "__main__":
    main(sys.argv[1])
