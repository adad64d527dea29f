"""JAX's primitives at their edges, as onnxruntime and OpenVINO compute what is written for them."""

import collections
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from jax import lax

from vision_jax import platform
from vision_jax.errors import UserError
from vision_jax.export import certificate, onnx_file, onnx_graph
from vision_jax.export.files import FORMATS
from vision_jax.export.serving import Serving
from vision_jax.models import tangents
from vision_jax.models.attention import softmax


def serve(function, images, size):
    return Serving(function, None, dict.fromkeys(function(images), ""), size,
                   images.shape[-1], (), "features")  # fmt: skip


def kinds(function, images):
    """How many nodes of each kind the file has."""
    content, _ = onnx_file.write(serve(function, images, None), None)
    return collections.Counter(node.op_type for node in onnx.load_from_string(content).graph.node)


def run_onnxruntime(function, images, size, folder):
    """The file's outputs; H and W are open without a size, B is."""
    content, _ = onnx_file.write(serve(function, images, size), None)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


def run_openvino(function, images, size, folder):
    """The same, of a file for these images, in a process of its own."""
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is missing: see .ci/run")
    batch, *own, _ = images.shape
    path, _ = FORMATS["openvino"].write(serve(function, images, tuple(own)), batch, folder)
    (ran,) = certificate.run_files("openvino", [(path, [images])])
    return ran.outputs[0]


def fold_in_openvino(function, images, size, folder):
    """Of known images, what OpenVINO computes when it reads the file, by code of its own."""

    def known(given):
        given = given.astype(jnp.int32).sum()[None]
        return {"given": given, **function(jnp.asarray(images))}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graph, "_fold", lambda equation, values: None)
        found = dict(run_openvino(known, images, size, folder))
    assert found.pop("given") == images.astype(np.int32).sum()
    return found


@pytest.fixture(params=[run_onnxruntime, run_openvino, fold_in_openvino])
def check(request, tmp_path):
    """Compares JAX's outputs with the file's, of a function of u8[B, H, W, C]."""

    def compare(function, images, tolerance=0.0, size=None):
        with platform.traced_for(platform.NO_LOOPS):
            want = jax.jit(function)(images)
        found = request.param(function, images, size, tmp_path)
        assert found.keys() == want.keys()
        for name, theirs in found.items():
            ours = np.asarray(want[name])
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
            np.testing.assert_allclose(theirs, ours, rtol=tolerance, atol=tolerance, err_msg=name)

    return compare


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)


def numbers(images):
    """Whole numbers on both sides of zero, and halves."""
    return images.astype(jnp.int32) - 128, images.astype(jnp.float32) / 2 - 64


def test_whole_numbers(check, images):
    def function(images):
        whole, _ = numbers(images)
        seven = jnp.full_like(whole, 7)
        return {
            "div": lax.div(whole, seven), "rem": lax.rem(whole, seven), "floor": whole // 7,
            "mod": whole % 7, "shift": whole >> 3, "sign": jnp.sign(whole),
            "bytes": images.astype(jnp.float32), "mask": (whole > 3).astype(jnp.float32),
            "both": ((whole > 3) & ~(whole > 9) | (whole < -9)).astype(jnp.int32),
            "truth": (whole % 3).astype(bool).astype(jnp.int32),
            "larger": jnp.maximum(whole > 3, whole < 0).astype(jnp.int32),
        }  # fmt: skip

    check(function, images)


