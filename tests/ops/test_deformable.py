"""Weighted sampling against its definition, cell by cell, and its gradients against differences."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from vision_jax.ops.deformable import sample_weighted
from vision_jax.ops.position_embedding import sine_boxes


def random_case(seed, shape=(2, 5, 3, 2, 4), queries=6, points=3):
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=shape)
    places = rng.uniform(-0.4, 1.4, size=(shape[0], queries, shape[3], points, 2))
    return maps, places, rng.normal(size=places.shape[:-1])


def by_definition(maps, places, weights):
    batch, height, width, heads, channels = maps.shape
    total = np.zeros((batch, places.shape[1], heads, channels))
    for image, query, head, point in np.ndindex(weights.shape):
        x, y = places[image, query, head, point] * (width, height) - 0.5
        for row in range(height):
            for column in range(width):
                share = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
                value = weights[image, query, head, point] * share * maps[image, row, column, head]
                total[image, query, head] += value
    return total


def test_samples_are_bilinear_and_zero_outside():
    case = random_case(0)
    case[1][0, 0, 0] = [[0, 0], [1, 1], [1e30, -1e30]]  # the corners, and beyond any integer
    with jax.enable_x64(True):
        found = jax.jit(sample_weighted)(*map(jnp.asarray, case))
    np.testing.assert_allclose(found, by_definition(*case), rtol=0, atol=1e-14)


def test_gradients_reach_maps_places_and_weights():
    with jax.enable_x64(True):
        case = tuple(map(jnp.asarray, random_case(1, queries=2, points=2)))
        check_grads(jax.jit(sample_weighted), case, order=1, modes=("rev",), rtol=1e-6, atol=1e-6)


def test_sine_boxes_are_sines_of_y_x_w_h():
    box = np.array([0.3, 0.7, 0.1, 0.2])
    expected = []
    for number in box[[1, 0, 2, 3]]:
        for period in 10000.0 ** (np.arange(4) / 4):
            angle = number * 2 * np.pi / period
            expected += [np.sin(angle), np.cos(angle)]
    found = sine_boxes(jnp.asarray(box, jnp.float32).reshape(1, 1, 4), 8)[0, 0]
    np.testing.assert_allclose(found, expected, atol=1e-6)
