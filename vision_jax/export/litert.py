"""LiteRT files (.tflite) by litert-converter, which takes StableHLO and needs no TensorFlow.

The converter knows neither 64-bit numbers nor loops, and open sizes of some operations alone: so a
file is for images of one size, as many at once as it was written for, and loops are written out.
"""

import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from vision_jax import platform
from vision_jax.errors import UserError
from vision_jax.export.litert_int8 import store_int8
from vision_jax.export.serving import Serving

SIGNATURE = "serving_default"


def write(serving: Serving, batch: int) -> tuple[bytes, dict[str, Any]]:
    """(what the file holds, what its description says).

    Args:
      serving: of images of one size, whose function has all kernels in float.
      batch: images at once.

    Raises:
      UserError: an operation that LiteRT has not, or int8 that it can't multiply by.
    """
    with _quiet():
        from litert_converter import converter_api_ext as converter
        from litert_converter.mlir import ir, passmanager

    names = list(serving.outputs)

    def listed(images: jax.Array) -> list[jax.Array]:
        outputs = serving.function(images)
        return [outputs[name] for name in names]

    with platform.traced_for(platform.NO_LOOPS):
        text = jax.export.export(jax.jit(listed))(serving.images_spec(batch)).mlir_module()
    context = ir.Context()
    converter.prepare_mlir_context(context)
    try:
        with context, ir.Location.unknown():
            module = ir.Module.parse(text)
            converter.set_signature(module.operation, SIGNATURE, ["images"], names)
            converter.run_convert_to_tfl_passes(
                module, passmanager.PassManager(), converter.ConvertToTFLConfig()
            )
            content = bytes(converter.export_flatbuffer_to_bytes(module.operation))
    except ValueError as error:  # what the passes refuse
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"litert-converter can't convert the model: {reason}") from None
    about: dict[str, Any] = {"litert-converter": importlib.metadata.version("litert-converter")}
    about["signature"] = SIGNATURE
    if serving.int8:
        content, left = store_int8(content, serving.int8)
        about["not_in_int8"] = sorted(left)
    return content, about


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what TensorFlow's core, which is in the converter, says of oneDNN on stderr."""
    name = "TF_ENABLE_ONEDNN_OPTS"
    before = os.environ.get(name)
    os.environ.setdefault(name, "0")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
