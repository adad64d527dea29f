#!/usr/bin/env bash
# transformers' EoMT processor pads images at the right and below. Of one mask of the upper half of a
# wide image, panoptic and instance postprocessing cut the padding off; semantic postprocessing
# resizes image and padding to the image's size, so that the mask ends at a quarter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0
cat > "$folder/check.py" <<'PYTHON'
import sys
from importlib.metadata import version
from types import SimpleNamespace

import torch
from transformers import EomtImageProcessor

print(f"transformers {version('transformers')}, torch {version('torch')}")
size = {"shortest_edge": 64, "longest_edge": 64}
processor = EomtImageProcessor(size=size, do_split_image=False, do_pad=True)
image = torch.zeros(3, 40, 80, dtype=torch.uint8)
shape = tuple(processor(image, return_tensors="pt")["pixel_values"].shape)
upper = torch.full((1, 1, 64, 64), -20.0)
upper[..., :16, :] = 20.0  # the image fills the 32 rows above
outputs = SimpleNamespace(
    masks_queries_logits=torch.cat([upper, -upper], dim=1),  # two queries: upper and the rest
    class_queries_logits=torch.tensor([[[20.0, 0.0, 0.0], [0.0, 20.0, 0.0]]]),
    patch_offsets=None,
)
semantic = processor.post_process_semantic_segmentation(outputs, [(40, 80)])[0]
panoptic = processor.post_process_panoptic_segmentation(outputs, [(40, 80)])[0]
first = next(s["id"] for s in panoptic["segments_info"] if s["label_id"] == 0)
rows = {
    "semantic": int((semantic[:, 0] == 0).sum()),
    "panoptic": int((panoptic["segmentation"][:, 0] == first).sum()),
}
print(f"an image of 40 x 80 becomes {shape}; rows of the upper half, of 20: {rows}")
as_seen = shape == (1, 3, 64, 64) and rows == {"semantic": 10, "panoptic": 20}
print("as seen in November 2026" if as_seen else "CHANGED")
sys.exit(not as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
