"""Winograd's 3 x 3 convolutions beside XLA's own, and which kernels of a model become them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from vision_jax import load, platform
from vision_jax.models.layers import Conv
from vision_jax.serve.model import faster, make_servable
from vision_jax.trees import winograd
from vision_jax.trees.leaf import convolve, leaves
from vision_jax.trees.winograd import Winograd

SHAPES = ((1, 1, 1, 3, 2), (2, 6, 4, 5, 7), (3, 7, 5, 4, 6), (1, 2, 9, 1, 1))  # B, H, W, in, out
AROUND = ((1, 1), (1, 1))


def reference(x, kernel, strides=(1, 1), padding=AROUND):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_convolution(shape, rng):
    *images, inputs, outputs = shape
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(*images, inputs)))
        kernel = jnp.asarray(rng.normal(size=(3, 3, inputs, outputs)))
        leaf = winograd.to_winograd(kernel)
        want = reference(x, kernel)
        # Where sums cancel, what they are rounded by is of the size of their parts.
        scale = reference(jnp.abs(x), jnp.abs(kernel)).max()
        assert leaf.shape == kernel.shape
        assert jnp.abs(leaf.merge() - kernel).max() <= 1e-14 * jnp.abs(kernel).max()
        for compute in (lambda *at: convolve(*at, (1, 1), AROUND), jax.jit(_convolved)):
            assert jnp.abs(compute(x, leaf) - want).max() <= 1e-14 * scale
        small = winograd.to_winograd(kernel.astype(jnp.float32))
        narrow = convolve(x.astype(jnp.float32), small, (1, 1), AROUND)
        assert narrow.dtype == jnp.float32
        assert jnp.abs(narrow.astype(want.dtype) - want).max() <= 1e-6 * scale


def _convolved(x, leaf):
    return convolve(x, leaf, (1, 1), AROUND)


@pytest.mark.parametrize(
    ("strides", "padding"),
    [((2, 2), AROUND), ((1, 1), ((0, 0), (0, 0))), ((1, 2), ((0, 1), (1, 0)))],
)
def test_another_convolution_has_the_kernel_itself(strides, padding, rng):
    x, kernel = rng.normal(size=(2, 6, 5, 4)), rng.normal(size=(3, 3, 4, 3))
    x, kernel = np.float32(x), np.float32(kernel)
    got = convolve(jnp.asarray(x), winograd.to_winograd(kernel), strides, padding)
    want = reference(x, kernel, strides, padding)
    assert (
        jnp.abs(got - want).max() <= 2e-6 * reference(abs(x), abs(kernel), strides, padding).max()
    )


class Layers(nn.Module):
    """A convolution of each kind."""

    @nn.compact
    def __call__(self, x):
        def conv(name, features=128, strides=(1, 1), padding=AROUND, **how):
            size = how.pop("size", (3, 3))
            return Conv(features, size, strides, padding, name=name, **how)

        x = conv("images", 128)(x)
        x = conv("chosen")(x)
        x = conv("narrow_outputs", 32)(x) + conv("narrow_inputs", 32)(x[..., :32])
        x = conv("widens", 128, size=(1, 1), padding=((0, 0), (0, 0)))(x)
        half = conv("strided", strides=(2, 2))(x)
        conv("half_precision", dtype=jnp.bfloat16)(x)
        conv("dilated", dilation=2, padding=((2, 2), (2, 2)))(x)
        conv("groups", groups=2)(x)
        conv("shrinks", padding=((0, 0), (0, 0)))(x)
        conv("small_and_wide_enough", 64)(x[..., :64])
        wide = jnp.tile(x, (1, 20, 20, 1))  # no longer in a cache
        conv("large", 64)(wide[..., :64])
        conv("large_and_wide")(wide)
        shared = conv("twice")
        return shared(x) + shared(half).mean()


def test_the_kernels_that_gain_are_chosen(rng):
    model = Layers()
    x = jnp.asarray(rng.normal(size=(1, 8, 8, 3)), jnp.float32)
    variables = model.init(jax.random.key(0), x)
    params = winograd.transform(variables["params"], lambda p, x: model.apply({"params": p}, x), x)
    chosen = {path for path, leaf in leaves(params).items() if isinstance(leaf, Winograd)}
    names = ("chosen", "small_and_wide_enough", "large_and_wide", "twice")
    assert chosen == {f"{name}/kernel" for name in names}
    got, want = model.apply({"params": params}, x), model.apply(variables, x)
    assert jnp.abs(got - want).max() <= 1e-5 * jnp.abs(want).max()


def test_a_kernel_that_is_used_in_another_way_too_stays(rng):
    kernel = jnp.asarray(rng.normal(size=(3, 3, 128, 128)), jnp.float32)
    x = jnp.zeros((1, 4, 4, 128))

    def both(params, x):
        one = convolve(x, params["kernel"], (1, 1), AROUND)
        return convolve(one, params["kernel"], (2, 2), AROUND)

    assert winograd.transform({"kernel": kernel}, both, x)["kernel"] is kernel


def flops(servable):
    batch = {
        "image": jax.ShapeDtypeStruct((1, *servable.canvases[0], 3), np.uint8),
        "size": jax.ShapeDtypeStruct((1, 2), np.int32),
        "original_size": jax.ShapeDtypeStruct((1, 2), np.int32),
    }
    cost = jax.jit(servable.outputs).lower(servable.variables, batch).cost_analysis()
    return cost["flops"]


def test_a_detector_multiplies_less_on_a_cpu_alone():
    """Of NanoDet's 4.14 GFLOP 1.98 are convolutions that become 4/9 of that, and sums."""
    servable = make_servable(load("embedded:nanodet_coco"))
    changed = faster(servable, 1)
    kernels = leaves(changed.variables["params"]).values()
    assert sum(isinstance(leaf, Winograd) for leaf in kernels) == 16
    assert flops(changed) < 0.73 * flops(servable)
    with platform.traced_for("gpu"):
        assert faster(servable, 1) is servable
