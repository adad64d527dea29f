#!/usr/bin/env bash
# PEFT with bias="all" and a head in modules_to_save writes the head's bias three times under three
# names: twice the trained one, and once the one from before training, as original_module. Which of
# them is the head's is nowhere said; a reader that strips PEFT's wrappers from the names gets one by
# chance. PEFT itself loads the trained one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 torch==2.14.1 transformers==5.24.0
cat > "$folder/check.py" <<'PYTHON'
import sys

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        nn.init.constant_(self.head.bias, 1.0)  # as pretrained

    def forward(self, x):
        return self.head(self.body(x))


print(f"peft {peft.__version__}, torch {torch.__version__}")
about = LoraConfig(target_modules=["body"], bias="all", modules_to_save=["head"], r=2)
model = get_peft_model(Classifier(), about)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("bias"):
            parameter.fill_(2.0)  # as trained
model.save_pretrained(sys.argv[1])
found = {
    name.removeprefix("base_model.model."): tensor[0].item()
    for name, tensor in load_file(f"{sys.argv[1]}/adapter_model.safetensors").items()
    if "head" in name and name.endswith("bias")
}
for name, value in found.items():
    print(f"  {name}: {value}")
again = PeftModel.from_pretrained(Classifier(), sys.argv[1])
loaded = again.base_model.model.head.modules_to_save["default"].bias[0].item()
print(f"  loaded by PEFT: {loaded}")
expected = {"head.bias": 2.0, "head.modules_to_save.bias": 2.0, "head.original_module.bias": 1.0}
as_seen = found == expected and loaded == 2.0
print("as seen in November 2026" if as_seen else "CHANGED")
raise SystemExit(not as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/check.py" "$folder/adapter"
