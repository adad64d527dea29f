"""int8 kernels in a LiteRT file: float constants that lie on int8's levels, as integers.

The converter lays kernels out for each operation and folds norms into them, in float. A kernel is
known again by its integers: whatever an output was multiplied by, its largest weight is 127 steps.

An operation of float inputs and int8 weights rounds its inputs itself, each row or image by its own
range, and multiplies int8 by int8. Where weights alone are int8, a node before makes them float.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vision_jax.errors import UserError
from vision_jax.trees.quantize import Integers
from vision_jax.trees.quantized import LEVELS

# Operations whose second input is a kernel -> its axis of outputs.
OUTPUTS = {"FULLY_CONNECTED": 0, "CONV_2D": 0, "DEPTHWISE_CONV_2D": 3}
IDENTIFIER = b"TFL3"  # of the file format


def store_int8(content: bytes, kernels: Mapping[str, Integers]) -> tuple[bytes, set[str]]:
    """The file with the kernels in int8, each with a scale for each output.

    A kernel whose inputs don't depend on the images is no more in the file, its product is: the
    queries' in a DETR's first self-attention.

    Args:
      content: a .tflite with all kernels in float32.
      kernels: what is quantized of the model, by path.

    Returns:
      (the file, the paths of the kernels that are not in it)

    Raises:
      UserError: calibrated inputs, or no kernel that is in the file.
    """
    if calibrated := [path for path, one in kernels.items() if one.inputs == "static"]:
        raise UserError(
            f"{calibrated[0]}: LiteRT has no product of calibrated int8 inputs with a float "
            "result: quantize with --config.ptq.activations=dynamic, or export to onnx"
        )
    by_key: dict[Any, list[str]] = {}  # equal kernels are one, stored for each of their tensors
    for path, one in kernels.items():
        by_key.setdefault(_key(np.asarray(one.values), one.values.ndim - 1), []).append(path)
    file = _File(content)
    found: set[str] = set()
    for graph in file.model.subgraphs:
        stored: dict[int, list[str]] = {}  # tensors that are in int8 by now -> the kernels' paths
        operators = []
        for operator in graph.operators:
            axis = OUTPUTS.get(file.name_of(operator))
            if axis is not None:
                place = int(operator.inputs[1])
                kernel = None if place in stored else file.constant(graph, place)
                if kernel is not None:
                    levels, scale = _levels(kernel, axis)
                    if same := by_key.get(_key(levels, axis)):
                        stored[place] = same
                        found |= {*same}
                        file.store(graph.tensors[place], levels, scale, axis)
                if place in stored:
                    dynamic = kernels[stored[place][0]].inputs == "dynamic"
                    if not (dynamic and file.rounds_inputs(graph, operator)):
                        operators.append(file.dequantize(graph, operator))
            operators.append(operator)
        graph.operators = operators
    if not found:
        raise UserError(
            f"{min(kernels)} and all others: the converter made other kernels of them, which can't "
            "be stored in int8: export the model in float"
        )
    return file.pack(), kernels.keys() - found


def _levels(kernel: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """(i8 of the kernel's shape, f32[outputs]): the levels that each output lies on."""
    largest = np.abs(kernel).max(tuple(at for at in range(kernel.ndim) if at != axis))
    scale = np.where(largest > 0, largest / np.float32(LEVELS), 1).astype(np.float32)
    along = [-1 if at == axis else 1 for at in range(kernel.ndim)]
    return np.rint(kernel / scale.reshape(along)).astype(np.int8), scale


def _key(levels: np.ndarray, axis: int) -> tuple[int, bytes]:
    """The same of a kernel in any layout [..., in, out], [out, ..., in] or [1, ..., out].

    And of one whose outputs have been multiplied by negative numbers.
    """
    rows = np.moveaxis(levels, axis, 0).reshape(levels.shape[axis], -1)
    first = np.take_along_axis(rows, (rows != 0).argmax(1)[:, None], 1)
    return len(rows), (rows * np.where(first < 0, -1, 1).astype(np.int8)).tobytes()


class _File:
    """A .tflite by the format's schema."""

    def __init__(self, content: bytes):
        from litert_converter import schema_py_generated as schema

        self.schema: Any = schema
        self.model = schema.ModelT.InitFromPackedBuf(content)
        self._names = {
            code: name for name, code in vars(schema.BuiltinOperator).items() if name.isupper()
        }

    def name_of(self, operator: Any) -> str:
        code = self.model.operatorCodes[operator.opcodeIndex]
        return self._names[max(code.builtinCode, code.deprecatedBuiltinCode)]

    def constant(self, graph: Any, place: int) -> np.ndarray | None:
        """A float32 tensor's value; None: it is computed, or of another type."""
        tensor = graph.tensors[place]
        data = self.model.buffers[tensor.buffer].data
        if tensor.type != self.schema.TensorType.FLOAT32 or data is None:
            return None
        return np.frombuffer(np.asarray(data, np.uint8), "<f4").reshape(tensor.shape)

    def rounds_inputs(self, graph: Any, operator: Any) -> bool:
        """Whether an operation takes int8 weights beside float inputs."""
        channels, inputs = (graph.tensors[place].shape[-1] for place in operator.inputs[:2])
        name = self.name_of(operator)
        return name == "FULLY_CONNECTED" or (name == "CONV_2D" and channels == inputs)

    def store(self, tensor: Any, levels: np.ndarray, scale: np.ndarray, axis: int) -> None:
        """Makes int8 of a constant."""
        self.model.buffers.append(self.schema.BufferT(data=levels.reshape(-1).view(np.uint8)))
        tensor.type, tensor.buffer = self.schema.TensorType.INT8, len(self.model.buffers) - 1
        tensor.quantization = self.schema.QuantizationParametersT(
            scale=scale, zeroPoint=np.zeros(len(scale), np.int64), quantizedDimension=axis
        )

    def dequantize(self, graph: Any, operator: Any) -> Any:
        """An operation that makes another one's kernel float, which takes it from there."""
        images, place, *others = operator.inputs
        shape = graph.tensors[place].shape
        graph.tensors.append(
            self.schema.TensorT(shape=shape, type=self.schema.TensorType.FLOAT32, hasRank=True)
        )
        made = len(graph.tensors) - 1
        operator.inputs = np.array([images, made, *others], np.int32)
        code = self.schema.BuiltinOperator.DEQUANTIZE
        codes = [max(c.builtinCode, c.deprecatedBuiltinCode) for c in self.model.operatorCodes]
        if code not in codes:
            codes.append(code)
            self.model.operatorCodes.append(
                self.schema.OperatorCodeT(deprecatedBuiltinCode=code, builtinCode=code, version=2)
            )
        return self.schema.OperatorT(
            opcodeIndex=codes.index(code),
            inputs=np.array([place], np.int32),
            outputs=np.array([made], np.int32),
        )

    def pack(self) -> bytes:
        """The file, without what no tensor refers to."""
        import flatbuffers

        kept = {0, *(one.buffer for one in self.model.metadata or ())}
        kept |= {tensor.buffer for graph in self.model.subgraphs for tensor in graph.tensors}
        for place, buffer in enumerate(self.model.buffers):
            if place not in kept:
                buffer.data = None
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(self.model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())
