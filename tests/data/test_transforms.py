import numpy as np
import pytest
from PIL import Image

from vision_jax.data.decode import DamagedImageError
from vision_jax.data.transforms import (
    INTERPOLATIONS,
    Preprocessing,
    center_crop,
    complete_crop,
    eval_transform,
    random_crop_padded,
    random_flip,
    random_resized_crop,
    resize,
    to_channels,
)
from vision_jax.errors import UserError


def preprocessing(**changes) -> Preprocessing:
    fields = {
        "image_size": (8, 8),
        "mean": (0.5, 0.25, 0.0),
        "std": (0.5, 0.5, 0.5),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "crop_mode": "center",
    }
    return Preprocessing(**(fields | changes))


def random_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def test_center_keeps_the_middle(rng):
    image = random_image(rng, 8, 20)
    assert np.array_equal(eval_transform(image, preprocessing()), image[:, 6:14])


def test_border_fills_with_the_mean_color(rng):
    image = random_image(rng, 8, 4)
    out = eval_transform(image, preprocessing(crop_mode="border"))
    assert np.array_equal(out[:, 2:6], image)
    assert (out[:, :2] == (128, 64, 0)).all()
    assert (out[:, 6:] == (128, 64, 0)).all()


def test_squash_shows_everything():
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 40:] = 255
    out = eval_transform(image, preprocessing(crop_mode="squash"))
    assert out.shape == (8, 8, 3)
    assert out[0, 0, 0] == 0
    assert out[7, 7, 0] == 255


def test_of_an_odd_number_of_pixels_each_library_cuts_its_own_half():
    """Three pixels left over: torchvision cuts 2 at the top and left, transformers 1."""
    image = np.arange(5, dtype=np.uint8)[:, None, None].repeat(5, 1)
    assert center_crop(image, (2, 5))[:, 0, 0].tolist() == [2, 3]
    assert center_crop(image, (2, 5), rule="transformers")[:, 0, 0].tolist() == [1, 2]
    framed = center_crop(image + 1, (8, 5), (9,))
    assert framed[:, 0, 0].tolist() == [9, 1, 2, 3, 4, 5, 9, 9]
    framed = center_crop(image + 1, (8, 5), (9,), "transformers")
    assert framed[:, 0, 0].tolist() == [9, 9, 1, 2, 3, 4, 5, 9]


def test_what_the_weights_say_of_the_crop_is_kept():
    own = {"crop_pct": 0.9, "crop_mode": None, "crop_rule": "transformers"}
    assert complete_crop(own, (8, 6)) == own | {"crop_mode": "center"}
    usual = {"crop_pct": 0.875, "crop_mode": "center", "crop_rule": "torchvision"}
    assert complete_crop({}, (8, 8)) == usual
    assert complete_crop({}, (8, 6)) == usual | {"crop_pct": 1.0, "crop_mode": "squash"}
    older = {key: value for key, value in vars(preprocessing()).items() if key != "crop_rule"}
    assert Preprocessing(**older).crop_rule == "torchvision"  # model.json of before it was said


def test_center_crop_pads_small_images():
    out = center_crop(np.full((3, 2, 3), 9, np.uint8), (6, 5))
    expected = np.zeros((6, 5, 3), np.uint8)
    expected[1:4, 1:3] = 9  # the odd pixel goes to the bottom and right
    assert np.array_equal(out, expected)


def test_resize_to_the_same_size_is_the_identity(rng):
    image = random_image(rng, 5, 6)
    assert np.array_equal(resize(image, (5, 6), "bicubic"), image)


def test_a_strip_does_not_become_a_bomb():
    strip = np.zeros((1, 60_000, 3), np.uint8)
    with pytest.raises(DamagedImageError, match="60000 × 1 pixels is too narrow"):
        eval_transform(strip, preprocessing(image_size=(224, 224)))
    with pytest.raises(DamagedImageError, match="too narrow"):
        eval_transform(strip, preprocessing(crop_mode="border"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("interpolation", "cubic"),
        ("crop_mode", "middle"),
        ("crop_rule", "half"),
        ("crop_pct", 0),
        ("crop_pct", 9.0),
        ("image_size", (0, 8)),
    ],
)
def test_bad_preprocessing(field, value):
    with pytest.raises(UserError, match=field):
        preprocessing(**{field: value})


