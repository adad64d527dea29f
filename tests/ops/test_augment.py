"""Operations against Pillow, policies and mixing against their definitions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance, ImageOps

from vision_jax.errors import UserError
from vision_jax.ops import augment


def random_key(rng):
    return jax.random.key(int(rng.integers(2**31)))


def random_images(rng, count, height, width):
    return jnp.asarray(rng.random((count, height, width, 3)), jnp.float32)


# --- Operations -----------------------------------------------------------------------------------


def affine(a, b, c, d, e, f):
    """Pillow's nearest sampling: pixel (x, y) comes from a·x + b·y + c, d·x + e·y + f."""
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f))


REFERENCES = {
    "identity": lambda image, s: image,
    "shear_x": lambda image, s: affine(1, s, 0, 0, 1, 0)(image),
    "shear_y": lambda image, s: affine(1, 0, 0, s, 1, 0)(image),
    "translate_x": lambda image, s: affine(1, 0, -int(s), 0, 1, 0)(image),
    "translate_y": lambda image, s: affine(1, 0, 0, 0, 1, -int(s))(image),
    "rotate": lambda image, s: image.rotate(s),
    "brightness": lambda image, s: ImageEnhance.Brightness(image).enhance(1 + s),
    "color": lambda image, s: ImageEnhance.Color(image).enhance(1 + s),
    "contrast": lambda image, s: ImageEnhance.Contrast(image).enhance(1 + s),
    "sharpness": lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + s),
    "posterize": lambda image, s: ImageOps.posterize(image, int(s)),
    "solarize": lambda image, s: ImageOps.solarize(image, 255 * s),
    "autocontrast": lambda image, s: ImageOps.autocontrast(image),
    "equalize": lambda image, s: ImageOps.equalize(image),
}


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_operation_is_pillows(name, rng):
    tops = {"translate_x": 20, "translate_y": 20, "rotate": 135, "posterize": 8}
    operation = jax.jit(augment.OPERATIONS[name])
    # Of sides both odd or both even a quarter turn puts no place between two pixels.
    for size in ((19, 27), (18, 26), (19, 25), (26, 18), (7, 19)):
        low, high = sorted(rng.choice(256, 2, replace=False))
        pixels = rng.integers(low, high + 1, (*size, 3)).astype(np.uint8)
        lowest = {"posterize": 1 / 8, "solarize": 0}.get(name, -1)
        # Pillow reads its factors in float32, too; a rounded strength keeps ties apart.
        strength = float(np.float32(rng.uniform(lowest, 1) * tops.get(name, 0.9)))
        reference = partial(REFERENCES[name], Image.fromarray(pixels))
        expected = np.asarray(reference(strength), np.float32)
        result = 255 * np.asarray(operation(pixels.astype(np.float32) / 255, jnp.float32(strength)))
        assert result.min() >= 0
        assert result.max() <= 255 * (1 + 1e-6)
        exact = name in {*("identity", "posterize", "equalize", "translate_x", "translate_y")}
        if exact or name in ("shear_x", "shear_y", "rotate", "solarize"):
            # Pillow's fixed-point steps may take the neighbour where a place falls between two,
            # which they also do at a strength beside this one.
            near = [] if exact else [reference(strength * (1 + moved)) for moved in (-1e-4, 1e-4)]
            wrong = np.logical_and.reduce(
                [
                    (np.abs(result - np.asarray(image, np.float32)) > 1e-3).any(-1)
                    for image in (expected, *near)
                ]
            )
            assert wrong.sum() <= (0 if exact else 2)
        else:
            np.testing.assert_allclose(result, expected, atol=2)  # Pillow rounds down, twice.


def test_constant_image_survives_the_operations_that_stretch():
    image = jnp.full((5, 6, 3), 0.4)
    for name in ("autocontrast", "equalize"):
        np.testing.assert_allclose(jax.jit(augment.OPERATIONS[name])(image, 0.0), image, rtol=1e-6)


