"""Norms, GELU and pooling of a CPU beside autodiff of the plain functions, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import special

from vision_jax.models import tangents


def derivatives(function, primals, directions):
    """Values, tangents and both modes of first and second derivatives, of a batch of arguments."""

    def each(primals, directions):
        loss = lambda *at: sum(jnp.sin(y).sum() for y in jax.tree.leaves(function(*at)))  # noqa: E731
        gradient = jax.grad(loss, tuple(range(len(primals))))
        slope = lambda *at: sum(map(jnp.vdot, gradient(*at), directions))  # noqa: E731
        return (
            jax.jvp(function, primals, directions),
            gradient(*primals),
            jax.jvp(gradient, primals, directions)[1],
            jax.grad(slope, tuple(range(len(primals))))(*primals),
        )

    return jax.tree.leaves(jax.jit(jax.vmap(each))(primals, directions))


@pytest.mark.parametrize("case", ["batch norm", "layer norm", "GELU", "max-pool"])
def test_derivatives_are_those_of_the_plain_function(case, rng):
    with jax.enable_x64(True):
        x, scale, bias = (rng.normal(size=s) for s in ((2, 3, 7, 6, 4), (2, 4), (2, 4)))
        if case == "batch norm":
            ours = lambda *at: tangents.batch_norm(*at, 1e-3)  # noqa: E731
            plain = lambda *at: tangents._plain_batch_norm(1e-3, *at)  # noqa: E731
            primals = (3 + 2 * x, scale, bias)
        elif case == "layer norm":
            ours = lambda *at: tangents.layer_norm(*at, 1e-3)  # noqa: E731
            plain = lambda *at: tangents._plain_layer_norm(1e-3, *at)  # noqa: E731
            primals = (3 + 2 * x, scale, bias)
        elif case == "GELU":
            ours, plain = tangents.gelu, lambda x: nn.gelu(x, approximate=False)
            primals = (3 * x,)
        else:
            ours = lambda x: tangents.max_pool(x, 3, 2)  # noqa: E731
            plain = lambda x: tangents._plain_max_pool(3, 2, x)  # noqa: E731
            primals = (x,)
        primals = jax.tree.map(jnp.asarray, primals)
        directions = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), primals)
        found, wanted = (derivatives(f, primals, directions) for f in (ours, plain))
        for got, expected in zip(found, wanted, strict=True):
            assert jnp.abs(got - expected).max() <= 1e-12 * jnp.abs(expected).max()


@pytest.mark.long
def test_the_first_of_equal_pixels_gets_the_gradient_as_in_xla():
    x = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 9, 9, 3)), jnp.float32)
    for size, strides in ((3, 2), (2, 2), (3, 1)):
        pools = (
            partial(tangents.max_pool, size=size, strides=strides),
            partial(tangents._plain_max_pool, size, strides),
        )
        ours, plain = (jax.grad(lambda x, f=f: jnp.sin(f(x)).sum())(x) for f in pools)
        np.testing.assert_allclose(ours, plain, rtol=1e-6)
    lost = tangents.max_pool(x.at[0, 0, 1, 0].set(jnp.nan), 3, 2)
    assert jnp.isnan(lost).sum() == 1


@pytest.mark.parametrize(("dtype", "most"), [("float32", 2.5e-7), ("bfloat16", 2**-8)])
def test_gelu_is_the_function_to_a_rounding_or_two(dtype, most):
    x = jnp.linspace(-12, 12, 20_001).astype(dtype)
    wide = np.asarray(x, np.float64)
    error = np.abs(np.asarray(jax.jit(tangents.gelu)(x), np.float64) - wide * special.ndtr(wide))
    assert (error <= most * np.maximum(1, np.abs(wide))).all()
    assert tangents.gelu(x).dtype == dtype