def coordinates(height: int, width: int) -> np.ndarray:
    """An image whose pixels say where they come from: (row, column, 0)."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)


def test_random_crop_padded(rng):
    image = coordinates(32, 32) + 1
    shifts = set()
    for _ in range(400):
        out = random_crop_padded(image, rng, 4)
        inside = out[4:28, 4:28, :2].astype(int)
        shift = inside[0, 0] - 5
        assert (np.abs(shift) <= 4).all()
        assert np.array_equal(inside - shift, image[4:28, 4:28, :2])
        shifts.add(tuple(shift))
        if shift[0] > 0:
            assert (out[32 - shift[0] :] == 0).all()
    assert len(shifts) > 75  # of 81; below that once in 10⁶ runs or so if uniform


def test_random_flip(rng):
    image = random_image(rng, 4, 6)
    flipped = [np.array_equal(random_flip(image, rng), image[:, ::-1]) for _ in range(400)]
    assert 120 < sum(flipped) < 280  # 8 standard deviations
    assert all(
        np.array_equal(out, image) or np.array_equal(out, image[:, ::-1])
        for out in (random_flip(image, rng) for _ in range(10))
    )


def window_of(out: np.ndarray) -> tuple[float, float]:
    """Approximate height and width of the window that `out`, of `coordinates`, was cut from."""
    (h, w), top, bottom = out.shape[:2], out[0, 0].astype(float), out[-1, -1].astype(float)
    return (bottom[0] - top[0]) * h / (h - 1), (bottom[1] - top[1]) * w / (w - 1)


def test_random_resized_crop_stays_within_scale_and_ratio(rng):
    image = coordinates(200, 250)
    windows = np.array(
        [
            window_of(random_resized_crop(image, rng, (24, 24), (0.2, 0.6), (0.7, 1.4), "bilinear"))
            for _ in range(300)
        ]
    )
    area = windows.prod(axis=1) / (200 * 250)
    ratio = windows[:, 1] / windows[:, 0]
    assert 0.18 < area.min() < 0.23
    assert 0.56 < area.max() < 0.64
    assert abs(area.mean() - 0.4) < 0.04  # uniform in area: sd 0.115 / √300 = 0.007
    assert 0.66 < ratio.min() < 0.75
    assert 1.3 < ratio.max() < 1.48
    assert abs(np.log(ratio).mean()) < 0.07  # log-uniform: symmetric about 1, sd 0.2 / √300 = 0.012


def test_random_resized_crop_falls_back_to_the_center(rng):
    image = coordinates(20, 200)
    out = random_resized_crop(image, rng, (20, 26), (0.9, 1.0), (3 / 4, 4 / 3), "bilinear")
    expected = image[:, 86:113]  # round(20 · 4/3) = 27 columns about the middle
    resized = Image.fromarray(expected).resize((26, 20), Image.Resampling.BILINEAR)
    assert np.array_equal(out, np.asarray(resized))


def test_random_transforms_are_functions_of_the_generator(rng):
    image = random_image(rng, 40, 50)
    for function in (
        lambda r: random_resized_crop(image, r, (9, 8), (0.1, 1), (0.7, 1.4), "bicubic"),
        lambda r: random_crop_padded(image, r, 4),
        lambda r: random_flip(image, r),
    ):
        outs = [function(np.random.default_rng(seed)) for seed in (5, 5)]
        assert np.array_equal(*outs)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_channels_are_transformed_each_for_itself(crop_mode, rng):
    """Five channels get what each would get alone, and grey what color would."""
    many = rng.integers(0, 256, (17, 30, 5), np.uint8)
    five = preprocessing(mean=(0.2,) * 5, std=(1.0,) * 5, crop_pct=0.9, crop_mode=crop_mode)
    one = preprocessing(mean=(0.2,), std=(1.0,), crop_pct=0.9, crop_mode=crop_mode)
    whole = eval_transform(many, five)
    assert whole.shape == (8, 8, 5)
    for channel in range(5):
        alone = eval_transform(many[..., channel : channel + 1], one)
        np.testing.assert_array_equal(alone[..., 0], whole[..., channel])
    three = preprocessing(mean=(0.2,) * 3, std=(1.0,) * 3, crop_pct=0.9, crop_mode=crop_mode)
    color = eval_transform(many[..., :3], three)
    np.testing.assert_array_equal(color, whole[..., :3])


def test_color_becomes_luma_and_grey_becomes_color(rng):
    image = random_image(rng, 8, 8)
    luma = np.asarray(Image.fromarray(image).convert("L"))
    np.testing.assert_array_equal(to_channels(image, 1)[..., 0], luma)
    np.testing.assert_array_equal(to_channels(luma[..., None], 3), np.stack([luma] * 3, -1))
    assert to_channels(image, 3) is image
    with pytest.raises(DamagedImageError, match="has 3 channels and the model takes 4"):
        to_channels(image, 4)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_pictures_of_pillow_give_what_their_arrays_give(interpolation, rng):
    image = random_image(rng, 33, 46)
    picture = Image.fromarray(image)
    window = (5, 7, 21, 30)
    cut = resize(picture, (8, 9), interpolation, window)
    assert np.array_equal(cut, resize(image, (8, 9), interpolation, window))
    assert np.array_equal(cut, resize(image[5:26, 7:37], (8, 9), interpolation))
    same = resize(picture, (21, 30), interpolation, window)
    assert np.array_equal(same, image[5:26, 7:37])
    for function in (
        lambda x: random_resized_crop(
            x, np.random.default_rng(3), (9, 8), (0.1, 1), (0.7, 1.4), interpolation
        ),
        lambda x: eval_transform(x, preprocessing(interpolation=interpolation, crop_pct=0.9)),
        lambda x: np.asarray(to_channels(x, 1)),
        lambda x: np.asarray(to_channels(x, 3)),
    ):
        assert np.array_equal(function(picture), function(image))
