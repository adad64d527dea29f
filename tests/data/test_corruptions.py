"""The common corruptions against recorded results of imagecorruptions, and their draws."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision_jax.data import corruptions
from vision_jax.data.corruptions import FUNCTIONS, NAMES, PARAMETERS, SEVERITIES, corrupt
from vision_jax.errors import UserError

# Made by scripts/make_golden_corruptions.py.
GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "corruptions.npz"))
IMAGE = GOLDEN.pop("image")


class Legacy(np.random.RandomState):
    """NumPy's old generator, from which the reference draws, under the new one's names."""

    def integers(self, *arguments, **more):
        return self.randint(*arguments, **more)


def cut(image: np.ndarray) -> np.ndarray:
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("key", GOLDEN)
def test_equal_to_the_byte_with_the_same_draws(key):
    name, severity = key.rsplit("_", 1)
    parameters = PARAMETERS[name][0][int(severity) - 1]
    rng: object = Legacy(int(severity))
    if name == "impulse_noise":
        rng = np.random.default_rng(int(severity))
    if name == "elastic":  # theirs has no affine map and its own sizes, as shares of the side
        strength = {1: 0.05, 3: 0.085, 5: 0.12}[int(severity)]
        parameters = (0.005 * 250 * strength, 0.01, 0.0)
    made = cut(FUNCTIONS[name](IMAGE, parameters, rng))
    np.testing.assert_array_equal(made, GOLDEN[key])


def random_image(rng: np.random.Generator, side: int, channels: int = 3) -> np.ndarray:
    return rng.integers(0, 256, (side, side, channels), np.uint8)


@pytest.mark.parametrize("side", [24, 72])
def test_jpeg_and_pixelate_are_pillow_s(side, rng):
    image = random_image(rng, side)
    for severity in SEVERITIES:
        quality = PARAMETERS["jpeg"][side <= 64][severity - 1]
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        made = corrupt(image, 0, name="jpeg", severity=severity, seed=0)
        np.testing.assert_array_equal(made, np.asarray(Image.open(file)))
        scale = PARAMETERS["pixelate"][side <= 64][severity - 1]
        made = corrupt(image, 0, name="pixelate", severity=severity, seed=0)
        small = Image.fromarray(image).resize((int(side * scale),) * 2, Image.Resampling.BOX)
        large = small.resize((side, side), Image.Resampling.BOX)
        np.testing.assert_array_equal(made, np.asarray(large))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [16, 65])
def test_the_last_severity_does_more_than_the_first(name, side):
    """On a smooth picture, where a blur does less, and never nothing."""
    y, x = np.mgrid[:side, :side] / side
    image = np.stack([x, y, (x + y) / 2], axis=2)
    image = (60 + 100 * image + 40 * (np.sin(12 * x) * np.cos(9 * y))[..., None]).astype(np.uint8)
    changes = []
    for severity in SEVERITIES:
        made = np.mean(
            [
                np.abs(
                    corrupt(image, index, name=name, severity=severity, seed=1)
                    - image.astype(float)
                )
                for index in range(12)
            ]
        )
        changes.append(made)
    assert min(changes) > 0.1
    if name != "elastic":  # whose affine map is the largest at low severities
        assert changes[-1] > changes[0]


@pytest.mark.parametrize("name", NAMES)
def test_draws_depend_on_seed_severity_and_index_alone(name, rng):
    image = random_image(rng, 32)

    def made(index, seed=0, severity=3):
        return corrupt(image, index, name=name, severity=severity, seed=seed)

    np.testing.assert_array_equal(made(5), made(5))
    drawn = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg")
    assert np.array_equal(made(5), made(6)) != drawn
    assert np.array_equal(made(5), made(5, seed=1)) != drawn
    assert not np.array_equal(made(5), made(5, severity=4))


def test_corruptions_of_equal_draws_differ():
    """The name is among what the draws come from: two noises don't share theirs."""
    image = np.full((32, 32, 3), 128, np.uint8)
    one = FUNCTIONS["gaussian_noise"]
    rngs = [np.random.default_rng((0, NAMES.index(n), 1, 0)) for n in ("gaussian_noise", "snow")]
    first, second = (one(image, 0.1, rng) for rng in rngs)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1
    expected = cut(one(image, 0.04, np.random.default_rng((0, 0, 1, 0))))
    made = corrupt(image, 0, name="gaussian_noise", severity=1, seed=0)
    np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize("name", NAMES)