# --- Policies -------------------------------------------------------------------------------------


def candidates(images, strengths):
    """{name: f[S, B, H, W, 3]}, what each operation makes of the images at its strengths f[S]."""
    made = {}
    for name, values in strengths.items():
        values = np.unique(values).astype(np.float32)
        if name in augment.SIGNED:
            values = np.concatenate([values, -values])
        over_images = jax.vmap(augment.OPERATIONS[name], in_axes=(0, None))
        over_strengths = jax.jit(jax.vmap(over_images, in_axes=(None, 0)))
        made[name] = np.asarray(over_strengths(images, values))
    return made


def assert_explained(images, augmented, strengths):
    """Each image went through one of the operations, and each occurs, with both of its signs."""
    images, augmented = np.asarray(images), np.asarray(augmented)
    explained = (images == augmented).all((1, 2, 3))
    assert explained.any()
    for name, made in candidates(images, strengths).items():
        hits = np.abs(made - augmented).max((2, 3, 4)) < 1e-5  # [S, B]
        changed = hits & (images != augmented).any((1, 2, 3))
        assert changed.any() or name == "identity", name
        if name in augment.SIGNED:
            assert all(half.any() for half in np.split(changed, 2)), name
        explained |= hits.any(0)
    assert explained.all()


def test_rand_augment_applies_one_operation_of_its_table_to_each_image(rng):
    images = random_images(rng, 400, 20, 16)
    # At 12, 0.12 (y + 1/2) is 1.5: a tie, and how it is rounded is the compiler's choice.
    augmented = augment.rand_augment(random_key(rng), images, num_ops=1, magnitude=13)
    strengths = augment.rand_augment_strengths(20, 16)
    assert_explained(images, augmented, {name: table[[13]] for name, table in strengths.items()})


@pytest.mark.long
def test_trivial_augment_applies_one_operation_at_any_strength_to_each_image(rng):
    images = random_images(rng, 400, 6, 6)
    augmented = jax.jit(augment.trivial_augment)(random_key(rng), images)
    assert_explained(images, augmented, augment.trivial_augment_strengths())


@pytest.mark.long
def test_more_operations_change_more_and_none_changes_nothing(rng):
    images = random_images(rng, 64, 16, 16)
    key = random_key(rng)
    np.testing.assert_array_equal(augment.rand_augment(key, images, num_ops=0), images)
    once, thrice = (
        np.abs(augment.rand_augment(key, images, num_ops=n) - images).mean() for n in (1, 3)
    )
    assert thrice > once > 0


def test_strength_tables():
    weak, wide = augment.rand_augment_strengths(331, 662), augment.trivial_augment_strengths()
    for tables in (weak, wide):
        assert set(tables) == set(augment.OPERATIONS)
        assert all(table.shape == (31,) for table in tables.values())
    assert weak["shear_x"][-1] == pytest.approx(0.3)
    assert weak["translate_x"][-1] == pytest.approx(300)
    assert weak["translate_y"][15] == pytest.approx(75)
    assert weak["posterize"][[0, 30]].tolist() == [8, 4]
    assert wide["rotate"][10] == pytest.approx(45)
    assert wide["posterize"][[0, 15, 30]].tolist() == [8, 5, 2]
    assert wide["solarize"][[0, 30]].tolist() == [1, 0]


def everything(key, images, targets):
    keys = jax.random.split(key, 3)
    images = augment.rand_augment(keys[0], images)
    images = augment.random_erasing(keys[1], images, probability=0.5)
    return augment.mixup_or_cutmix(keys[2], images, targets, mixup_alpha=0.8, cutmix_alpha=1.0)


