#!/usr/bin/env bash
# transformers' SegFormer has layer_norm_eps in its config, 1e-6, and no layer reads it: all norms have
# torch's 1e-5. The original code has 1e-6 in the blocks and after the stages.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.24.0
cat > "$folder/check.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation

print(f"transformers {version('transformers')}, torch {version('torch')}")
found, logits = set(), []
for epsilon in (1e-6, 0.5):
    torch.manual_seed(0)
    model = SegformerForSemanticSegmentation(SegformerConfig(layer_norm_eps=epsilon)).eval()
    found |= {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)}
    with torch.no_grad():
        logits.append(model(torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)).logits)
same = torch.equal(*logits)
print(f"epsilons of the norms with layer_norm_eps 1e-6 and 0.5: {found}; equal logits: {same}")
as_seen = found == {1e-5} and same
print("as seen in November 2026" if as_seen else "CHANGED")
sys.exit(not as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
