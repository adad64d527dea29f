#!/usr/bin/env bash
# ONNX's TopK gives equal values in the order of their places, and its Max and Min keep a NaN. OpenVINO
# reads the file and gives ties in another order; of a NaN and a number it takes the one that the node
# names second.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 onnx==1.23.2
cat > "$folder/check.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import onnx
import openvino
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

print(f"openvino {version('openvino')}, onnx {version('onnx')}")


def both(x, kind, inputs, wanted, dtype, **attributes):
    """The last output of a node, by onnx's own evaluator and by OpenVINO."""
    constants = {"nine": np.array([9]), "one": np.float32(1)}
    outputs = ["values", "places"][: 1 + (kind == "TopK")]
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, outputs, **attributes)],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info(outputs[-1], dtype, ["n"])],
        [numpy_helper.from_array(constants[n], n) for n in inputs if n in constants],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    onnx.checker.check_model(model)
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    read = openvino.Core().read_model(model.SerializeToString())
    found = openvino.Core().compile_model(read, "CPU", settings)(x)[0]
    told = ReferenceEvaluator(model).run(None, {"x": x})[0]
    right = np.array_equal(found, told, equal_nan=dtype == TensorProto.FLOAT)
    print(f"{kind}({', '.join(inputs)}): {told.tolist()}; OpenVINO: {found.tolist()}")
    return right == wanted


ties = (np.arange(90) % 3).astype(np.float32)
nan = np.array([np.nan, 0, 2], np.float32)
as_seen = [
    both(ties, "TopK", ["x", "nine"], False, TensorProto.INT64, axis=0),
    both(nan, "Max", ["x", "one"], False, TensorProto.FLOAT),
    both(nan, "Max", ["one", "x"], True, TensorProto.FLOAT),
    both(nan, "Min", ["x", "one"], False, TensorProto.FLOAT),
]
print("as seen in December 2026" if all(as_seen) else "CHANGED")
sys.exit(not all(as_seen))
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
