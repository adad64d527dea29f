#!/usr/bin/env bash
# A LoRA adapter of PEFT on the qkv layer of timm's BEiT, EVA-02 and Swin v2: attached it changes no
# output and gets no gradient; merged it changes the output. timm reads the layer's weight there and
# never calls the layer, whose forward pass is what PEFT replaces. ViT is the control.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31 \
    transformers==5.24.0 peft==0.21.2
cd "$folder" && "$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings

warnings.filterwarnings("ignore")
import peft
import timm
import torch

print(f"timm {timm.__version__}, peft {peft.__version__}, torch {torch.__version__}")
small = {"num_classes": 3, "embed_dim": 32, "img_size": 32}
plain = {"patch_size": 8, "depth": 1, "num_heads": 2}
windows = {"patch_size": 4, "depths": (1,), "num_heads": (2,), "window_size": 4}
models = {
    "vit_tiny_patch16_224": plain,
    "beit_base_patch16_224": plain,
    "eva02_tiny_patch14_224": plain,
    "swinv2_tiny_window8_256": windows,
}
found = {}
for name, sizes in models.items():
    torch.manual_seed(0)
    model = timm.create_model(name, **small, **sizes)
    for parameter in model.parameters():  # some begin at 0 and would hide everything
        parameter.data += 0.1 * torch.randn_like(parameter)
    config = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        with adapted.disable_adapter():
            base = adapted(images)
        attached = adapted(images)
    scale = base.abs().max()
    factors = [p for n, p in adapted.named_parameters() if "lora_" in n]
    output = adapted(images).square().sum()
    trains = output.requires_grad
    if trains:
        output.backward()
        trains = any(p.grad is not None and bool(p.grad.any()) for p in factors)
    with torch.no_grad():
        merged = adapted.merge_and_unload()(images)
    on, after = (float((x - base).abs().max() / scale) for x in (attached, merged))
    print(f"{name}: attached changes the output by {on:.3f}, merged by {after:.3f}; gradient: {trains}")
    found[name] = (on > 0, after > 1e-3, trains)
control = found.pop("vit_tiny_patch16_224")
as_seen = control == (True, True, True) and set(found.values()) == {(False, True, False)}
print("as seen in November 2026" if as_seen else "CHANGED")
sys.exit(not as_seen)
PYTHON
