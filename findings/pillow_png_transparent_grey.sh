#!/usr/bin/env bash
# A PNG of 2- or 4-bit grey whose tRNS chunk names the transparent level: Pillow scales the pixels to
# 8 bits and not that level, so other pixels become transparent. In 16-bit RGB the named color stays
# opaque. pypng follows the PNG specification.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 pypng==0.20220715.0 numpy
cd "$folder" && "$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import PIL
import png
from PIL import Image

print(f"Pillow {PIL.__version__}, pypng {png.__version__}")
seen = {}
for bits in (2, 4, 8):
    level = 2  # transparent
    pixels = np.arange(2**bits if bits < 8 else 4, dtype=np.uint8)[None]
    with open("a.png", "wb") as file:
        png.Writer(
            width=pixels.shape[1], height=1, greyscale=True, bitdepth=bits, transparent=level
        ).write(file, pixels.tolist())
    theirs = np.asarray(Image.open("a.png").convert("RGBA"))[0, :, 3] == 0
    _, _, rows, info = png.Reader("a.png").asRGBA()
    right = np.array(list(rows)).reshape(1, -1, 4)[0, :, 3] == 0
    assert np.flatnonzero(right).tolist() == [level]
    found = np.flatnonzero(theirs).tolist()
    print(f"{bits} bits: transparent level {level}; Pillow makes the levels {found} transparent")
    seen[bits] = found
with open("b.png", "wb") as file:
    png.Writer(width=2, height=1, greyscale=False, bitdepth=16, transparent=(1, 2, 3)).write(
        file, [[1, 2, 3, 9, 9, 9]]
    )
alpha = np.asarray(Image.open("b.png").convert("RGBA"))[0, :, 3].tolist()
print(f"16-bit RGB: alpha of the transparent pixel and of another: {alpha} (right: [0, 255])")
as_seen = seen[8] == [2] and seen[2] != [2] and seen[4] != [2] and alpha == [255, 255]
print("as seen in November 2026" if as_seen else "CHANGED")
sys.exit(not as_seen)
PYTHON
