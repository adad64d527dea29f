"""The convolutions of a TensorFlow.js graph model, in the order in which its outputs need them.

Such a model is a JSON file, of a graph and a list of weights, and files of their bytes beside it.
Norms are folded and names are a converter's: what is left of a network's structure is the graph. So
a file's tensors are called "conv_000.weight" (as TensorFlow has them, [h, w, in, out]),
"conv_000.bias", "conv_001.weight" and so on here, as of an ONNX file, and the table of an
architecture knows which is which: outputs are taken by name, and before a node come those that it
takes, the first one first. Files are hostile until read: every size is held to what is there.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vision_jax.convert.files import Tensor, Tensors
from vision_jax.errors import UserError
from vision_jax.files import read_bytes, read_json
from vision_jax.limits import check_shape

LARGEST_GRAPH = 2**26  # bytes of the JSON
LARGEST_SHARD = 2**31
MOST_CONVOLUTIONS = 4096
CONVOLUTIONS = ("Conv2D", "_FusedConv2D")
UNREAD = ("DepthwiseConv2dNative", "FusedDepthwiseConv2dNative", "FusedBatchNormV3")
ADDITIONS = ("Add", "AddV2", "BiasAdd")
# By the words of weightsManifest, for what is stored as it is and for what is stored in half.
DTYPES = {"float32": np.float32, "float16": np.float16, "int32": np.int32, "bool": np.uint8}


def open_tfjs(path: Path) -> tuple[Tensors, tuple[Path, ...]]:
    """A graph model's convolution weights and their biases, and the files that hold them.

    Raises:
      UserError: damaged, no graph model, with norms that are not folded or convolutions of another
        kind, or weights that are packed in whole numbers.
    """
    content = read_json(path, LARGEST_GRAPH)
    try:
        if content["format"] != "graph-model":
            raise ValueError(f"its format is {str(content['format'])[:40]!r}")
        nodes = {node["name"]: node for node in content["modelTopology"]["node"]}
        weights, shards = _weights(content["weightsManifest"], path.parent)
        outputs = sorted(content["signature"]["outputs"])
        return Tensors(_convolutions(nodes, outputs, weights)), shards
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{path}: damaged or no TensorFlow.js graph model of a network ({reason})"
        ) from None


# The graph ----------------------------------------------------------------------------------------


def _convolutions(
    nodes: Mapping[str, Any], outputs: Sequence[str], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Kernels and biases by number."""
    users: dict[str, list[str]] = {}
    for name, node in nodes.items():
        for given in _inputs(node):
            users.setdefault(given, []).append(name)
    entries: dict[str, Tensor] = {}
    count = 0
    for name in _ordered(nodes, outputs):
        node = nodes[name]
        if node["op"] in UNREAD:
            raise ValueError(f"{name} is a {node['op']}, which is not read here")
        if node["op"] not in CONVOLUTIONS:
            continue
        if count == MOST_CONVOLUTIONS:
            raise ValueError(f"more than {MOST_CONVOLUTIONS} convolutions in it")
        _, kernel, *biases = _inputs(node)
        for user in users.get(name, ()) if not biases else ():
            added = [given for given in _inputs(nodes[user]) if given in weights]
            biases += added if nodes[user]["op"] in ADDITIONS else []
        for leaf, given in zip(("weight", "bias"), (kernel, *biases[:1]), strict=False):
            if given not in weights:
                raise ValueError(f"{name} computes its {leaf}: it is in no file")
            entries[f"conv_{count:03d}.{leaf}"] = weights[given]
        count += 1
    if not count:
        raise ValueError("no convolutions in it")
    return entries


def _inputs(node: Mapping[str, Any]) -> list[str]:
    """Names of the nodes that a node takes, without the number of an output."""
    given = [str(name) for name in node.get("input", ())]
    return [name.partition(":")[0] for name in given if not name.startswith("^")]


def _ordered(nodes: Mapping[str, Any], outputs: Sequence[str]) -> Iterator[str]:
    """The nodes that outputs need, each after what it takes, the first of these first."""
    begun: set[str] = set()
    for output in outputs:
        stack = [(output.partition(":")[0], False)]
        while stack:
            name, ready = stack.pop()
            if ready:
                yield name
            elif name not in begun:
                begun.add(name)
                stack.append((name, True))
                stack += [(given, False) for given in reversed(_inputs(nodes[name]))]


# The weights --------------------------------------------------------------------------------------


def _weights(
    groups: Sequence[Mapping[str, Any]], folder: Path
) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """(tensors by name, the files of their bytes); a group's tensors lie one after the other."""
    tensors: dict[str, Tensor] = {}
    shards: list[Path] = []
    for group in groups:
        files = [_shard(str(name), folder) for name in group["paths"]]
        content = memoryview(b"".join(read_bytes(file, LARGEST_SHARD) for file in files))
        at = 0
        for entry in group["weights"]:
            name, tensor, length = _tensor(entry, content[at:])
            tensors[name] = tensor
            at += length
        if at != len(content):
            raise ValueError(f"its weights are {at} bytes, and their files {len(content)}")
        shards += files
    return tensors, tuple(shards)


def _shard(name: str, folder: Path) -> Path:
    if Path(name).name != name:
        raise ValueError(f"weights in {name!r}, which is no file beside it")
    return folder / name


def _tensor(entry: Mapping[str, Any], content: memoryview) -> tuple[str, Tensor, int]:
    """(name, tensor, bytes) of an entry of the list, whose bytes begin those given."""
    name, shape = str(entry["name"]), tuple(entry["shape"])
    stored = entry.get("quantization", {}).get("dtype", entry["dtype"])
    if stored not in DTYPES or "scale" in entry.get("quantization", {}):
        raise ValueError(f"weight {name[:80]!r} is stored as {str(stored)[:40]}: not read here")
    check_shape(f"weight {name[:80]!r}", shape)
    dtype = np.dtype(DTYPES[stored]).newbyteorder("<")
    length = math.prod(shape) * dtype.itemsize
    if length > len(content):
        raise ValueError(f"weight {name[:80]!r} of shape {shape} goes past the end of its file")
    data = content[:length]

    def read() -> np.ndarray:
        return np.frombuffer(data, dtype).reshape(shape).astype(DTYPES[stored])

    return name, Tensor(shape, np.dtype(DTYPES[stored]), read), length
