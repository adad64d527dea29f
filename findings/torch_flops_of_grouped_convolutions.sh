#!/usr/bin/env bash
# torch's FlopCounterMode counts the gradient of a grouped convolution's kernel as if there were one
# group: 32 times too much of 32 groups. Outputs and the input's gradient are counted rightly. A
# training step of MobileNetV2 comes out at seven times its operations.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1
cat > "$folder/check.py" <<'PYTHON'
import torch
from torch.utils.flop_counter import FlopCounterMode

print(f"torch {torch.__version__}")
channels, side = 32, 8


def counted(groups: int, **needs) -> int:
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
    images = torch.randn(1, channels, side, side, requires_grad=needs.get("images", False))
    layer.requires_grad_(needs.get("kernel", False))
    outputs = layer(images)
    with FlopCounterMode(display=False) as counter:
        outputs.sum().backward()
    return counter.get_total_flops()


as_seen = True
for groups in (1, 4, channels):
    true = 2 * side * side * 9 * channels * channels // groups
    images, kernel = counted(groups, images=True), counted(groups, kernel=True)
    print(f"{groups} groups: {true} operations each; counted {images} of the images' gradient, "
          f"{kernel} of the kernel's")
    as_seen &= images == true and kernel == groups * true
print("as seen in November 2026" if as_seen else "CHANGED")
raise SystemExit(not as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
