"""Segmenters beside transformers and torchvision: training steps and forward passes.

    pip install -e '.[parity]'
    python -m benchmarks.segmenters
    python -m benchmarks.segmenters --jobs SegFormer --peers channels

The same weights and batch. A step is AdamW with clipping on all of the model and the cross-entropy
of all pixels, without dropout; a forward pass gives the logits at their own stride.
benchmarks/beside.py says what the columns are.
"""

from benchmarks import beside
from benchmarks.beside import Call, Job

HOWS = ("eager", "channels", "compile")
ALL = {"recipes": (), "trainable": (".*",), "data.view": "squash"}
SMALL = {
    "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
}  # fmt: skip


def training(name: str, build: str, batch_size: int, size: int, **arguments) -> Job:
    """A step of all of the model."""
    shared = {"batch_size": batch_size, "image_size": size, "classes": 19}
    ours: Call = ("ours.train", {**shared, "task": "segmentation", "fields": ALL})
    peer = {**shared, "build": build, "arguments": arguments}
    return Job(
        f"{name}, step, {size} px, batch {batch_size}",
        ours,
        {how: ("segmenter_peers.train", {**peer, "how": how}) for how in HOWS},
    )


def forward(name: str, build: str, batch_size: int, size: int, **arguments) -> Job:
    """The logits."""
    shared = {"batch_size": batch_size, "image_size": size}
    peer = {**shared, "classes": 19, "build": build, "arguments": arguments}
    return Job(
        f"{name}, forward, {size} px, batch {batch_size}",
        ("ours.infer", shared),
        {how: ("segmenter_peers.infer", {**peer, "how": how}) for how in HOWS},
    )


def jobs(small: bool = False) -> list[Job]:
    if small:
        return [
            training("SegFormer", "segformer", 2, 64, **SMALL),
            forward("SegFormer", "segformer", 2, 64, **SMALL),
        ]
    return [
        training("SegFormer-B0", "segformer", 2, 512),
        training("DeepLabV3-R50", "deeplabv3_resnet50", 2, 256),
        forward("SegFormer-B0", "segformer", 2, 512),
        forward("DeepLabV3-R50", "deeplabv3_resnet50", 1, 512),
    ]


def main() -> int:
    """Prints the table."""
    flags = beside.parser(__doc__).parse_args()
    return beside.run(jobs(flags.small), flags)


if __name__ == "__main__":
    raise SystemExit(main())
