"""Integrated gradients beside captum: 50 nodes of 32 images, the same weights and batch.

    pip install -e '.[parity]' && pip install --no-deps captum==0.9.0
    python -m benchmarks.explanations
    python -m benchmarks.explanations --peers parts

captum computes all nodes at once, as it does by default, or with internal_batch_size ("parts") one
node after another, as ours does. Memory is the column GB. benchmarks/beside.py says what the
columns are.
"""

from benchmarks import beside
from benchmarks.beside import Job
from benchmarks.training import SMALL_VIT

EMBEDDED = {  # the shape of the ViT that comes with the package
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "img_size": 32,
    "patch_size": 4,
    "class_token": False,
    "global_pool": "avg",
}


def integrate(name: str, build: str, batch_size: int, size: int, nodes: int, **arguments) -> Job:
    """Integrated gradients of a timm model."""
    shared = {"batch_size": batch_size, "image_size": size, "classes": 10, "nodes": nodes}
    peer = {**shared, "build": build, "arguments": arguments}
    return Job(
        f"{nodes} nodes, {name}, {size} px, batch {batch_size}",
        ("ours.integrate", shared),
        {how: ("peers.integrate", {**peer, "how": how}) for how in ("captum", "parts")},
    )


def jobs(small: bool = False) -> list[Job]:
    if small:
        return [integrate("ViT", "vit_tiny_patch16_224", 2, 32, 3, **SMALL_VIT)]
    return [
        integrate("the embedded ViT's shape", "vit_tiny_patch16_224", 32, 32, 50, **EMBEDDED),
        integrate("ResNet-18", "resnet18", 32, 64, 50),
    ]


def main() -> int:
    """Prints the table."""
    flags = beside.parser(__doc__).parse_args()
    return beside.run(jobs(flags.small), flags)


if __name__ == "__main__":
    raise SystemExit(main())
