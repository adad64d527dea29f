#!/usr/bin/env bash
# A new ViTMAEForPreTraining has position embeddings of zero in its encoder and its decoder, which
# never train: it cannot tell where a patch lies, and pretrains all the same. Its constructor fills
# them; then the general initialization marks the patch embedding as done, for which the encoder's
# leaves its own out, and sets the decoder's to zero. Weights that are read bring theirs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.24.0
cat > "$folder/check.py" <<'PYTHON'
from importlib.metadata import version

from transformers import ViTMAEConfig, ViTMAEForPreTraining

print(f"transformers {version('transformers')}")
config = ViTMAEConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                      intermediate_size=64, decoder_hidden_size=32, decoder_num_hidden_layers=1,
                      decoder_num_attention_heads=2, decoder_intermediate_size=64)
model = ViTMAEForPreTraining(config)
found = {
    "encoder": model.vit.embeddings.position_embeddings,
    "decoder": model.decoder.decoder_pos_embed,
}
for part, positions in found.items():
    print(f"{part}: largest position {positions.abs().max():g}, trains: {positions.requires_grad}")
as_seen = not any(positions.any() or positions.requires_grad for positions in found.values())
print("as seen in November 2026" if as_seen else "CHANGED")
raise SystemExit(not as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
