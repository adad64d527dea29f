#!/usr/bin/env bash
# torch's binary cross entropy with logits has the dtype of its targets, not the one that logits and
# targets promote to, as other losses have it: float32 logits with bfloat16 targets give a bfloat16
# loss. torchvision makes such targets: a Faster R-CNN in float64 has three losses in float64, and
# that of its proposals' scores in float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1
cat > "$folder/check.py" <<'PYTHON'
from importlib.metadata import version

import torch
import torchvision
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

print(f"torch {version('torch')}, torchvision {version('torchvision')}")
found = {}
for logits, targets in ((torch.float64, torch.float32), (torch.float32, torch.bfloat16)):
    pair = torch.zeros(2, dtype=logits), torch.ones(2, dtype=targets)
    for loss in (binary_cross_entropy_with_logits, mse_loss):
        found[f"{loss.__name__} of {logits} and {targets}"] = str(loss(*pair).dtype)

torch.manual_seed(0)
build = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
model = build(weights=None, weights_backbone=None, num_classes=3).double().train()
images = [torch.rand(3, 96, 128, dtype=torch.float64)]
boxes = torch.tensor([[10, 10, 60, 70]], dtype=torch.float64)
losses = model(images, [{"boxes": boxes, "labels": torch.tensor([1])}])
found |= {f"Faster R-CNN in float64, {name}": str(loss.dtype) for name, loss in losses.items()}
for what, dtype in found.items():
    print(f"{what}: {dtype}")
as_seen = [dtype.removeprefix("torch.") for dtype in found.values()] == [
    *("float32", "float64", "bfloat16", "float32"),
    *("float64", "float64", "float32", "float64"),
]
print("as seen in November 2026" if as_seen else "CHANGED")
raise SystemExit(not as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