@pytest.mark.long
def test_one_compile_and_the_same_result_on_eight_devices(rng):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    batch = NamedSharding(mesh, PartitionSpec("data"))
    traces = []

    @jax.jit
    def run(key, images, targets):
        traces.append(None)
        return everything(key, images, targets)

    for _ in range(3):
        key, images = random_key(rng), random_images(rng, 16, 10, 10)
        targets = jnp.asarray(rng.dirichlet(np.ones(5), 16), jnp.float32)
        alone = run(key, images, targets)
        for array in alone:
            assert array.dtype == jnp.float32
            assert array.min() >= 0
            assert array.max() <= 1 + 1e-6
        np.testing.assert_allclose(alone[1].sum(1), 1, rtol=1e-5)
    assert len(traces) == 1
    spread = run(key, *jax.device_put((images, targets), batch))
    for one, many in zip(alone, spread, strict=True):
        np.testing.assert_allclose(one, many, atol=1e-6)


# --- Mixing ---------------------------------------------------------------------------------------


def mix_many(rng, count, images, targets, **arguments):
    def mix(key):
        return augment.mixup_or_cutmix(key, images, targets, **arguments)

    mixed = jax.jit(jax.vmap(mix))(jax.random.split(random_key(rng), count))
    return tuple(map(np.asarray, mixed))


# Black and white images and opposite targets show which share of each came from where.
HEIGHT, WIDTH = 16, 12
BLACK_WHITE = jnp.stack([jnp.zeros((HEIGHT, WIDTH, 3)), jnp.ones((HEIGHT, WIDTH, 3))])
TARGETS = jnp.eye(2)


def test_both_off_is_the_input_itself(rng):
    result = augment.mixup_or_cutmix(
        random_key(rng), BLACK_WHITE, TARGETS, mixup_alpha=0.0, cutmix_alpha=0.0
    )
    assert result[0] is BLACK_WHITE
    assert result[1] is TARGETS


@pytest.mark.long
def test_mixup_blends_images_and_targets_by_one_beta_share(rng):
    alpha = rng.uniform(0.2, 1.5)
    images, targets = mix_many(rng, 3000, BLACK_WHITE, TARGETS, mixup_alpha=alpha, cutmix_alpha=0.0)
    share = targets[:, 0, 0]
    np.testing.assert_allclose(targets[:, 1, 1], share, atol=1e-6)
    np.testing.assert_allclose(images[:, 1], share[:, None, None, None] + 0 * images[:, 1])
    np.testing.assert_allclose(images[:, 0], 1 - images[:, 1], atol=1e-6)
    assert share.mean() == pytest.approx(0.5, abs=0.05)
    assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


@pytest.mark.long
def test_partner_is_the_mirrored_example(rng):
    images, targets = random_images(rng, 5, 4, 4), jnp.eye(5)
    (mixed,), (mixed_targets,) = mix_many(
        rng, 1, images, targets, mixup_alpha=1.0, cutmix_alpha=0.0
    )
    share = mixed_targets[0, 0]
    expected = share * np.asarray(images) + (1 - share) * np.asarray(images)[::-1]
    np.testing.assert_allclose(mixed, expected, atol=1e-6)


def span(row):
    """First true place and the one after the last."""
    places = np.flatnonzero(row)
    return int(places[0]), int(places[-1]) + 1


