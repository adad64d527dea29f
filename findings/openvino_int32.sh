#!/usr/bin/env bash
# OpenVINO computes some operations on int32 in float32 on a CPU, without a word: above 2^24 the
# maximum of an array is no element of it, numbers that differ are equal, and remainders are wrong,
# while sums, products and quotients of two are right. An int64 output holds what is left in 32 bits.
# A quotient of the images goes toward zero, and the same quotient of constants downward.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1
cat > "$folder/check.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import openvino
from openvino import opset13 as ops

print(f"openvino {version('openvino')}")
x = np.array([2**24 + 1, 123_456_789, -(2**24) - 3], np.int32)
axis = ops.constant(np.array([0], np.int32))


def number(value, dtype=np.int32):
    return ops.constant(np.array(value, dtype))


def wide(taken):
    return ops.add(ops.convert(taken, np.int64), number(2**32, np.int64))


right = []
for name, make, want in (
    ("x + 2", lambda taken: ops.add(taken, number(2)), x + 2),
    ("x * 3", lambda taken: ops.multiply(taken, number(3)), x * 3),
    ("x // 7, toward zero", lambda taken: ops.divide(taken, number(7)), (x / 7).astype(np.int32)),
    ("x % 1000", lambda taken: ops.floor_mod(taken, number(1000)), x % 1000),
    ("max(x)", lambda taken: ops.reduce_max(taken, axis), x.max()),
    ("sum(x)", lambda taken: ops.reduce_sum(taken, axis), x.sum()),
    ("x == 2**24", lambda taken: ops.equal(taken, number(2**24)), x == 2**24),
    ("x > 2**24", lambda taken: ops.greater(taken, number(2**24)), x > 2**24),
    ("int64(x) + 2**32", wide, x.astype(np.int64) + 2**32),
):
    taken = ops.parameter([len(x)], np.int32)
    model = openvino.Model([make(taken)], [taken])
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    found = openvino.Core().compile_model(model, "CPU", settings)(x)[0]
    right.append(np.array_equal(found, want))
    print(f"{name} is {want.tolist()}; found: {found.tolist()}, {found.dtype}")
taken = ops.parameter([1], np.int32)
halves = ops.divide(number([-7]), number(2)), ops.divide(taken, number(2))
model = openvino.Model(list(halves), [taken])
found = openvino.Core().compile_model(model, "CPU")(np.array([-7], np.int32))
quotients = found[0].item(), found[1].item()
print(f"-7 // 2 of a constant and of an input: {quotients}")
as_seen = quotients == (-4, -3) and right == [True, True, True, False, False, False, False, False, False]
print("as seen in December 2026" if as_seen else "CHANGED")
sys.exit(not as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
