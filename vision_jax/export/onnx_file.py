"""ONNX files, of JAX's own trace: images of any size and number, one graph without loops.

Written here and not by a package: jax2onnx 0.17.1 cannot write these graphs (a ViT's is refused by
onnxruntime, a max-pooling with arguments by place ends in a TypeError), and what it writes wrongly
without a word is told at the functions of onnx_elements.py, onnx_shapes.py and onnx_products.py.
"""

import importlib.metadata
from typing import Any

import jax

import vision_jax
from vision_jax import platform
from vision_jax.export.serving import Serving


def write(serving: Serving, batch: int | None) -> tuple[bytes, dict[str, Any]]:
    """(what the file holds, what its description says).

    Args:
      serving: of the model.
      batch: images at once; None: any number.

    Raises:
      UserError: a primitive that there is no way to write.
    """
    import onnx
    from onnx import helper

    from vision_jax.export.onnx_elements import ELEMENTS
    from vision_jax.export.onnx_graph import DTYPES, OPSET, Graph
    from vision_jax.export.onnx_products import PRODUCTS
    from vision_jax.export.onnx_shapes import SHAPES

    images = serving.images_spec(batch)
    names = list(serving.outputs)

    def listed(x: jax.Array) -> list[jax.Array]:
        outputs = serving.function(x)
        return [outputs[name] for name in names]

    with platform.traced_for(platform.NO_LOOPS):
        program = jax.jit(listed).trace(images).jaxpr
    graph = Graph({**ELEMENTS, **SHAPES, **PRODUCTS}, "images", images.shape)
    found = graph.walk(program, ["images"])
    nodes, stored = graph.finish(dict(zip(names, found, strict=True)))
    outputs = [
        _info(helper, name, DTYPES[aval.dtype.name], aval.shape)
        for name, aval in zip(names, program.out_avals, strict=True)
    ]
    taken = _info(helper, "images", DTYPES["uint8"], images.shape)
    made = helper.make_graph(nodes, "model", [taken], outputs, stored)
    model = helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=9,
        producer_name="vision_jax",
        producer_version=vision_jax.__version__,
    )
    onnx.checker.check_model(model)
    version = importlib.metadata.version("onnx")
    return model.SerializeToString(), {"onnx": version, "opset": OPSET}


def _info(helper: Any, name: str, dtype: int, shape: Any) -> Any:
    sides = [side if isinstance(side, int) else str(side) for side in shape]
    return helper.make_tensor_value_info(name, dtype, sides)
