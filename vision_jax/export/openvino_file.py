"""OpenVINO files, by way of ONNX of a fixed size: OpenVINO computes float64 in float32."""

import hashlib
import importlib.metadata
import math
import re
from pathlib import Path
from typing import Any

from vision_jax.export import onnx_file
from vision_jax.export.serving import Serving
from vision_jax.files import write_whole

MOST_COMPARED = 2**21  # by a stable TopK, in about 8 ms


def write(serving: Serving, batch: int, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Writes FOLDER/model.xml and model.bin; returns (the first, what its description says).

    Args:
      serving: of images of one size.
      batch: images at once.
      folder: where.

    Raises:
      UserError: a primitive that there is no way to write.
    """
    import openvino

    content, about = onnx_file.write(serving, batch)
    between = folder / "between.onnx"
    between.write_bytes(content)
    model = openvino.Core().read_model(between)
    _keep_order_of_ties(model)
    _share_constants(model)
    path = folder / "model.xml"
    if serving.int8 and not serving.rounds_inputs:  # which OpenVINO does where weights are int8
        model.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    openvino.save_model(model, path, compress_to_fp16=False)
    between.unlink()
    # A fifth of the text is indentation, and of a small model in int8 the text is a third.
    write_whole(re.sub(rb">\s+<", b"><", path.read_bytes()), path)
    return path, about | {"openvino": importlib.metadata.version("openvino")}


def _keep_order_of_ties(model: Any) -> None:
    """Of equal values the first comes first, as ONNX has it and OpenVINO's reader forgets.

    Where that takes no time: it sorts by comparing each value with all that are kept.
    """
    from openvino import opset13

    for node in model.get_ops():
        if node.get_type_name() != "TopK":
            continue
        told = node.get_attributes()
        kept = node.get_output_shape(0)[told["axis"]]
        if math.prod(node.get_input_shape(0)) * kept <= MOST_COMPARED:
            stable = opset13.topk(
                *(value.get_source_output() for value in node.inputs()),
                told["axis"], told["mode"], "value", told["index_element_type"], stable=True,
            )  # fmt: skip
            for old, new in zip(node.outputs(), stable.outputs(), strict=True):
                old.replace(new)


def _share_constants(model: Any) -> None:
    """One of each; the reader makes those of an operation anew for every one of them."""
    first: dict[Any, Any] = {}
    for node in model.get_ops():
        if node.get_type_name() == "Constant":
            values = node.data
            (output,) = node.outputs()
            digest = hashlib.sha256(values.tobytes()).digest()  # and no copy of all weights
            key = (str(node.get_element_type()), values.shape, digest)
            if (kept := first.setdefault(key, output)) is not output:
                output.replace(kept)
