"""The measures against what they say they are, in plain loops, on models whose truth is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from vision_jax.attacks.examples import keys_of
from vision_jax.explain import measures
from vision_jax.explain.explainer import survivors

WEIGHTS = np.random.default_rng(8).random((6, 9, 3)).astype(np.float32)
WEIGHTS /= WEIGHTS.sum()


def linear(variables, images, taps=()):
    """A model whose score is a sum over pixels."""
    return {"score": (images * variables["weights"][None]).sum((1, 2, 3))}, {}


def score(outputs):
    return outputs["score"]


VARIABLES = {"weights": jnp.asarray(WEIGHTS)}


def images_of(rng, count=2):
    return rng.random((count, 6, 9, 3)).astype(np.float32)


def keys(rng, count=2):
    return keys_of(jax.random.key(int(rng.integers(2**31))), jnp.arange(count))


def test_insertion_and_deletion_are_curves_of_the_score(rng):
    images, base = images_of(rng), images_of(rng)
    maps = rng.random((2, 6, 9)).astype(np.float32)
    order = measures.ranks(jnp.asarray(maps), keys(rng))
    given = (linear, VARIABLES, jnp.asarray(images), score, order, jnp.asarray(base))
    inserted = measures.insertion(*given, steps=7)
    deleted = measures.deletion(*given, steps=7)
    for image in range(2):
        best = np.argsort(-maps[image].reshape(-1))
        for step in range(8):
            chosen = np.zeros(54, bool)
            chosen[best[: round(step * 54 / 7)]] = True
            chosen = chosen.reshape(6, 9, 1)
            seen = np.where(chosen, images[image], base[image])
            np.testing.assert_allclose(inserted[image, step], (seen * WEIGHTS).sum(), rtol=1e-5)
            left = np.where(chosen, base[image], images[image])
            np.testing.assert_allclose(deleted[image, step], (left * WEIGHTS).sum(), rtol=1e-5)
    trapezes = np.trapezoid(np.asarray(inserted), dx=1 / 7, axis=1)
    np.testing.assert_allclose(measures.area(inserted), trapezes, rtol=1e-6)


@pytest.mark.long
def test_equal_pixels_come_in_an_order_of_the_key_alone(rng):
    maps = jnp.asarray(np.round(rng.random((2, 6, 9)) * 3))
    drawn = keys(rng)
    order = np.asarray(measures.ranks(maps, drawn))
    for image in range(2):
        assert sorted(order[image].reshape(-1)) == list(range(54))
        by_rank = np.asarray(maps)[image].reshape(-1)[np.argsort(order[image].reshape(-1))]
        assert (np.diff(by_rank) <= 0).all()
    again = measures.ranks(maps[1:], drawn[1:])
    np.testing.assert_array_equal(again[0], order[1])
    assert (np.asarray(measures.ranks(maps, keys(rng))) != order).any()


@pytest.mark.long
def test_road_is_best_for_the_true_map_and_worst_for_its_reverse(rng):
    """The score counts one bright half; its pixels are what matters."""
    images = np.zeros((1, 12, 12, 1), np.float32)
    images[:, :, :6] = 1
    images += 0.01 * rng.random(images.shape, np.float32)
    half = np.zeros((12, 12, 1), np.float32)
    half[:, :5] = 1 / 60
    variables = {"weights": jnp.asarray(half)}
    drawn = keys(rng, 1)

    def road(maps):
        order = measures.ranks(jnp.asarray(maps), drawn)
        return float(
            measures.road(
                linear, variables, jnp.asarray(images), score, order, drawn, shares=(0.3, 0.5)
            )[0]
        )

    true = images[..., 0] + np.linspace(1, 0, 12)[None, None].astype(np.float32)
    assert road(true) > 0.05
    np.testing.assert_allclose(road(-true), -road(true), atol=0.02)


def test_the_pointing_game_and_the_heat_inside():
    maps = np.zeros((3, 5, 8), np.float32)
    maps[0, 1, 6] = 2  # its center is (6.5, 1.5)
    maps[0, 4, 0] = 1
    maps[1, 2, 3] = -1  # nothing positive
    boxes = jnp.array([[6.0, 1.0, 7.0, 2.0], [0.0, 0.0, 8.0, 5.0], [0.0, 0.0, 0.4, 0.4]])
    inside = measures.box_pixels(boxes, (5, 8))
    assert inside.sum((1, 2)).tolist() == [1, 40, 0]
    assert measures.pointing(jnp.asarray(maps), inside).tolist() == [True, True, False]
    shares = measures.share_inside(jnp.asarray(maps), inside)
    np.testing.assert_allclose(shares, [2 / 3, 0, 0])


def test_rank_correlation_is_spearmans(rng):
    first = np.round(rng.random((5, 4, 7)) * 6)  # with ties
    second = np.round(first + 3 * rng.random((5, 4, 7)))
    second[3] = -first[3]
    second[4] = 1
    found = measures.rank_correlation(jnp.asarray(first), jnp.asarray(second))
    for image in range(4):
        expected = stats.spearmanr(first[image].reshape(-1), second[image].reshape(-1))
        np.testing.assert_allclose(found[image], expected.statistic, atol=1e-5)
    assert found[4] == 0


@pytest.mark.long
def test_shuffled_arrays_have_the_same_entries(rng):
    tree = {
        "kernel": jnp.asarray(rng.random((7, 5))),
        "codes": jnp.asarray(rng.integers(-128, 128, 40), jnp.int8),
        "count": jnp.asarray(3),
    }
    mixed = measures.shuffled(tree, jax.random.key(int(rng.integers(2**31))))
    assert jax.tree.structure(mixed) == jax.tree.structure(tree)
    for name, leaf in tree.items():
        assert mixed[name].dtype == leaf.dtype
        np.testing.assert_array_equal(np.sort(mixed[name], None), np.sort(leaf, None))
    assert (mixed["kernel"] != tree["kernel"]).any()


def test_completeness_is_the_error_of_the_sum():
    given = jnp.ones((2, 3, 3)), jnp.array([10.0, 11.0]), jnp.array([1.0, 1.0])
    np.testing.assert_allclose(measures.completeness(*given), [0, -1])


@pytest.mark.long
def test_a_map_that_does_not_ask_the_model_is_flagged(rng):
    """An edge detector gives the same map whatever the weights; a gradient does not."""
    images = jnp.asarray(images_of(rng))
    edges = abs(jnp.diff(images, axis=1, append=0)).sum(-1)
    mixed = measures.shuffled(VARIABLES, jax.random.key(int(rng.integers(2**31))))

    def gradient(variables):
        return jax.grad(lambda x: linear(variables, x)[0]["score"].sum())(images).sum(-1)

    figures = {
        "edges": {"rank_correlation": float(measures.rank_correlation(edges, edges).mean())},
        "gradient": {
            "rank_correlation": float(
                measures.rank_correlation(gradient(VARIABLES), gradient(mixed)).mean()
            )
        },
        "random": {"insertion": 0.5},
    }
    assert survivors(figures) == ["edges"]


@pytest.mark.long
@pytest.mark.parametrize("share", [0.2, 0.8])
def test_what_is_imputed_is_the_weighed_mean_of_its_neighbors(share, rng):
    images = images_of(rng)
    missing = rng.random((2, 6, 9)) < share
    filled = np.asarray(measures.impute(jnp.asarray(images), jnp.asarray(missing)))
    np.testing.assert_array_equal(filled[~missing], images[~missing])
    for image, row, column in np.argwhere(missing):
        total = weight = 0.0
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                r, c = row + down, column + right
                if (down or right) and 0 <= r < 6 and 0 <= c < 9:
                    own = 1 / 12 if down and right else 1 / 6
                    total, weight = total + own * filled[image, r, c], weight + own
        np.testing.assert_allclose(filled[image, row, column], total / weight, atol=1e-4)


def test_maps_of_patches_are_means():
    maps = np.arange(48, dtype=np.float32).reshape(1, 6, 8)
    found = measures.to_patches(jnp.asarray(maps), (2, 4))
    assert found.shape == (1, 6, 8)
    np.testing.assert_allclose(found[0, 3:, 2:4], maps[0, 3:, 2:4].mean())
    for grid in (None, (4, 4)):
        np.testing.assert_array_equal(measures.to_patches(jnp.asarray(maps), grid), maps)


@pytest.mark.long
def test_blurred_images_are_scipys(rng):
    """Inside; at the edges the weights that are left sum to 1."""
    images = rng.random((2, 24, 40, 3)).astype(np.float32)
    found = np.asarray(measures.blurred(jnp.asarray(images), 1 / 24))
    ones = np.ones_like(images)
    sigma = (0, 1, 40 / 24, 0)
    blur = [ndimage.gaussian_filter(x, sigma, mode="constant", truncate=20) for x in (images, ones)]
    np.testing.assert_allclose(found, blur[0] / blur[1], atol=1e-5)
