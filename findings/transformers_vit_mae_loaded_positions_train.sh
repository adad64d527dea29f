#!/usr/bin/env bash
# The position embeddings of a ViTMAEForPreTraining are constants: its constructor takes them out of
# training. Read back by from_pretrained, the same model trains them, in the encoder and in the
# decoder: a run that goes on from its own checkpoint has two arrays more than the one before it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.24.0
cat > "$folder/check.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

print(f"transformers {version('transformers')}")
config = ViTMAEConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                      patch_size=8, intermediate_size=64, decoder_hidden_size=32,
                      decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                      decoder_intermediate_size=64)


def positions_of(model):
    return {"encoder": model.vit.embeddings.position_embeddings,
            "decoder": model.decoder.decoder_pos_embed}


new = ViTMAEForPreTraining(config)
new.save_pretrained(sys.argv[1])
read = ViTMAEForPreTraining.from_pretrained(sys.argv[1])
read(torch.rand(2, 3, 32, 32)).loss.backward()
as_seen = True
for part, before in positions_of(new).items():
    after = positions_of(read)[part]
    moved = after.grad is not None and bool(after.grad.abs().max() > 0)
    print(f"{part}: new, trains: {before.requires_grad}; read, trains: {after.requires_grad}, "
          f"has a gradient: {moved}")
    as_seen &= not before.requires_grad and after.requires_grad and moved
print("as seen in December 2026" if as_seen else "CHANGED")
raise SystemExit(not as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/check.py" "$folder/model"
