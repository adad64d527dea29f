#!/usr/bin/env bash
# torch's FlopCounterMode leaves the two products of attention out where
# scaled_dot_product_attention runs on the CPU: its fused CPU operator is not in the counter's
# table. The same module with the products written out has them, so a count of a ViT depends on the
# device and on the implementation of attention.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1
cat > "$folder/check.py" <<'PYTHON'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

print(f"torch {torch.__version__}")
batch, heads, tokens, width = 2, 3, 50, 16
q, k, v = torch.randn(3, batch, heads, tokens, width)
expected = 2 * 2 * batch * heads * tokens * tokens * width


def counted(backend: SDPBackend) -> int:
    with sdpa_kernel(backend), FlopCounterMode(display=False) as counter:
        scaled_dot_product_attention(q, k, v)
    return counter.get_total_flops()


fused, written_out = counted(SDPBackend.FLASH_ATTENTION), counted(SDPBackend.MATH)
print(f"two products of attention: {expected} operations")
print(f"counted of the fused CPU operator: {fused}; of the products written out: {written_out}")
as_seen = fused == 0 and written_out == expected
print("as seen in November 2026" if as_seen else "CHANGED")
raise SystemExit(not as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
