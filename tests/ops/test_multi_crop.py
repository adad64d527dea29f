"""Views on the device: windows, resizing against Pillow, colors against colorsys, masks."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vision_jax.ops import multi_crop as ops
from vision_jax.ops.position_embedding import resize_weights


def test_windows_are_torchvisions_in_area_aspect_and_place(rng):
    key = jax.random.key(rng.integers(2**31))
    draw = jax.jit(ops.draw_windows, static_argnums=(1, 2, 3))  # not op by op, which is slow
    windows = np.asarray(draw(key, 500, (40, 50), (0.1, 0.5)))
    top, left, height, width = windows.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 40).all()
    assert (left + width <= 50).all()
    area = height * width / 2000
    assert 0.09 < area.min() < 0.13
    assert 0.43 < area.max() < 0.52
    aspect = width / height
    assert 0.7 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.45
    whole = np.asarray(draw(key, 4, (40, 120), (1.0, 1.0)))  # none fits
    np.testing.assert_array_equal(whole, [[0, 33, 40, 53]] * 4)


@pytest.mark.parametrize("size", [9, 40])
def test_crops_are_pillows(rng, size):
    """Of the window alone, shrunk and enlarged; Pillow rounds and clips after each direction."""
    images = rng.integers(80, 176, (2, 24, 30, 3)).astype(np.uint8)
    windows = np.array([[3, 5, 20, 22], [0, 10, 13, 11]], np.int32)
    crop = jax.jit(ops.crop_and_resize, static_argnums=2)
    found = crop(jnp.asarray(images / 255, jnp.float32), jnp.asarray(windows), size)
    for image, (top, left, height, width), ours in zip(images, windows, found, strict=True):
        cut = Image.fromarray(image[top : top + height, left : left + width])
        theirs = np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC), np.float64)
        assert np.abs(255 * np.asarray(ours) - theirs).max() < 1.6


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_crops_of_several_bands_are_one_product_with_a_matrix(rng, share):
    """Windows at the edges too; those that are drawn are no longer than they are said to be."""
    size, new = (150, 90), 70
    longest = ops._longest(size, share)
    key = jax.random.key(rng.integers(2**31))
    draw = jax.jit(ops.draw_windows, static_argnums=(1, 2, 3))
    drawn = np.asarray(draw(key, 300, size, (share / 2, share)))
    assert drawn[:, 2:].max() <= longest
    corners = np.array([[0, 0, 33, 41], [150 - 40, 90 - 37, 40, 37], [149, 0, 1, 1]], np.int32)
    windows = np.concatenate([drawn[:3], corners])
    images = rng.random((6, *size, 3))
    crop = jax.jit(ops.crop_and_resize, static_argnums=(2, 3))
    found = crop(jnp.asarray(images, jnp.float32), jnp.asarray(windows), new, longest)
    for image, (top, left, height, width), ours in zip(images, windows, found, strict=True):
        rows, columns = (resize_weights(int(side), new) for side in (height, width))
        cut = image[top : top + height, left : left + width]
        whole = np.einsum("ij,jkc,lk->ilc", rows, cut, columns).clip(0, 1)
        np.testing.assert_allclose(ours, whole, atol=3e-5)  # places in float32, up to 150


def test_blur_is_a_gaussian_mirrored_at_the_edges(rng):
    images, sigmas = rng.random((2, 7, 12, 3)), np.array([0.4, 1.7])
    found = jax.jit(ops.blur)(jnp.asarray(images, jnp.float32), jnp.asarray(sigmas, jnp.float32))
    for image, sigma, ours in zip(images, sigmas, found, strict=True):
        kernel = np.exp(-(np.arange(-4, 5) ** 2) / 2 / sigma**2)
        kernel /= kernel.sum()
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
        rows = sum(k * padded[i : i + 7] for i, k in enumerate(kernel))
        whole = sum(k * rows[:, i : i + 12] for i, k in enumerate(kernel))
        np.testing.assert_allclose(ours, whole, atol=1e-5)


def test_hue_turns_as_in_colorsys(rng):
    image = rng.random((3, 4, 3))
    image[0, 0] = 0.5  # grey has no hue
    found = np.asarray(jax.jit(ops.turn_hue)(jnp.asarray(image, jnp.float32), jnp.float32(0.3)))
    for place in np.ndindex(3, 4):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[place])
        theirs = colorsys.hsv_to_rgb((hue + 0.3) % 1, saturation, value)
        np.testing.assert_allclose(found[place], theirs, atol=1e-5)


CROP = ops.Crop(size=8, scale=(0.3, 1.0), blurred=(1.0, 0.1, 0.5), solarized=(0.0, 0.3, 0.0))


def test_views_follow_from_the_key_and_stay_in_range(rng):
    images = jnp.asarray(rng.random((6, 12, 12, 3)), jnp.float32)
    views = jax.jit(lambda key, x: ops.make_views(key, x, CROP))
    one, again, other = (np.asarray(views(jax.random.key(seed), images)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert one.shape == (3, 6, 8, 8, 3)
    assert one.min() >= 0
    assert one.max() <= 1
    assert not np.isclose(one, other).all(axis=(2, 3, 4)).any()
    assert not np.isclose(one[0], one[1]).all(axis=(1, 2, 3)).any()  # each view is its own


def test_without_any_change_a_view_is_a_crop(rng):
    plain = ops.Crop(size=12, scale=(1.0, 1.0), blurred=(0.0,), solarized=(0.0,), jitter=0.0)
    images = rng.random((8, 12, 12, 3)).astype(np.float32)
    crop = jax.jit(lambda key, x: ops.make_views(key, x, plain))
    (views,) = np.asarray(crop(jax.random.key(0), jnp.asarray(images)))
    flipped = [
        not np.allclose(view, image, atol=1e-6) for view, image in zip(views, images, strict=True)
    ]
    assert 0 < sum(flipped) < 8
    for view, image, turned in zip(views, images, flipped, strict=True):
        np.testing.assert_allclose(view, image[:, ::-1] if turned else image, atol=1e-6)


def test_masks_are_blocks_of_the_number_that_is_drawn(rng):
    key = jax.random.key(rng.integers(2**31))
    draw = jax.jit(lambda key: ops.draw_masks(key, 400, (8, 8), share=0.5, ratio=(0.1, 0.5)))
    masks = np.asarray(draw(key))
    counts = masks.sum(1)
    assert abs((counts > 0).mean() - 0.5) < 0.15
    assert counts[counts > 0].min() >= 6
    assert counts.max() <= ops.most_masked((8, 8), (0.1, 0.5)) == 32
    inside = masks.reshape(-1, 8, 8)
    beside = (inside[:, 1:] & inside[:, :-1]).sum() / inside[:, 1:].sum()
    assert beside > 1.3 * masks[counts > 0].mean()  # neighbors, more than by chance
