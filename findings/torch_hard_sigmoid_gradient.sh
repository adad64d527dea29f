#!/usr/bin/env bash
# The gradient of torch's hard sigmoid is 1 / 6 as float32 has it, of float64 inputs too, on a CPU: 3e-8
# off, where that of relu6(x + 3) / 6 is exact. The gates of a MobileNetV3 are hard sigmoids, so all
# gradients in front of them are as far off in float64, and a check of gradients to 1e-10 fails.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1
cat > "$folder/check.py" <<'PYTHON'
from importlib.metadata import version

import torch
from torch.nn.functional import hardsigmoid, hardswish, relu6

print(f"torch {version('torch')}")
functions = {
    "hardsigmoid": (hardsigmoid, 1 / 6),
    "relu6(x + 3) / 6": (lambda x: relu6(x + 3) / 6, 1 / 6),
    "hardswish": (hardswish, 0.5),
}
errors = []
for name, (function, exact) in functions.items():
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    function(x).sum().backward()
    errors.append(abs(x.grad.item() / exact - 1))
    print(f"{name} at 0 in float64: gradient {x.grad.item():.17f}, {errors[-1]:.1e} off")
as_seen = errors[0] > 1e-8 and max(errors[1:]) < 1e-15
print("as seen in November 2026" if as_seen else "CHANGED")
raise SystemExit(not as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
