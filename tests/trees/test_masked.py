"""Masked kernels against their definitions, and as leaves of a tree that trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.trees import lora, paths, quantize
from vision_jax.trees.leaf import convolve, dot, roles
from vision_jax.trees.masked import to_masked, to_n_of_m


@pytest.mark.parametrize("shape", [(7, 6), (3, 2, 4, 5)])
def test_the_smallest_are_zero(rng, shape):
    kernel = rng.normal(size=shape).astype(np.float32)
    merged = np.asarray(to_masked(jnp.asarray(kernel), 0.3).merge())
    gone = round(0.3 * kernel.size)
    smallest = np.argsort(np.abs(kernel), axis=None)[:gone]
    expected = kernel.copy()
    expected.reshape(-1)[smallest] = 0
    np.testing.assert_array_equal(merged, expected)
    np.testing.assert_array_equal(to_masked(jnp.asarray(kernel), 0.0).merge(), kernel)
    assert not np.asarray(to_masked(jnp.asarray(kernel), 1.0).merge()).any()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8)])
def test_n_of_m_inputs_of_each_output_stay(rng, n, m):
    kernel = rng.normal(size=(3, 2, 8, 5)).astype(np.float32)
    kernel[0, 0, :4, 0] = 1  # ties: still n
    merged = np.asarray(to_n_of_m(jnp.asarray(kernel), n, m).merge())
    for row, column, output in np.ndindex(3, 2, 5):
        for start in range(0, 8, m):
            here = np.s_[row, column, start : start + m, output]
            kept = np.flatnonzero(merged[here])
            assert len(kept) == n
            np.testing.assert_array_equal(merged[here][kept], kernel[here][kept])
            out = np.setdiff1d(range(m), kept)
            assert np.abs(kernel[here][kept]).min() >= np.abs(kernel[here][out]).max()


def test_inputs_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="2:4 along 6 inputs"):
        to_n_of_m(jnp.ones((6, 4)))


def test_products_and_gradients_are_those_of_the_zeros(rng):
    leaf = to_masked(jnp.asarray(rng.normal(size=(8, 6)), jnp.float32), 0.5)
    x = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    np.testing.assert_array_equal(dot(x, leaf), dot(x, leaf.merge()))
    gradient = jax.grad(lambda leaf: jnp.square(dot(x, leaf)).sum(), allow_int=True)(leaf).base
    plain = jax.grad(lambda kernel: jnp.square(dot(x, kernel)).sum())(leaf.merge())
    np.testing.assert_array_equal(gradient, np.where(leaf.mask, plain, 0))
    grouped = to_n_of_m(jnp.asarray(rng.normal(size=(3, 3, 4, 6)), jnp.float32))
    images = jnp.asarray(rng.normal(size=(2, 5, 5, 8)), jnp.float32)
    sides = ((1, 1), (1, 1))
    np.testing.assert_array_equal(
        convolve(images, grouped, (1, 1), sides, groups=2),
        convolve(images, grouped.merge(), (1, 1), sides, groups=2),
    )


def test_under_an_adapter_the_base_is_sparse(rng):
    tree = {"fc": {"kernel": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)}}
    masked = quantize.quantize(tree, {"fc/kernel"}, to_n_of_m)
    assert {path: role.trains for path, role in roles(masked).items()} == {
        "fc/kernel/base": None,
        "fc/kernel/mask": False,
    }
    adapted = lora.attach(masked, ["fc/kernel"], key=jax.random.key(0), rank=2, alpha=2.0)
    assert {path for path, role in roles(adapted).items() if role.trains} == {
        "fc/kernel/a",
        "fc/kernel/b",
    }
    factors = lora.detach(adapted)[1]["fc/kernel"]
    moved = lora.apply_adapters(
        masked, {"fc/kernel": jax.tree.map(lambda factor: factor + 1, factors)}
    )
    merged = paths.flatten(lora.merge(moved))["fc/kernel"]
    update = (factors.a + 1) @ (factors.b + 1)
    sparse = paths.flatten(lora.merge(masked))["fc/kernel"]
    np.testing.assert_allclose(merged, sparse + update, rtol=1e-6)
