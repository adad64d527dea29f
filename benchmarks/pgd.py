"""PGD beside torchattacks, from the images themselves: the same weights, batch and radius.

    pip install -e '.[parity]' && pip install --no-deps torchattacks==3.5.1
    python -m benchmarks.pgd
    python -m benchmarks.pgd --peers compile channels

benchmarks/attacks.py compares more attacks, and foolbox. benchmarks/beside.py says what the columns
are.
"""

from benchmarks import beside
from benchmarks.beside import Job
from benchmarks.training import HOWS, SMALL_VIT


def pgd(name: str, build: str, batch_size: int, size: int, steps: int = 10, **arguments) -> Job:
    """An attack on a timm model."""
    shared = {"batch_size": batch_size, "image_size": size, "classes": 10, "steps": steps}
    peer = {**shared, "build": build, "arguments": arguments}
    return Job(
        f"PGD-{steps}, {name}, {size} px, batch {batch_size}",
        ("ours.attack", shared),
        {how: ("peers.attack", {**peer, "how": how}) for how in HOWS},
        tolerance=0.02,  # a sign of next to nothing is the one or the other
    )


def jobs(small: bool = False) -> list[Job]:
    if small:
        return [pgd("ViT", "vit_tiny_patch16_224", 2, 32, 2, **SMALL_VIT)]
    return [
        pgd("ResNet-18", "resnet18", 4, 128),
        pgd("ViT-S/16", "vit_small_patch16_224", 2, 224),
    ]


def main() -> int:
    """Prints the table."""
    flags = beside.parser(__doc__).parse_args()
    return beside.run(jobs(flags.small), flags)


if __name__ == "__main__":
    raise SystemExit(main())
