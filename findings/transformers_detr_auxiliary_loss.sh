#!/usr/bin/env bash
# "auxiliary_loss": true in a DETR's config.json is meant for training, and changes what the model
# predicts in transformers: each decoder layer's states are normalized before the next layer takes
# them, and the last ones are normalized twice.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 scipy
cd "$folder" && "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

print(f"transformers {transformers.__version__}, torch {torch.__version__}")


def make(auxiliary_loss, layers):
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    return DetrForObjectDetection(
        DetrConfig(
            backbone_config=backbone, use_timm_backbone=False, d_model=16, encoder_layers=2,
            decoder_layers=layers, encoder_ffn_dim=16, decoder_ffn_dim=16,
            encoder_attention_heads=2, decoder_attention_heads=2, num_queries=5, num_labels=3,
            auxiliary_loss=auxiliary_loss,
        )
    ).eval()


differences = {}
for layers in (1, 3):
    torch.manual_seed(0)
    off, on = make(False, layers), make(True, layers)
    for parameter in off.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    on.load_state_dict(off.state_dict())  # strict: the same tensors
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        a, b = (model.double()(images).logits for model in (off, on))
    differences[layers] = float((a - b).abs().max() / a.abs().max())
    print(f"{layers} decoder layers: the logits differ by {differences[layers]:.2g} of the largest")
as_seen = min(differences.values()) > 1e-2
print("as seen in November 2026" if as_seen else "CHANGED")
sys.exit(not as_seen)
PYTHON
