"""Faster R-CNN and YOLOX beside torchvision and pixeltable-yolox: steps, boxes of images, NMS.

    pip install -e '.[parity]' && pip install --no-deps pixeltable-yolox==0.4.3
    python -m benchmarks.detectors
    python -m benchmarks.detectors --jobs YOLOX --threads=0

Steps are AdamW's, of float32. Boxes are found with suppression and all, from images of the model's
size. benchmarks/beside.py says what the columns are.
"""

from benchmarks import beside
from benchmarks.beside import Job
from benchmarks.training import DETR, HOWS

FIELDS = {"faster_rcnn": {**DETR, "optim.lr": 1e-9}, "yolox": {}}  # detector_peers.RATE
YOLOX_S = {"depth": 1 / 3, "width": 1 / 2}


def step(name: str, family: str, batch_size: int, size: int, **arguments) -> Job:
    """A training step. Faster R-CNN draws its samples, so losses agree in size alone."""
    shared = {"batch_size": batch_size, "image_size": size, "classes": 80}
    ours = {**shared, "task": "detection", "fields": FIELDS[family]}
    peer = {**shared, "family": family, "arguments": arguments}
    return Job(
        f"{name}, step, {size} px, batch {batch_size}",
        ("ours.train", ours),
        {how: ("detector_peers.train", {**peer, "how": how}) for how in HOWS},
        tolerance=0.3 if family == "faster_rcnn" else 1e-3,
    )


def boxes(name: str, family: str, batch_size: int, size: int, **arguments) -> Job:
    """Images to boxes."""
    hows = HOWS if family == "faster_rcnn" else HOWS[:1]
    shared = {"batch_size": batch_size, "image_size": size}
    peer = {**shared, "family": family, "classes": 80, "arguments": arguments}
    return Job(
        f"{name}, boxes, {size} px, batch {batch_size}",
        ("ours.detect", shared),
        {how: ("detector_peers.infer", {**peer, "how": how}) for how in hows},
    )


def suppression(batch_size: int, count: int, classes: int) -> Job:
    """NMS by class."""
    shared = {"batch_size": batch_size, "boxes": count, "classes": classes}
    return Job(
        f"NMS, {count} boxes in {classes} classes, batch {batch_size}",
        ("ours.nms", shared),
        {"eager": ("detector_peers.nms", shared)},
    )


def jobs(small: bool = False) -> list[Job]:
    if small:
        return [
            suppression(2, 50, 5),
            step("YOLOX-s", "yolox", 1, 64, **YOLOX_S),
            boxes("YOLOX-s", "yolox", 1, 64, **YOLOX_S),
            step("Faster R-CNN R50", "faster_rcnn", 1, 64),
            boxes("Faster R-CNN R50", "faster_rcnn", 1, 64),
        ]
    return [
        suppression(8, 1000, 80),
        step("YOLOX-s", "yolox", 4, 320, **YOLOX_S),
        boxes("YOLOX-s", "yolox", 4, 320, **YOLOX_S),
        step("Faster R-CNN R50", "faster_rcnn", 2, 320),
        boxes("Faster R-CNN R50", "faster_rcnn", 2, 320),
    ]


def main() -> int:
    """Prints the table."""
    flags = beside.parser(__doc__).parse_args()
    return beside.run(jobs(flags.small), flags)


if __name__ == "__main__":
    raise SystemExit(main())
