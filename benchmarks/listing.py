"""What a start costs before any image is read: listing class folders, reading a COCO file.

    python -m benchmarks.listing [--files=100000] [--classes=100] [--boxes=200000] [--repeats=5]

Both are compared with the usual readers on the same files, by turns, in CPU seconds of this process
(the least of the repeats): torchvision's ImageFolder and pycocotools' COCO(path), from the `parity`
extra. At most 2 times the first and 1 time the second is what the project promises.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from torchvision.datasets import ImageFolder

from vision_jax.data.annotations import read_annotations
from vision_jax.data.sources import read_source


def write_folders(folder: Path, files: int, classes: int) -> None:
    """Empty files: both readers list names and open none."""
    for i in range(classes):
        (folder / f"class_{i:04}").mkdir(parents=True)
        for k in range(i, files, classes):
            (folder / f"class_{i:04}" / f"{k:07}.jpg").touch()


def write_coco(folder: Path, boxes: int, *, masks: bool) -> Path:
    """Seven boxes an image, as in COCO; with masks, polygons of 23 points."""
    rng = np.random.default_rng(0)
    images = max(boxes // 7, 1)
    names = [f"{i:012}.jpg" for i in range(images)]
    (folder / "images").mkdir(exist_ok=True)
    for name in names:
        (folder / "images" / name).touch()
    xywh = np.round(rng.uniform(1, 300, (boxes, 4)), 2).tolist()
    entries = [
        {
            "id": i,
            "image_id": int(rng.integers(images)),
            "category_id": i % 80,
            "bbox": xywh[i],
            "area": xywh[i][2] * xywh[i][3],
            "iscrowd": 0,
        }
        | ({"segmentation": [np.round(rng.uniform(0, 600, 46), 2).tolist()]} if masks else {})
        for i in range(boxes)
    ]
    content = {
        "images": [
            {"id": i, "file_name": n, "height": 480, "width": 640} for i, n in enumerate(names)
        ],
        "annotations": entries,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(80)],
    }
    path = folder / f"boxes{'_and_masks' * masks}.json"
    path.write_text(json.dumps(content))
    return path


def compare(what: str, ours: Callable[[], object], theirs: Callable[[], object], repeats: int):
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats):
        for function, spent in zip((ours, theirs), seconds, strict=True):
            start = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
                kept = function()
            spent.append(time.process_time() - start)
            del kept
    one, other = map(min, seconds)
    print(f"{what}: {one:.2f} and {other:.2f} CPU seconds, ratio {one / other:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--boxes", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root, folder = Path(name) / "folders", Path(name)
        write_folders(root, flags.files, flags.classes)
        what = f"listing {flags.files:,} files in {flags.classes:,} classes"
        folders = (lambda: read_source(str(root))), (lambda: ImageFolder(str(root)))
        compare(what, *folders, flags.repeats)
        for masks in (False, True):
            path = str(write_coco(folder, flags.boxes, masks=masks))
            what = f"a COCO file of {flags.boxes:,} boxes{' with masks' * masks}"
            readers = (lambda p=path: read_annotations(p)), (lambda p=path: COCO(p))
            compare(what, *readers, flags.repeats)


if __name__ == "__main__":
    main()
