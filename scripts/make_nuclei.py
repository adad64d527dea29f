"""Make the embedded `vision_jax/data/assets/nuclei/`: a micrograph of cell nuclei with its masks.

    python scripts/make_nuclei.py

Image and mask are the 2-D example in PyPI's package stardist (BSD-3-Clause); the wheel is fetched
by pip, its sha256 is checked. They are cut at column 384, which is the split: no nucleus of the
test part is whole in the training part. Pixels of masks are the number of their nucleus, counted
anew in each part; 0 is background.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGE = "stardist==0.9.2"
SHA256 = "46b0a4e8827a7418d93b8d5527aa22367ec6285af9d41c21a701a4f470c45215"
PLATFORM = ("--python-version=3.12", "--platform=manylinux_2_28_x86_64")
PARTS = {"train": slice(0, 384), "test": slice(384, 512)}  # columns
ASSET = Path(__file__).parents[1] / "vision_jax" / "data" / "assets" / "nuclei"


def fetch(folder: Path) -> zipfile.ZipFile:
    """Downloads the wheel; raises SystemExit if it is not to be had, or not what it was."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *PLATFORM]
    command += ["--only-binary=:all:", f"--dest={folder}", PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise SystemExit(f"{PACKAGE} is not to be had: {reason}")
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{PACKAGE}: the wheel is not the one that was checked")
    return zipfile.ZipFile(wheels[0])


def main() -> None:
    ASSET.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, fetch(Path(temporary)) as wheel:
        image, mask = (
            np.asarray(Image.open(BytesIO(wheel.read(f"stardist/data/images/{name}2d.tif"))))
            for name in ("img", "mask")
        )
    assert image.max() < 256, "the image has 16 bits and uses 8 of them"
    for split, columns in PARTS.items():
        numbers, nuclei = np.unique(mask[:, columns], return_inverse=True)
        assert numbers[0] == 0, "0 is background"
        for kind, pixels in (("image", image[:, columns]), ("nuclei", nuclei)):
            pixels = pixels.reshape(image[:, columns].shape).astype(np.uint8)
            Image.fromarray(pixels).save(ASSET / f"{split}_{kind}.png", optimize=True)
        print(f"{split}: {len(numbers) - 1} nuclei")
    files = sorted(ASSET.glob("*.png"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    size = sum(path.stat().st_size for path in files)
    print(f"{len(files)} files, {size} bytes; sha256 of all, joined in order: {digest}")


if __name__ == "__main__":
    main()
