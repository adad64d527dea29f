"""Bilinear resizing against one pixel after the other; tests/parity has torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.ops.resize import pool_adaptive, resize_bilinear


def pixel_by_pixel(x, size):
    old = x.shape[1:3]
    out = np.zeros((len(x), *size, x.shape[3]))
    for row in range(size[0]):
        for column in range(size[1]):
            near = []
            for place, new, count in zip((row, column), size, old, strict=True):
                center = min(max((place + 0.5) * count / new - 0.5, 0), count - 1)
                low = int(center)
                near.append((low, min(low + 1, count - 1), center - low))
            (top, bottom, down), (left, right, across) = near
            upper = x[:, top, left] * (1 - across) + x[:, top, right] * across
            lower = x[:, bottom, left] * (1 - across) + x[:, bottom, right] * across
            out[:, row, column] = upper * (1 - down) + lower * down
    return out


@pytest.mark.parametrize(
    ("old", "new"), [((3, 1), (9, 4)), ((5, 4), (7, 8)), ((6, 5), (6, 2)), ((1, 1), (3, 2))]
)
def test_it_mixes_the_nearest_four(rng, old, new):
    x = rng.normal(size=(2, *old, 3))
    with jax.enable_x64(True):
        ours = np.asarray(resize_bilinear(jnp.asarray(x), new))
    np.testing.assert_allclose(ours, pixel_by_pixel(x, new), rtol=0, atol=1e-14)


def test_its_gradient_is_the_transposed_product(rng):
    x, dy = rng.normal(size=(1, 4, 3, 2)), rng.normal(size=(1, 8, 5, 2))
    with jax.enable_x64(True):
        forward, pullback = jax.vjp(lambda x: resize_bilinear(x, (8, 5)), jnp.asarray(x))
        (dx,) = pullback(jnp.asarray(dy))
        forward, dx = np.asarray(forward), np.asarray(dx)
    assert abs((forward * dy).sum() - (dx * x).sum()) <= 1e-12


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (6, 6), (7, 5)])
def test_pooled_cells_are_means_that_may_overlap(rng, size):
    x = rng.normal(size=(2, 7, 5, 3))
    expected = np.zeros((2, *size, 3))
    for row, column in np.ndindex(*size):
        parts = [
            slice(i * side // n, -(-(i + 1) * side // n))
            for i, side, n in zip((row, column), x.shape[1:3], size, strict=True)
        ]
        expected[:, row, column] = x[:, parts[0], parts[1]].mean((1, 2))
    with jax.enable_x64(True):
        ours = np.asarray(pool_adaptive(jnp.asarray(x), size))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-14)
