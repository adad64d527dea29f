"""Makes the embedded ViT from a finished run of configs/vit_pretrain_cifar10.py.

    python scripts/make_embedded_vit.py runs/vit_pretrain_cifar10

Reads WORKDIR/model.safetensors (timm's naming, float32), rounds it to float16, which halves the
package and moves no prediction that we could find, and writes vision_jax/data/assets/.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

from vision_jax.convert import write_safetensors

ASSET = Path(__file__).parents[1] / "vision_jax" / "data" / "assets" / "vit_cifar10.safetensors"


def main(workdir: str) -> None:
    """Writes the asset and prints its digest for the table in assets/README.md."""
    with safe_open(Path(workdir) / "model.safetensors", framework="numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).astype(np.float16) for name in file.keys()}  # noqa: SIM118
    write_safetensors(ASSET, tensors, metadata)
    print(ASSET, hashlib.sha256(ASSET.read_bytes()).hexdigest())


if __name__ == "__main__":
    main(sys.argv[1])
