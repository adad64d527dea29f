"""ONNX files: YOLOX with its norms folded in, and files that are damaged or of something else."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax import convert
from vision_jax.convert.onnx_file import open_onnx
from vision_jax.convert.yolox import _rules
from vision_jax.errors import UserError
from vision_jax.models.families import FAMILIES, build_model
from vision_jax.models.yolox import EPSILON
from vision_jax.trees.paths import flatten

SIZE = (32, 64)


# A writer of protocol buffers ---------------------------------------------------------------------


def varint(number):
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def field(number, value):
    """A field that is a number, or bytes, or a text."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name, array, kind=1, more=b""):
    dims = b"".join(field(1, side) for side in array.shape)
    return dims + field(2, kind) + field(8, name) + field(9, array.tobytes()) + more


def node(kind, *inputs):
    return b"".join(field(1, name) for name in inputs) + field(2, "out") + field(4, kind)


def model(nodes, initializers):
    graph = [field(1, one) for one in nodes] + [field(5, one) for one in initializers]
    return field(1, 8) + field(2, "a test") + field(7, b"".join(graph))


def convolutions(weights):
    """A file of convolutions with biases, in order, their tensors in another order."""
    names = [(f"w{index}", f"b{index}") for index in range(len(weights))]
    nodes = [node("Conv", "x", *pair) for pair in names]
    tensors = [
        tensor(name, np.ascontiguousarray(array))
        for pair, arrays in zip(names, weights, strict=True)
        for name, array in zip(pair, arrays, strict=True)
    ]
    return model([node("Relu", "x"), *nodes], tensors[::-1])


# YOLOX -------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("depthwise", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_yolox_with_folded_norms_computes_the_same(depthwise, tmp_path):
    sizes = {"csp_depth": 1, "width": 8, "depthwise": depthwise}
    arguments = {**FAMILIES["yolox"].defaults, **sizes, "num_classes": 4}
    built = build_model("yolox", **arguments)
    like = jax.eval_shape(built.init, jax.random.key(0), jnp.zeros((1, *SIZE, 3)))
    rng = np.random.default_rng(0)
    flat = {}
    for path, leaf in {p: x for tree in like.values() for p, x in flatten(tree).items()}.items():
        noise = rng.normal(size=leaf.shape)
        scale = max(np.prod(leaf.shape[:-1]), 1) ** -0.5 if path.endswith("kernel") else 0.2
        one = path.endswith(("scale", "var"))
        flat[path] = np.asarray(np.abs(1 + 0.2 * noise) if one else scale * noise, leaf.dtype)
    weights = []
    for rule in _rules(arguments):
        (path,) = rule.paths
        if not path.endswith("/kernel"):
            continue
        (kernel,) = rule.layout.to_file([flat[path]])
        if "_head" in path.rpartition("/")[0].rpartition("/")[2]:
            weights.append((kernel, flat[path.replace("kernel", "bias")]))
            continue
        scale, bias, mean, var = (
            flat[path.replace("conv/kernel", f"bn/{leaf}")]
            for leaf in ("scale", "bias", "mean", "var")
        )
        gain = scale / np.sqrt(np.float64(var) + EPSILON)
        folded = kernel * gain.reshape(-1, 1, 1, 1), bias - mean * gain
        weights.append([np.asarray(array, np.float32) for array in folded])
    (tmp_path / "y.onnx").write_bytes(convolutions(weights))

    found = convert.read_weights(str(tmp_path / "y.onnx"))
    family, own = convert.recognize(found)
    assert family == convert.own_naming(family) == "yolox"  # it is written as published
    assert {name: own[name] for name in (*sizes, "num_classes")} == {**sizes, "num_classes": 4}
    assert convert.assumptions(found) == ("activation=silu",)
    target = {path: x for tree in like.values() for path, x in flatten(tree).items()}
    folded = convert.import_weights(found, target, own)
    images = rng.random((1, *SIZE, 3))
    with jax.enable_x64(True):  # so that what differs is the rounding of the folded weights alone
        model = build_model("yolox", **{**arguments, "dtype": jnp.float64})
        apply = jax.jit(model.apply)
        ours, theirs = (apply(nested(like, arrays), images) for arrays in (folded, flat))
    for name, value in theirs.items():
        assert np.abs(ours[name] - value).max() <= 1e-5 * np.abs(value).max(), name


