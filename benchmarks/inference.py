"""Forward passes beside timm and transformers: the same weights and the same batch of 8.

    pip install -e '.[parity]'
    python -m benchmarks.inference
    python -m benchmarks.inference --jobs ResNet --peers compile channels

benchmarks/beside.py says what the columns are.
"""

from benchmarks import beside
from benchmarks.beside import Job
from benchmarks.training import HOWS, SMALL_DETR, SMALL_VIT


def forward(name: str, build: str, batch_size: int = 8, size: int = 224, **arguments) -> Job:
    """The logits of a timm model, or without a name of transformers' DETR."""
    shared = {"batch_size": batch_size, "image_size": size}
    peer = {**shared, "classes": 91, "build": build, "arguments": arguments}
    return Job(
        f"{name}, {size} px, batch {batch_size}",
        ("ours.infer", shared),
        {how: ("peers.infer", {**peer, "how": how}) for how in HOWS},
    )


def jobs(small: bool = False) -> list[Job]:
    if small:
        return [
            forward("ViT", "vit_tiny_patch16_224", 2, 32, **SMALL_VIT),
            forward("DETR", "", 1, 64, **SMALL_DETR),
        ]
    return [
        forward("ViT-S/16", "vit_small_patch16_224"),
        forward("ViT-B/16", "vit_base_patch16_224"),
        forward("ResNet-50", "resnet50"),
        forward("ConvNeXt-T", "convnext_tiny"),
        forward("Swin-T", "swin_tiny_patch4_window7_224"),
        forward("MobileNetV2", "mobilenetv2_100"),
        forward("RegNetY-4GF", "regnety_040"),
        forward("DETR-R50", "", 8, 480),
    ]


def main() -> int:
    """Prints the table."""
    flags = beside.parser(__doc__).parse_args()
    return beside.run(jobs(flags.small), flags)


if __name__ == "__main__":
    raise SystemExit(main())