def test_grey_images_stay_grey_and_others_are_refused(name, rng):
    grey = random_image(rng, 32, 1)
    made = corrupt(grey, 0, name=name, severity=3, seed=0)
    assert made.shape == grey.shape
    assert made.dtype == np.uint8
    with pytest.raises(UserError, match="1 or 3 channels"):
        corrupt(random_image(rng, 32, 4), 0, name=name, severity=3, seed=0)


def test_a_grey_value_is_brightened_as_its_color_is(rng):
    grey = random_image(rng, 32, 1)
    color = np.repeat(grey, 3, axis=2)
    for name in ("brightness", "contrast", "defocus_blur", "zoom_blur"):
        one, three = (corrupt(i, 0, name=name, severity=2, seed=0) for i in (grey, color))
        np.testing.assert_array_equal(np.repeat(one, 3, axis=2), three)


def test_frost_mixes_textures_of_the_photographs_colors(rng):
    textures = np.stack([corruptions._ice((96, 96, 3), rng) for _ in range(60)])
    means = textures.mean((1, 2))  # [60, 3]
    deviations = textures.mean(3).std((1, 2))
    for mean, deviation in zip(means, deviations, strict=True):
        errors = [
            np.abs(mean - color).max() + abs(deviation - d) for color, d in corruptions.FROSTS
        ]
        assert min(errors) < 8  # some of the brightest needles are clipped
    seen = {
        int(np.argmin([np.abs(m - color).max() for color, _ in corruptions.FROSTS])) for m in means
    }
    assert seen == {0, 1, 3, 4}
    image, texture = random_image(rng, 96), corruptions._ice((96, 96, 3), np.random.default_rng(7))
    mixed = corruptions.frost(image, (0.7, 0.6), np.random.default_rng(7))
    np.testing.assert_allclose(mixed, 0.7 * image + 0.6 * texture, rtol=1e-12)


def test_the_affine_map_takes_the_moved_points_back(rng):
    seed = int(rng.integers(2**31))
    height, width, shift = 40, 56, 3.0
    back = corruptions._corners_moved(height, width, shift, np.random.default_rng(seed))
    moves = np.random.default_rng(seed).uniform(-shift, shift, (3, 2))
    points = np.array([[20 + 13, 28 + 13], [20 + 13, 28 - 13], [20 - 13, 28 - 13]], float)  # (x, y)
    for point, move in zip(points, moves, strict=True):
        x, y = point + move
        np.testing.assert_allclose(back @ [y, x, 1], point[::-1], atol=1e-10)


def test_the_parameters_are_those_of_a_size(rng):
    image = random_image(rng, 64)
    larger = np.pad(image, ((0, 1), (0, 0), (0, 0)), mode="edge")
    small, large = (
        corrupt(i, 0, name="contrast", severity=1, seed=0).astype(float).std()
        for i in (image, larger)
    )
    assert small / image.std() == pytest.approx(0.75, rel=0.02)
    assert large / image.std() == pytest.approx(0.4, rel=0.02)


def test_unknown_names_are_told_the_nearest():
    with pytest.raises(UserError, match="did you mean `zoom_blur`"):
        corruptions.find_names(("zoom_blurr",), "config.robustness.corruptions")
    assert corruptions.find_names(("all",), "") == NAMES
    assert corruptions.find_names((), "") == ()
