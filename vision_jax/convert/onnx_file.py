"""The convolutions of an ONNX file, in the order in which they are computed.

An exporter to ONNX folds BatchNorm into the convolution before it and gives tensors names of its
own, or numbers: what is left of a network's structure is the order. So a file's tensors are called
"conv_000.weight", "conv_000.bias", "conv_001.weight" and so on here, and the table of an
architecture knows which is which. Only Conv nodes and their initializers are read, by the few
fields of onnx.proto3 (IR version 3 to 11) that are needed, without a library. Files are hostile
until read: every length is held to what is there.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vision_jax.convert.files import Tensor, Tensors
from vision_jax.errors import UserError
from vision_jax.limits import check_shape

# Numbers of fields in onnx.proto3, and of data types in TensorProto.
GRAPH, NODE, INITIALIZER = 7, 1, 5
NODE_INPUT, NODE_KIND = 1, 4
DIMS, DATA_TYPE, FLOATS, NAME, RAW, LOCATION = 1, 2, 4, 8, 9, 14
DTYPES = {1: np.float32, 10: np.float16, 11: np.float64}
MOST_CONVOLUTIONS = 4096
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


def open_onnx(path: Path) -> Tensors:
    """A file's convolution weights, and their biases where they have some.

    Raises:
      UserError: damaged, no ONNX file, with norms that are not folded, or with weights elsewhere.
    """
    try:
        with open(path, "rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        graphs = [value for number, value in _fields(content) if number == GRAPH]
        if len(graphs) != 1:
            raise ValueError(f"{len(graphs)} graphs in it")
        return Tensors(_convolutions(_bytes(graphs[0])))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged or no ONNX file of a network ({error})") from None


def _convolutions(graph: memoryview) -> dict[str, Tensor]:
    initializers: dict[str, memoryview] = {}
    nodes: list[list[str]] = []  # inputs of each convolution
    for number, value in _fields(graph):
        if number == INITIALIZER:
            tensor = _bytes(value)
            initializers[_text(tensor, NAME)] = tensor
        elif number == NODE:
            node = _bytes(value)
            kind = _text(node, NODE_KIND)
            if kind == "BatchNormalization":
                raise ValueError("its norms are not folded: export it in evaluation mode")
            if kind == "Conv":
                inputs = [bytes(_bytes(v)).decode() for n, v in _fields(node) if n == NODE_INPUT]
                nodes.append(inputs)
    if not 0 < len(nodes) <= MOST_CONVOLUTIONS:
        raise ValueError(f"{len(nodes)} convolutions in it")
    entries: dict[str, Tensor] = {}
    for index, inputs in enumerate(nodes):
        for leaf, name in zip(("weight", "bias"), inputs[1:], strict=False):
            if name not in initializers:
                raise ValueError(
                    f"convolution {index} computes its {leaf}: it is in no initializer"
                )
            entries[f"conv_{index:03d}.{leaf}"] = _tensor(initializers[name], name)
    return entries


def _tensor(message: memoryview, name: str) -> Tensor:
    dims: list[int] = []
    data, kind = memoryview(b""), 0
    for number, value in _fields(message):
        if number == DIMS:
            dims += [value] if isinstance(value, int) else _varints(value)
        elif number == DATA_TYPE:
            kind = _number(value)
        elif number in (FLOATS, RAW):
            data = _bytes(value)
        elif number == LOCATION and value:
            raise ValueError(f"tensor {name} is in a file of its own")
    if kind not in DTYPES:
        raise ValueError(f"tensor {name} has data type {kind}, which is no floating point")
    shape, dtype = tuple(dims), np.dtype(DTYPES[kind]).newbyteorder("<")
    check_shape(f"tensor {name}", shape)
    size = dtype.itemsize
    for side in shape:  # not the product first: numbers grow without bound
        size *= side
        if size > len(data):
            break
    if size != len(data):
        raise ValueError(f"tensor {name} has {len(data)} bytes, its shape {shape} another number")

    def read() -> np.ndarray:
        return np.frombuffer(data, dtype).reshape(shape).astype(DTYPES[kind])

    return Tensor(shape, np.dtype(DTYPES[kind]), read)


# Protocol buffers ---------------------------------------------------------------------------------


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of each field of a message: a number, or bytes.

    Raises:
      ValueError: the message ends inside of a field, or has a field of no known kind.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        length = {FIXED64: 8, FIXED32: 4}.get(kind)
        if kind == BYTES:
            length, at = _varint(message, at)
        if length is None or length > len(message) - at:
            raise ValueError(f"it ends inside of a field, or is damaged at its byte {at}")
        yield key >> 3, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """(number, where it ends) of at most 64 bits, seven in a byte, the lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError("a number has no end")


def _varints(packed: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(packed):
        value, at = _varint(packed, at)
        values.append(value)
    return values


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where bytes belong")
    return value


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes stand where a number belongs")
    return value


def _text(message: memoryview, wanted: int) -> str:
    for number, value in _fields(message):
        if number == wanted:
            return bytes(_bytes(value)).decode()
    return ""
