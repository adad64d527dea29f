"""Makes the embedded generator from a finished run of configs/generate_embedded.py.

    python -m vision_jax.main --config=configs/generate_embedded.py
    python scripts/make_embedded_generator.py runs/generate_embedded

Reads WORKDIR/model.safetensors (DiT's naming, float32), rounds it to float16, which halves the
package, and writes vision_jax/data/assets/.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

from vision_jax.convert import write_safetensors

ASSETS = Path(__file__).parents[1] / "vision_jax" / "data" / "assets"


def main(workdir: str) -> None:
    """Writes the asset and prints its digest for the table in assets/README.md."""
    with safe_open(Path(workdir) / "model.safetensors", framework="numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).astype(np.float16) for name in file.keys()}  # noqa: SIM118
    asset = ASSETS / "fashion_generator.safetensors"
    write_safetensors(asset, tensors, metadata)
    print(asset, hashlib.sha256(asset.read_bytes()).hexdigest())


if __name__ == "__main__":
    main(sys.argv[1])