def test_whole_numbers_that_float32_has_not(check, images):
    """What takes a place among all pairs of anchors and classes apart."""

    def function(images):
        whole = images.astype(jnp.int32) * 94_321 - 12_000_000  # beyond 2^24, below 0 too
        other = images[..., ::-1].astype(jnp.int32) + 1
        return {
            "sum": whole + 7, "product": (whole // 91) * 91, "div": lax.div(whole, 91 + 0 * whole),
            "rem": lax.rem(whole, 91 + 0 * whole), "mod": whole % 91, "floor": whole // 91,
            "rem2": lax.rem(whole, other), "chosen": jnp.where(images > 99, whole, -whole),
            "taken": jnp.take(whole, jnp.array([2, 0]), axis=3),
        }  # fmt: skip

    check(function, images)


def test_floats(check, images):
    def function(images):
        _, x = numbers(images)
        return {
            "round": jnp.round(x), "truncate": x.astype(jnp.int32), "floor": jnp.floor(x),
            "clip": jnp.clip(x, -3, 5), "halves": jnp.sign(x) * jnp.abs(x),
            "infinite": jnp.where(x > 0, jnp.inf, -jnp.inf),
        }  # fmt: skip

    check(function, images)


@pytest.mark.parametrize("check", [run_onnxruntime, run_openvino], indirect=True)
def test_what_is_no_number_stays_so(check, images):
    """Beside one constant; of two of them, and of two that are computed, OpenVINO loses it."""

    def function(images):
        _, x = numbers(images)
        holes = jnp.where(x > 20, jnp.nan, x)
        return {
            "larger": jnp.maximum(holes, 1.0), "less": jnp.minimum(1.0, holes),
            "relu": jax.nn.relu(holes),
        }  # fmt: skip

    check(function, images)


def test_curves(check, images):
    def function(images):
        x = numbers(images)[1] / 16
        return {
            "erf": lax.erf(x), "sigmoid": jax.nn.sigmoid(x), "gelu": jax.nn.gelu(x),
            "softmax": jax.nn.softmax(x, axis=-1), "rsqrt": lax.rsqrt(jnp.abs(x) + 1),
            "silu": jax.nn.silu(x), "tanh": jnp.tanh(x), "power": x**3, "sine": jnp.sin(x),
            "swish": jax.nn.hard_swish(x), "log": jnp.log(jnp.abs(x) + 1),
        }  # fmt: skip

    check(function, images, 3e-6)


def test_reductions(check, images):
    def function(images):
        whole, x = numbers(images)
        few = whole // 60  # with many ties
        best, place = lax.top_k(few.astype(jnp.float32).reshape(x.shape[0], -1), 9)
        return {
            "any": (whole > 120).any((1, 2)).astype(jnp.int32),
            "all": (whole > -100).all(-1).astype(jnp.int32),
            "sum": whole.sum((1, 3)), "max": x.max((0, 2)), "min": x.min(1),
            "argmax": jnp.argmax(few, -1), "best": best, "place": place,
            "running": jnp.cumsum(x, 2), "back": jnp.cumsum(x[:, :, ::-1], 2),
            "ones": jax.nn.one_hot(few[..., 0] - 1, 3),  # of -1 to -4, too: zeros
        }  # fmt: skip

    check(function, images, size=(6, 5))


def test_places(check, images, rng):
    """Gathers with and without a batch, of one axis and of two, at and beyond the border."""
    line = jnp.asarray(rng.integers(0, 3, 7), jnp.int32)

    def function(images):
        x = numbers(images)[1]
        flat = x.reshape(x.shape[0], -1, 3)  # [B, N, 3]
        index = (images[:, :, 0].astype(jnp.int32) % 40) - 3  # below 0 and above N - 1
        beside = jnp.take_along_axis(flat, index, axis=1, mode="clip")
        return {
            "line": jnp.take(x, line, axis=3), "rows": jnp.take(x, line, axis=1),
            "clip": jnp.take(x, jnp.array([-9, 2, 99]), axis=2, mode="clip"),
            "beside": beside, "last": x[:, -1], "column": x[:, :, 2:4], "every": x[:, ::2, ::-1],
            "best": jnp.take_along_axis(x, jnp.argmax(x, -1)[..., None], -1),
            "pair": x[:, jnp.array([0, 1]), jnp.array([2, 3])],
            "block": lax.dynamic_slice_in_dim(x, 4, 3, axis=2),  # moved to where it fits
        }  # fmt: skip

    check(function, images, size=(6, 5))


def test_shapes(check, images):
    def function(images):
        x = numbers(images)[1]
        none = x.dtype.type(-7)
        return {
            "pad": lax.pad(x, none, ((0, 0, 0), (1, 2, 0), (-1, 2, 0), (0, -1, 0))),
            "tile": jnp.tile(x[:, :1], (1, 2, 3, 1)), "stack": jnp.stack([x, -x], 2),
            "parts": jnp.split(x, [1], axis=3)[1], "turn": x.transpose(3, 0, 2, 1),
            "places": jnp.arange(5)[None] + images[:, 0, :, 0].astype(jnp.int32),
        }  # fmt: skip

    check(function, images, size=(6, 5))


def test_products(check, images, rng):
    kernel = jnp.asarray(rng.normal(size=(3, 2, 3, 6)), jnp.float32)
    groups = jnp.asarray(rng.normal(size=(3, 3, 1, 6)), jnp.float32)
    dense = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    numbered = ("NHWC", "HWIO", "NHWC")

    def function(images):
        x = numbers(images)[1] / 8
        largest = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1e30)
        pool = lax.reduce_window(largest, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        tokens = x.reshape(x.shape[0], -1, 3)
        return {
            "conv": lax.conv_general_dilated(
                x, kernel, (2, 1), ((1, 0), (0, 2)), rhs_dilation=(1, 2), dimension_numbers=numbered
            ),
            "groups": lax.conv_general_dilated(
                x, groups, (1, 1), "SAME", dimension_numbers=numbered, feature_group_count=3
            ),
            "pool": pool, "dense": x @ dense, "turned": jnp.einsum("co,bhwc->bohw", dense, x),
            "pairs": jnp.einsum("bnd,bmd->bnm", tokens, tokens),
            "heads": jnp.einsum("bnk,bmk->kbm", tokens, tokens[:, :3]),
        }  # fmt: skip

    check(function, images, 2e-5)


# Whole functions: one node each, of numbers that a model's would hardly be ------------------------

runtimes = pytest.mark.parametrize("check", [run_onnxruntime, run_openvino], indirect=True)


def sized(function, sizes):
    """The function's outputs for numbers of each size, which are powers of two.

    Of others XLA's CPU fuses the product with what is subtracted later.
    """

    def each(images):
        return {
            f"{name} {size:g}": value
            for size in sizes
            for name, value in function(numbers(images)[1] * size, images).items()
        }

    return each


@runtimes
@pytest.mark.parametrize("epsilon", [1e-12, 1e-6, 1e-3])
def test_layer_norms(check, rng, epsilon):
    """Rows without variance, and rows whose variance is below epsilon or far above."""
    images = rng.integers(0, 256, (2, 6, 5, 32), dtype=np.uint8)
    images[0, 1] = images[0, 1, :, :1]
    images[1, 2] = 128
    scale, bias = (jnp.asarray(rng.normal(size=32), jnp.float32) for _ in range(2))

    def function(x, images):
        return {"norm": tangents.layer_norm(x, scale, bias, epsilon)}

    every = sized(function, [2.0**-30, 2.0**-10, 1.0, 2.0**20, 2.0**50])
    assert kinds(every, images)["LayerNormalization"] == 5
    check(every, images, 2e-6)


@runtimes
def test_layer_norms_whose_mean_is_large(check, rng):
    """As far as float32 has the numbers apart: the mean is a hundred times their spread."""
    images = rng.integers(0, 256, (2, 6, 5, 32), dtype=np.uint8)
    scale, bias = jnp.ones(32), jnp.zeros(32)

    def function(images):
        return {"norm": tangents.layer_norm(numbers(images)[1] + 4e3, scale, bias, 1e-6)}

    check(function, images, 3e-5)


@runtimes
def test_gelus(check, images):
    """Beyond where erf and tanh are 1, and where a cube is infinite."""

    def function(x, images):
        largest = jnp.maximum(1, abs(x).max())
        return {
            "exact": tangents.gelu(x) / largest, "tanh": tangents.gelu_tanh(x) / largest,
            "alone": tangents.gelu(x[0, 0, 0, 0]) / largest,
        }  # fmt: skip

    every = sized(function, [2.0**-100, 2.0**-10, 2.0**-4, 1.0, 2.0**13, 2.0**100])
    assert kinds(every, images)["Gelu"] == 18
    check(every, images, 1e-6)


@runtimes
def test_softmaxes(check, images):
    """With what is masked, by -inf and by the least number, and rows of equal numbers."""
    images[0, 1] = 9
    last = jnp.arange(3).reshape(1, 1, 1, 3) == 2

    def function(x, images):
        some, least = images > 99, jnp.finfo(jnp.float32).min
        return {
            "all": softmax(x), "masked": softmax(jnp.where(some | last, x, -jnp.inf)),
            "least": softmax(jnp.where(some, x, least)), "one": softmax(x[..., :1]),
        }  # fmt: skip

    every = sized(function, [2.0**-10, 1.0, 2.0**13, 2.0**100])
    assert kinds(every, images)["Softmax"] == 16
    check(every, images, 1e-6)


def test_whole_functions_of_other_numbers_are_what_is_inside(images):
    """float64 and what is known have no node of their own; nor has a function of the same name."""

    def gelu(x):
        return x + 1

    def function(images):
        x = numbers(images)[1]
        return {
            "known": x + tangents.gelu(jnp.arange(3.0).reshape(1, 1, 1, 3)),
            "other": jax.jit(gelu)(x),
        }

    assert not {"Gelu", "Erf"} & kinds(function, images).keys()
    with jax.enable_x64(True):
        wide = kinds(lambda x: {"wide": tangents.gelu(x.astype(jnp.float64))}, images)
    assert wide["Erf"] == 1
    assert not wide["Gelu"]


def test_what_no_output_needs_is_left_out(images):
    def function(images):
        x = numbers(images)[1]
        jnp.sin(x) @ jnp.ones((3, 2))
        return {"mean": x.mean(-1, keepdims=True)}

    found = kinds(function, images)
    assert not {"Sin", "MatMul", "Reshape"} & found.keys()
    assert found["ReduceSum"] == 1


@runtimes
def test_reductions_that_keep_their_axes(check, images):
    """And get one more beside them, which is not the one that was kept."""

    def function(images):
        x = images.astype(jnp.float32)
        kept = x.sum(1, keepdims=True)
        return {
            "kept": kept, "before": kept[:, None], "after": kept[:, :, None],
            "two": x.max((1, 2), keepdims=True)[:, None, None],
        }  # fmt: skip

    check(function, images, size=(6, 5))


def test_what_cannot_be_written_is_named(images):
    def function(images):
        return {"sorted": jnp.sort(images.astype(jnp.float32), axis=-1)}

    with pytest.raises(UserError, match="JAX's `sort`"):
        onnx_file.write(serve(function, images, None), None)
    for cast in (lambda x: x.astype(jnp.float32).astype(jnp.uint8),):
        with pytest.raises(UserError, match="uint8"):
            onnx_file.write(serve(lambda x, cast=cast: {"cast": cast(x)}, images, None), None)
