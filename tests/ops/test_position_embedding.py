"""Resampled position embeddings against Pillow's antialiased bicubic, which is torch's."""

import numpy as np
import pytest
from PIL import Image

from vision_jax.ops.position_embedding import (
    interpolate_positions,
    resample_positions,
    resample_relative_positions,
    resize_weights,
)


@pytest.mark.parametrize(
    ("old", "new", "prefix"),
    [((14, 14), (24, 24), 1), ((24, 24), (14, 14), 5), ((7, 9), (4, 13), 0), ((2, 2), (9, 9), 2)],
)
def test_equals_pillow_channel_by_channel(old, new, prefix, rng):
    positions = rng.normal(size=(1, prefix + old[0] * old[1], 3)).astype(np.float32)
    grid = positions[0, prefix:].reshape(*old, 3)
    theirs = np.stack(
        [
            Image.fromarray(grid[..., channel]).resize(new[::-1], Image.Resampling.BICUBIC)
            for channel in range(3)
        ],
        axis=-1,
    )
    ours = resample_positions(positions, old, new, prefix)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours[:, :prefix], positions[:, :prefix])
    np.testing.assert_allclose(ours[0, prefix:].reshape(*new, 3), theirs, rtol=1e-5, atol=2e-6)
    inside = interpolate_positions(positions, old, new, prefix)  # of a model
    np.testing.assert_allclose(inside, ours, rtol=1e-5, atol=2e-6)


def test_the_same_grid_is_untouched(rng):
    positions = rng.normal(size=(1, 10, 4))
    assert resample_positions(positions, (3, 3), (3, 3), 1) is positions


@pytest.mark.parametrize(("old", "new"), [(5, 9), (9, 5), (1, 4), (16, 37)])
def test_a_constant_stays_constant(old, new):
    np.testing.assert_allclose(resize_weights(old, new).sum(axis=1), 1, rtol=1e-14)


@pytest.mark.parametrize(("old", "new"), [((7, 7), (12, 12)), ((12, 12), (7, 7)), ((2, 5), (4, 3))])
def test_relative_positions_keep_their_center_their_symmetry_and_the_extra_rows(old, new, rng):
    table = rng.normal(size=((2 * old[0] - 1) * (2 * old[1] - 1) + 3, 2)).astype(np.float32)
    ours = resample_relative_positions(table, old, new, num_extra=3)
    assert ours.shape == ((2 * new[0] - 1) * (2 * new[1] - 1) + 3, 2)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours[-3:], table[-3:])
    center, old_center = len(ours[:-3]) // 2, len(table[:-3]) // 2
    np.testing.assert_array_equal(ours[center], table[old_center])
    turned = resample_relative_positions(table[:-3][::-1], old, new)
    np.testing.assert_allclose(turned, ours[:-3][::-1], rtol=1e-5, atol=1e-6)
    assert resample_relative_positions(table, old, old, num_extra=3) is table
