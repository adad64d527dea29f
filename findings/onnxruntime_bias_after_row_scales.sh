#!/usr/bin/env bash
# A product of int8 whose inputs have a scale for each row, with a bias after it: onnxruntime fuses
# MatMulInteger, Cast, Mul by both scales and Add into one operation, and the outputs are others. Without
# the bias, or with the two scales multiplied one after the other, they are right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2
cat > "$folder/check.py" <<'PYTHON'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

print(f"onnxruntime {onnxruntime.__version__}")
rng = np.random.default_rng(0)
rows = rng.integers(1, 255, (1, 6, 8), dtype=np.uint8)
stored = {
    "kernel": rng.integers(-127, 127, (8, 4), dtype=np.int8),
    "middle": np.uint8(128),
    "step": rng.uniform(0.5, 1, 4).astype(np.float32),
    "bias": rng.normal(size=4).astype(np.float32) * 100,
}
scale = rng.uniform(0.1, 10, (1, 6, 1)).astype(np.float32)


def off(scales, bias):
    """The largest difference that optimizing makes, relative to the largest output."""
    node, last = helper.make_node, "scaled" if bias else "y"
    nodes = [
        node("MatMulInteger", ["rows", "kernel", "middle"], ["total"]),
        node("Cast", ["total"], ["wide"], to=TensorProto.FLOAT),
        *(node("Mul", inputs, [output]) for inputs, output in scales(last)),
        *([node("Add", ["scaled", "bias"], ["y"])] if bias else []),
    ]
    taken = [
        helper.make_tensor_value_info("rows", TensorProto.UINT8, rows.shape),
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, scale.shape),
    ]
    given = [numpy_helper.from_array(np.asarray(x), name) for name, x in stored.items()]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6, 4])
    graph = helper.make_graph(nodes, "g", taken, [y], given)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    ).SerializeToString()
    found = []
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
        found.append(session.run(None, {"rows": rows, "scale": scale})[0])
    return np.abs(found[0] - found[1]).max() / np.abs(found[0]).max()


def together(last):
    return [(["scale", "step"], "both"), (["wide", "both"], last)]


def one_after_the_other(last):
    return [(["wide", "scale"], "half"), (["half", "step"], last)]


errors = [off(together, True), off(together, False), off(one_after_the_other, True)]
for name, error in zip(("fused with the bias", "no bias", "one after the other"), errors):
    print(f"{name}: {error:.1e} off")
as_seen = errors[0] > 1e-3 and max(errors[1:]) < 1e-5
print("as seen in November 2026" if as_seen else "CHANGED")
raise SystemExit(not as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
