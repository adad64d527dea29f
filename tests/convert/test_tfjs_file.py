"""TensorFlow.js graph models: NanoDet with its norms folded in, and files that are damaged.

tests/parity/test_real_nanodet.py reads the real one.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax import convert
from vision_jax.convert.nanodet import COCO, _in_order
from vision_jax.convert.tfjs_file import open_tfjs
from vision_jax.errors import UserError
from vision_jax.models.families import FAMILIES, build_model
from vision_jax.models.nanodet import EPSILON
from vision_jax.trees.paths import flatten, unflatten

SIZE = (32, 64)


# A writer -----------------------------------------------------------------------------------------


def graph(weights, half=()):
    """(JSON, bytes) of convolutions with biases, one after the other, the last node first."""
    nodes, listed, content = [], [], b""
    last = "input"
    for index, pair in enumerate(weights):
        names = [f"k{index}", f"b{index}"]
        for name, array in zip(names, pair, strict=True):
            entry = {"name": name, "shape": list(array.shape), "dtype": "float32"}
            if name in half:
                entry["quantization"] = {"dtype": "float16", "original_dtype": "float32"}
            listed.append(entry)
            content += np.asarray(array, "<f2" if name in half else "<f4").tobytes()
            nodes.append({"name": name, "op": "Const"})
        nodes += [
            {"name": f"c{index}", "op": "Conv2D", "input": [f"{last}:0", names[0]]},
            {"name": f"a{index}", "op": "BiasAdd", "input": [f"c{index}", names[1], "^c0"]},
        ]
        last = f"a{index}"
    return {
        "format": "graph-model",
        "signature": {"outputs": {f"{last}:0": {}}},
        "modelTopology": {"node": [*nodes[::-1], {"name": "input", "op": "Placeholder"}]},
        "weightsManifest": [{"paths": ["w.bin"], "weights": listed}],
    }, content


def written(folder, content, weights, name="n.json"):
    (folder / name).write_text(json.dumps(content))
    (folder / "w.bin").write_bytes(weights)
    return folder / name


# NanoDet ------------------------------------------------------------------------------------------


def folded(flat, path):
    """The one or two arrays of a path of `_in_order` as a TensorFlow.js model has them."""
    if path.endswith("_head"):
        parts = [path.replace("_head", f"{part}_head") for part in ("class", "side")]
        kernel, bias = (
            np.concatenate([flat[f"{part}/{leaf}"] for part in parts], axis=-1)
            for leaf in ("kernel", "bias")
        )
        return kernel[None, None], bias
    if path.startswith("lateral"):
        return flat[f"{path}/kernel"][None, None], flat[f"{path}/bias"]
    scale, bias, mean, var = (flat[f"{path}/bn/{x}"] for x in ("scale", "bias", "mean", "var"))
    gain = scale / np.sqrt(np.float64(var) + EPSILON)
    kernel = flat[f"{path}/conv/kernel"]
    kernel = kernel[:, :, ::-1] if path == "stem" else kernel
    return kernel * gain, bias - mean * gain


@pytest.mark.long
def test_a_nanodet_with_folded_norms_computes_the_same(tmp_path):
    sizes = {"stem_width": 4, "width": 8}
    arguments = {**FAMILIES["nanodet"].defaults, **sizes, "num_classes": 80}
    built = build_model("nanodet", **arguments)
    like = jax.eval_shape(built.init, jax.random.key(0), jnp.zeros((1, *SIZE, 3)))
    target = {path: x for tree in like.values() for path, x in flatten(tree).items()}
    rng = np.random.default_rng(0)
    flat = {}
    for path, leaf in target.items():
        noise = rng.normal(size=leaf.shape)
        scale = max(np.prod(leaf.shape[:-1]), 1) ** -0.5 if path.endswith("kernel") else 0.2
        one = path.endswith(("scale", "var"))
        flat[path] = np.asarray(np.abs(1 + 0.2 * noise) if one else scale * noise, leaf.dtype)
    weights = [folded(flat, path) for path in _in_order(arguments)]
    file = written(tmp_path, *graph(weights))

    found = convert.read_weights(str(file))
    assert [path.name for path in found.files] == ["n.json", "w.bin"]  # both are in its sha256
    family, own = convert.recognize(found)
    assert family == convert.own_naming(family) == "nanodet"
    assert own == {**own, **sizes, "num_classes": 80}
    assert convert.class_names_of(found) == list(COCO)
    assert len(set(COCO)) == 80
    assert convert.assumptions(found) == ("depths=(1, 2, 2, 3)", "bins=11")
    read = convert.import_weights(found, target, own)
    images = rng.random((1, *SIZE, 3))
    with jax.enable_x64(True):  # so that what differs is the rounding of the folded weights alone
        apply = jax.jit(build_model("nanodet", **{**arguments, "dtype": jnp.float64}).apply)
        ours, theirs = (
            apply(
                {
                    kind: unflatten(
                        tree, {p: jnp.asarray(a[p], jnp.float64) for p in flatten(tree)}
                    )
                    for kind, tree in like.items()
                },
                images,
            )
            for a in (read, flat)
        )
    for name, value in theirs.items():
        assert np.abs(ours[name] - value).max() <= 1e-5 * np.abs(value).max(), name


# The reader ---------------------------------------------------------------------------------------


def pair(rng, inputs=2, outputs=3):
    return rng.normal(size=(1, 1, inputs, outputs)), rng.normal(size=outputs)


def test_convolutions_come_in_the_order_in_which_outputs_need_them(tmp_path, rng):
    """Whatever the order of nodes, weights, outputs; in half precision, and in several files."""
    weights = [pair(rng) for _ in range(3)]
    content, raw = graph(weights, half=("k1", "b2"))
    nodes = {node["name"]: node for node in content["modelTopology"]["node"]}
    # c0 -> c2; c1 -> out as well, which is named first: so c1, c0, c2.
    nodes["c2"]["input"][0] = "a0"
    nodes["c1"]["input"][0] = "input"
    content["signature"]["outputs"] = {"z:0": {}, "a2:0": {}, "a1:0": {}}
    nodes["z"] = {"name": "z", "op": "Identity", "input": ["a2"]}
    content["modelTopology"]["node"] = list(nodes.values())
    content["weightsManifest"][0]["paths"] = ["w.bin", "v.bin"]
    (tmp_path / "v.bin").write_bytes(raw[50:])
    tensors, shards = open_tfjs(written(tmp_path, content, raw[:50]))
    assert [path.name for path in shards] == ["w.bin", "v.bin"]
    assert sorted(tensors) == sorted(
        f"conv_00{i}.{x}" for i in range(3) for x in ("weight", "bias")
    )
    for number, index in enumerate((1, 0, 2)):
        for leaf, array in zip(("weight", "bias"), weights[index], strict=True):
            read = tensors[f"conv_00{number}.{leaf}"]
            assert read.dtype == np.float32
            np.testing.assert_allclose(read, array, rtol=2e-3, atol=1e-3)


def change(content, path, value):
    *above, last = path
    for key in above:
        content = content[key]
    content[last] = value


MANIFEST, FIRST = ("weightsManifest", 0), ("weightsManifest", 0, "weights", 0)
NODES = ("modelTopology", "node")
DAMAGED = {
    "another format": (("format",), "layers-model", "its format is 'layers-model'"),
    "no graph": (("modelTopology",), {}, "no 'node'"),
    "nodes that are no objects": (NODES, [3], "not subscriptable"),
    "no outputs": (("signature",), None, "graph model"),
    "an output that is nowhere": (("signature", "outputs"), {"x": 0}, "no 'x'"),
    "an input that is nowhere": ((*NODES, 1, "input"), ["y", "k1"], "no 'y'"),
    "norms": ((*NODES, 1, "op"), "FusedBatchNormV3", "which is not read"),
    "another kind": ((*NODES, 1, "op"), "DepthwiseConv2dNative", "which is not read"),
    "a kernel that is computed": ((*NODES, 1, "input"), ["a0", "a0"], "computes its weight"),
    "one input": ((*NODES, 1, "input"), ["a0"], "graph model"),
    "another folder's file": ((*MANIFEST, "paths"), ["../w.bin"], "no file beside it"),
    "a root's file": ((*MANIFEST, "paths"), ["/etc/passwd"], "no file beside it"),
    "a file that is not there": ((*MANIFEST, "paths"), ["q.bin"], "can't be read"),
    "no files": ((*MANIFEST, "paths"), [], "goes past the end"),
    "fewer weights": ((*MANIFEST, "weights"), [], "weights are 0 bytes, and their files"),
    "a large shape": ((*FIRST, "shape"), [2**62, 2**62], "goes past the end"),
    "a negative shape": ((*FIRST, "shape"), [-1, 2], "has the shape"),
    "a shape of texts": ((*FIRST, "shape"), ["2"], "has the shape"),
    "many axes": ((*FIRST, "shape"), [1] * 99, "99 axes"),
    "texts": ((*FIRST, "dtype"), "string", "stored as string"),
    "packed": ((*FIRST, "quantization"), {"dtype": "uint8", "scale": 1.0}, "stored as uint8"),
    "quantization of no kind": ((*FIRST, "quantization"), 3, "graph model"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line(name, tmp_path, rng):
    content, raw = graph([pair(rng), pair(rng)])
    nodes = content["modelTopology"]["node"]
    nodes.sort(key=lambda node: node["name"] != "c1")  # at 0, and then
    nodes.insert(0, nodes.pop(1))  # at 1
    assert open_tfjs(written(tmp_path, content, raw))[0]
    path, value, message = DAMAGED[name]
    change(content, path, value)
    with pytest.raises(UserError, match=message) as error:
        open_tfjs(written(tmp_path, content, raw))
    assert "\n" not in str(error.value)


def test_a_loop_ends(tmp_path, rng):
    content, raw = graph([pair(rng), pair(rng)])
    for node in content["modelTopology"]["node"]:
        if node["name"] == "c0":
            node["input"][0] = "a1"
    assert len(open_tfjs(written(tmp_path, content, raw))[0]) == 4


def test_other_networks_and_other_json_are_refused(tmp_path, rng):
    file = written(tmp_path, *graph([pair(rng)]))
    with pytest.raises(UserError, match="no architecture that is known"):
        convert.recognize(convert.read_weights(str(file)))
    file.write_text("[1]")
    with pytest.raises(UserError, match="damaged or no TensorFlow"):
        convert.read_weights(str(file))
    file.write_text('{"format"')
    with pytest.raises(UserError, match="not readable as JSON"):
        convert.read_weights(str(file))