def nested(like, flat):
    def at(path, leaf):
        return jnp.asarray(flat["/".join(str(key.key) for key in path[1:])], jnp.float64)

    return jax.tree_util.tree_map_with_path(at, like)


def test_another_number_of_convolutions_is_no_yolox(tmp_path):
    shapes = [((4, 12, 3, 3), (4,)), *[((4, 4, 1, 1), (4,))] * 60]
    weights = [[np.zeros(shape, np.float32) for shape in pair] for pair in shapes]
    (tmp_path / "y.onnx").write_bytes(convolutions(weights))
    with pytest.raises(UserError, match="61 convolutions: no YOLOX has so many"):
        convert.recognize(convert.read_weights(str(tmp_path / "y.onnx")))


# Hostile files -----------------------------------------------------------------------------------

ARRAY = np.ones((2, 3, 1, 1), np.float32)
CONV = node("Conv", "x", "w")
GOOD = model([CONV], [tensor("w", ARRAY)])
FILES = {
    "empty": (b"", "empty file"),
    "another format": (b"PK\x03\x04" + bytes(40), "damaged"),
    "no convolution": (model([node("Relu", "x")], []), "0 convolutions"),
    "norms": (model([CONV, node("BatchNormalization", "x")], [tensor("w", ARRAY)]), "not folded"),
    "computed weights": (model([CONV], []), "in no initializer"),
    "bytes missing": (model([CONV], [tensor("w", ARRAY[:1]) + field(1, 2)]), "another number"),
    "a huge shape": (model([CONV], [field(1, 2**62) * 4 + tensor("w", ARRAY)]), "another number"),
    "many axes": (model([CONV], [field(1, 1) * 90 + tensor("w", ARRAY)]), "axes"),
    "whole numbers": (model([CONV], [tensor("w", ARRAY, kind=7)]), "data type 7"),
    "another file's": (model([CONV], [tensor("w", ARRAY, more=field(14, 1))]), "file of its own"),
    "an endless number": (b"\xff" * 30, "no end"),
    "a number for bytes": (field(7, 3), "a number stands"),
    "no text": (model([field(4, b"\xff\xfe")], []), "damaged"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_such_file_is_refused(name, tmp_path):
    content, message = FILES[name]
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_onnx(tmp_path / "a.onnx")
    assert "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_read_or_refused(tmp_path):
    (tmp_path / "a.onnx").write_bytes(GOOD)
    np.testing.assert_array_equal(open_onnx(tmp_path / "a.onnx")["conv_000.weight"], ARRAY)
    for length in range(1, len(GOOD)):
        (tmp_path / "a.onnx").write_bytes(GOOD[:length])
        with pytest.raises(UserError):
            open_onnx(tmp_path / "a.onnx")


def test_half_precision_and_packed_sizes(tmp_path):
    dims = field(1, b"".join(map(varint, ARRAY.shape)))
    half = ARRAY.astype(np.float16).tobytes()
    packed = dims + field(2, 10) + field(8, "w") + field(9, half)
    floats = dims + field(2, 1) + field(8, "w") + field(4, struct.pack("<6f", *range(6)))
    for message, wanted in ((packed, ARRAY), (floats, np.arange(6).reshape(ARRAY.shape))):
        (tmp_path / "a.onnx").write_bytes(model([CONV], [message]))
        np.testing.assert_array_equal(open_onnx(tmp_path / "a.onnx")["conv_000.weight"], wanted)