def test_cutmix_pastes_a_clipped_box_and_corrects_the_targets(rng):
    # So large an alpha that the share is one half: the box is floor(side · sqrt(1/2)) long.
    images, targets = mix_many(rng, 1500, BLACK_WHITE, TARGETS, mixup_alpha=0.0, cutmix_alpha=1e6)
    pasted = images[:, 0, :, :, 0]
    assert set(np.unique(pasted)) == {0.0, 1.0}
    np.testing.assert_allclose(targets[:, 0, 0], 1 - pasted.mean((1, 2)), atol=1e-6)
    np.testing.assert_array_equal(images[:, 1], 1 - images[:, 0])
    for side, occupied in ((HEIGHT, pasted.any(2)), (WIDTH, pasted.any(1))):
        length = int(side * np.sqrt(0.5))
        expected = {
            (max(center - length // 2, 0), min(center + (length + 1) // 2, side))
            for center in range(side)
        }
        assert {span(row) for row in occupied} == expected
        assert all(row[slice(*span(row))].all() for row in occupied)
    np.testing.assert_array_equal(pasted, pasted.any(2)[:, :, None] & pasted.any(1)[:, None, :])


@pytest.mark.long
def test_switch_and_probability_choose_per_batch(rng):
    images, targets = mix_many(
        rng,
        2000,
        *(BLACK_WHITE, TARGETS),
        **{"mixup_alpha": 1.0, "cutmix_alpha": 1.0},
        **{"switch_probability": 0.25, "probability": 0.8},
    )
    first = images[:, 0]
    unmixed = (first == 0).all((1, 2, 3))
    cut = np.isin(first, (0, 1)).all((1, 2, 3)) & ~unmixed
    np.testing.assert_array_equal(
        targets[unmixed], np.broadcast_to(np.eye(2), targets.shape)[unmixed]
    )
    # A box too small for a pixel counts as unmixed here: one CutMix in a hundred or so.
    assert unmixed.mean() == pytest.approx(0.2, abs=0.04)
    assert cut.mean() == pytest.approx(0.8 * 0.25, abs=0.04)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mixup_alpha": -0.1}, "mixup_alpha"),
        ({"cutmix_alpha": float("nan")}, "cutmix_alpha"),
        ({"probability": 1.1}, "probability"),
        ({"switch_probability": -1.0}, "switch_probability"),
    ],
)
def test_impossible_mixing_is_a_user_error(changed, message, rng):
    arguments = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0} | changed
    with pytest.raises(UserError, match=message):
        augment.mixup_or_cutmix(random_key(rng), BLACK_WHITE, TARGETS, **arguments)


# --- Erasing --------------------------------------------------------------------------------------


def test_erasing_fills_one_box_with_noise(rng):
    count, height, width = 600, 20, 24
    images = jnp.full((count, height, width, 3), 2.0)  # noise lies in [0, 1] and never equals it
    erase = jax.jit(partial(augment.random_erasing, probability=0.6))
    erased = np.asarray(erase(random_key(rng), images))
    changed = (erased != 2).all(-1)
    assert changed.any((1, 2)).mean() == pytest.approx(0.6, abs=0.08)
    rows, columns = changed.any(2), changed.any(1)
    np.testing.assert_array_equal(changed, rows[:, :, None] & columns[:, None, :])
    hit = changed.any((1, 2))
    box_height, box_width = rows.sum(1)[hit], columns.sum(1)[hit]
    share = box_height * box_width / (height * width)
    # Sides are rounded to whole pixels, hence the margins around 0.02, 1/3 and 0.3.
    assert 0.01 < share.min() < 0.06
    assert 0.28 < share.max() < 0.38
    assert (box_height / box_width).min() < 0.5
    assert (box_height / box_width).max() > 2
    noise = erased[changed]
    assert noise.min() >= 0
    assert noise.max() <= 1
    assert noise.mean() == pytest.approx(0.5, abs=0.02)
    assert noise.std() == pytest.approx(12**-0.5, abs=0.02)


def test_erasing_never_and_always(rng):
    images = random_images(rng, 32, 16, 16)
    assert augment.random_erasing(random_key(rng), images, probability=0.0) is images
    always = jax.jit(partial(augment.random_erasing, probability=1.0))(random_key(rng), images)
    assert (np.asarray(always) != np.asarray(images)).any((1, 2, 3)).all()


def test_impossible_strengths_are_user_errors(rng):
    images = random_images(rng, 2, 8, 8)
    with pytest.raises(UserError, match="magnitude"):
        augment.rand_augment(random_key(rng), images, magnitude=31)
    with pytest.raises(UserError, match="num_ops"):
        augment.rand_augment(random_key(rng), images, num_ops=-1)
    with pytest.raises(UserError, match="min_area"):
        augment.random_erasing(random_key(rng), images, probability=1.0, min_area=0.5, max_area=0.1)
