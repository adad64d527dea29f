#!/usr/bin/env bash
# diffusers' DiTTransformer2DModel embeds the timestep with other frequencies than the DiT that its
# weights come from: exponents i / 127 where the original has i / 128, and it says so nowhere.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1
cat > "$folder/check.py" <<'PYTHON'
import math
import sys
from importlib.metadata import version

import torch
from diffusers import DiTTransformer2DModel

print(f"diffusers {version('diffusers')}, torch {version('torch')}")
model = DiTTransformer2DModel(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=1,
    sample_size=8, patch_size=2, num_embeds_ada_norm=10,
).eval()
seen = []
embedder = model.transformer_blocks[0].norm1.emb.timestep_embedder
embedder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
with torch.no_grad():
    model(torch.zeros(1, 4, 8, 8), timestep=torch.tensor([999]), class_labels=torch.tensor([1]))


def angles(steps):
    of = 999 * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / steps)
    return torch.cat([of.cos(), of.sin()])


off = {steps: (seen[0][0].double() - angles(steps)).abs().max().item() for steps in (127, 128)}
norm = model.transformer_blocks[0].norm3.eps
print(f"largest difference to exponents of i / 127: {off[127]:.1g}, of i / 128: {off[128]:.1g}")
print(f"epsilon of the norm before the MLP: {norm:g} (1e-6 in the original)")
as_seen = off[127] < 1e-3 and off[128] > 1 and norm == 1e-5
print("as seen in December 2026" if as_seen else "CHANGED")
sys.exit(not as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
