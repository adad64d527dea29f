"""A TensorFlow.js graph model by torch, node by node, written apart from the package's reader.

Only what NanoDet's graph is made of: each operation as TensorFlow's documentation has it.
"""

import base64
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


class Graph:
    """The nodes of a model, computed in a dtype: images [1, 3, H, W] -> {output: array}."""

    def __init__(self, path, dtype=torch.float32):
        content = json.loads(Path(path).read_text())
        self.nodes = {node["name"]: node for node in content["modelTopology"]["node"]}
        self.outputs = {
            name.split(":")[0]: [int(d["size"]) for d in info["tensorShape"]["dim"]]
            for name, info in content["signature"]["outputs"].items()
        }
        self.dtype, self.constants = dtype, {}
        (group,) = content["weightsManifest"]
        (file,) = group["paths"]
        raw, at = (Path(path).parent / file).read_bytes(), 0
        for entry in group["weights"]:
            half = entry.get("quantization", {}).get("dtype") == "float16"
            kind = np.dtype("<f2" if half else {"float32": "<f4", "int32": "<i4"}[entry["dtype"]])
            count = int(np.prod(entry["shape"]))
            array = np.frombuffer(raw, kind, count, at).reshape(entry["shape"])
            at += count * kind.itemsize
            tensor = torch.from_numpy(array.astype(np.float64 if kind.kind == "f" else np.int64))
            self.constants[entry["name"]] = tensor.to(dtype) if kind.kind == "f" else tensor
        assert at == len(raw)

    @torch.no_grad()
    def __call__(self, images):
        done = {"input_1": torch.as_tensor(images).to(self.dtype)}

        def value(name):
            name, _, output = name.partition(":")
            if name in self.constants:
                return self.constants[name]
            if name not in done:
                node = self.nodes[name]
                given = [value(one) for one in node["input"]]
                done[name] = getattr(self, f"do_{node['op']}")(node.get("attr", {}), *given)
            found = done[name]
            return found[int(output or 0)] if isinstance(found, tuple) else found

        return {name: value(name).numpy() for name in self.outputs}

    def do_Identity(self, attr, x):
        return x

    def do_SparseToDense(self, attr, indices, shape, values, default):
        x = torch.full(tuple(shape.tolist()), int(default), dtype=torch.int64)
        if len(indices):
            x[indices[:, 0]] = values
        return x

    def do_Add(self, attr, x, y):
        return x + y

    do_AddV2 = do_Add

    def do_Pad(self, attr, x, sides, fill=0.0):
        flat = [int(side) for pair in reversed(sides.tolist()) for side in pair]
        return F.pad(x, flat, value=float(fill))

    do_PadV2 = do_Pad

    def do_Transpose(self, attr, x, order):
        return x.permute(*order.tolist())

    def do_Conv2D(self, attr, x, kernel):
        assert base64.b64decode(attr["padding"]["s"]) == b"VALID"
        strides = [int(i) for i in attr["strides"]["list"]["i"]][1:3]
        kernel = kernel.permute(3, 2, 0, 1)
        return F.conv2d(x.permute(0, 3, 1, 2), kernel, stride=strides).permute(0, 2, 3, 1)

    def do_MaxPool(self, attr, x):
        assert base64.b64decode(attr["padding"]["s"]) == b"VALID"
        window, strides = (
            [int(i) for i in attr[k]["list"]["i"]][1:3] for k in ("ksize", "strides")
        )
        return F.max_pool2d(x.permute(0, 3, 1, 2), window, strides).permute(0, 2, 3, 1)

    def do_LeakyRelu(self, attr, x):
        return F.leaky_relu(x, attr["alpha"]["f"])

    def do_Sigmoid(self, attr, x):
        return torch.sigmoid(x)

    def do_ConcatV2(self, attr, *given):
        return torch.cat(given[:-1], dim=int(given[-1]))

    def do_SplitV(self, attr, x, sizes, axis):
        return torch.split(x, sizes.tolist(), dim=int(axis))

    def do_Reshape(self, attr, x, shape):
        return x.reshape(shape.tolist())

    def do_ResizeBilinear(self, attr, x, size):
        assert attr["half_pixel_centers"]["b"]
        assert not attr["align_corners"]["b"]
        x = F.interpolate(x.permute(0, 3, 1, 2), size.tolist(), mode="bilinear")
        return x.permute(0, 2, 3, 1)
